"""The most memory that a process held during a block."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gigavim.engine.memory import resident_bytes

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_SAMPLE_S = 0.2


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the highest resident memory, in bytes, since the block began.

    Exact on Linux, where the kernel's own mark is set back (`man 5 proc`, clear_refs); elsewhere
    sampled five times a second.
    """
    try:
        _CLEAR_REFS.write_text("5")
        _kernel_peak()
    except (OSError, StopIteration, ValueError):
        yield from _sampled()
        return
    yield _kernel_peak


def _kernel_peak() -> int:
    lines = _STATUS.read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


def _sampled() -> Iterator[Callable[[], int]]:
    highest = resident_bytes()
    ended = threading.Event()

    def sample() -> None:
        nonlocal highest
        while not ended.wait(_SAMPLE_S):
            highest = max(highest, resident_bytes())

    thread = threading.Thread(target=sample, name=f"peak-memory-{os.getpid()}", daemon=True)
    thread.start()
    try:
        yield lambda: max(highest, resident_bytes())
    finally:
        ended.set()
        thread.join()
