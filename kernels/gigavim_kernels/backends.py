"""Which code runs a block where: one table from the device to a backend."""

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Literal, cast, get_args

import torch

from gigavim_kernels.block import BlockKernel
from gigavim_kernels.weights import BlockWeights

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]
Maker = Callable[..., BlockKernel]


def _make_torch(
    block: BlockWeights, device: torch.device, precision: Precision, threads: int | None
) -> BlockKernel:
    from gigavim_kernels.torch_block import TorchBlock

    return TorchBlock(block, device=device, precision=precision)


def _make_numba(
    block: BlockWeights, device: torch.device, precision: Precision, threads: int | None
) -> BlockKernel:
    from gigavim_kernels.cpu.block import CpuBlock

    return CpuBlock(block, precision=precision, threads=threads)


def _make_triton(
    block: BlockWeights, device: torch.device, precision: Precision, threads: int | None
) -> BlockKernel:
    from gigavim_kernels.cuda.block import CudaBlock

    return CudaBlock(block, device=device, precision=precision)


MAKERS: dict[str, Maker] = {"numba": _make_numba, "triton": _make_triton, "torch": _make_torch}
BACKENDS: dict[str, tuple[str, ...]] = {"cpu": ("numba", "torch"), "cuda": ("triton", "torch")}
"""Backends by device type, the best first; every other device runs plain torch."""


@functools.cache
def unusable(name: str) -> str | None:
    """Why a backend cannot run here at all, or None: its compiler may have no wheel, say."""
    if name == "torch":
        return None
    try:
        importlib.import_module(name)
    except ImportError as error:
        logger.warning("%s is not usable (%s): the slower torch kernels run", name, error)
        return f"{name} cannot be imported ({error})"
    return None


def choices(device: torch.device | str) -> tuple[str, ...]:
    """The backends of a device, the best first, usable or not."""
    return BACKENDS.get(torch.device(device).type, ("torch",))


def backend_name(device: torch.device | str) -> str:
    """Return the name of the backend that runs on a device: "numba", "triton" or "torch"."""
    return next(name for name in choices(device) if unusable(name) is None)


def prepare_block(
    block: BlockWeights,
    *,
    device: torch.device | str,
    precision: Precision,
    threads: int | None = None,
) -> BlockKernel:
    """Make a block ready on a device with the best backend there.

    Args:
        block: the weights, float32.
        device: where the stream's chunks will be.
        precision: of the matrix products; the stream and the scan are float32 always.
        threads: for the CPU; by default the number torch would use.

    Raises:
        ValueError: for a precision other than "fp32" and "bf16".
    """
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision is {precision!r}; it must be 'fp32' or 'bf16'")
    device = torch.device(device)
    return MAKERS[backend_name(device)](block, device, precision, threads)


def resolve_precision(precision: str, device: torch.device | str) -> Precision:
    """Turn "auto" into "bf16" where the device multiplies bfloat16 in hardware, else "fp32".

    Raises:
        ValueError: for anything but "auto", "fp32" and "bf16".
    """
    if precision in get_args(Precision):
        return cast(Precision, precision)
    if precision != "auto":
        raise ValueError(f"precision is {precision!r}; it must be 'auto', 'fp32' or 'bf16'")
    kind = torch.device(device).type
    if kind == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return "bf16" if native or torch.version.hip else "fp32"
    return "bf16" if kind == "cpu" and _cpu_has_amx() else "fp32"


def _cpu_has_amx() -> bool:
    """Whether bfloat16 products beat float32 here: without AMX they are slower, up to 25 times."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)  # private in torch
    return bool(supported and supported())


def supported_precisions(device: torch.device | str) -> tuple[Precision, ...]:
    """The precisions that are no slower than float32 on a device."""
    return ("fp32", "bf16") if resolve_precision("auto", device) == "bf16" else ("fp32",)
