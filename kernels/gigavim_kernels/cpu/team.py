"""Threads that work on one block at a time, and the memory they work in."""

import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor


class Team:
    """A fixed number of threads, the caller one of them, each with a share of any work.

    Kernels release the interpreter and torch's own threads are switched off meanwhile: OpenMP
    threads that spin for each other lose most of their speed as soon as a core is busy elsewhere.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(
            max(1, threads - 1), "gigavim-kernel", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._lock = threading.Lock()
        self._buffers: dict[str, Tensor] = {}

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other callers out and torch on one thread."""
        with self._lock:
            before = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                yield
            finally:
                torch.set_num_threads(before)

    def run(self, work: Callable[[int], None]) -> None:
        """Call `work(worker)` for workers 0 .. threads - 1 side by side and wait for all."""
        others = [self._pool.submit(work, worker) for worker in range(1, self.threads)]
        try:
            work(0)
        finally:
            errors = [other.exception() for other in others]
        for error in errors:
            if error is not None:
                raise error

    def buffer(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Return (rows, columns) of uninitialised memory, the same at every call of that name."""
        size = rows * columns
        held = self._buffers.get(name)
        if held is None or held.dtype != dtype or held.numel() < size:
            with torch.inference_mode(False):  # the next caller may not be in it
                held = torch.zeros(size, dtype=dtype)  # touches every page
            self._buffers[name] = held
        return held[:size].view(rows, columns)


@functools.cache
def _team(threads: int, process: int) -> Team:
    return Team(threads)


def team_of(threads: int | None) -> Team:
    """Return the process's team of that many threads, by default as many as torch uses."""
    return _team(max(1, threads or torch.get_num_threads()), os.getpid())


def share(count: int, worker: int, workers: int) -> tuple[int, int]:
    """Return the piece start, stop of `count` items that falls to a worker."""
    return count * worker // workers, count * (worker + 1) // workers
