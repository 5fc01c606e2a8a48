"""Which device does the work."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gigavim.errors import SettingsError


def resolve_device(name: str) -> torch.device:
    """Turn a setting ("auto", "cpu", "cuda", "cuda:1", "mps") into a device that is there.

    Raises:
        SettingsError: the name is none of a device, or this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError(
            f"device {name!r} is unknown: use auto, cpu, cuda, cuda:1 or mps."
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise SettingsError(
            f"device {name!r} is not there: torch {torch.__version__} sees {found} CUDA devices."
            " Use --device cpu, or install a CUDA build of torch."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise SettingsError("device 'mps' is not there: use --device cpu.")
    if device.type not in {"cpu", "cuda", "mps"}:
        raise SettingsError(f"device {name!r} is not supported: use auto, cpu, cuda or mps.")
    return device


def usable_cores() -> int:
    """CPU cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to the calling thread: where others work, its waiting threads take their cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
