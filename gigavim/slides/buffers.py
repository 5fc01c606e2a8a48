"""Large output arrays, whose memory is used again once nobody holds any part of them.

The operating system clears fresh memory page by page, which costs a tenth of the time of decoding
into it (under a hypervisor that takes free memory back, as much as the decoding); a stream of
blocks of one size needs only a few arrays.
"""

import functools
import math
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.uint8]

SMALL_BYTES = 1 << 20
"""Below this the allocator itself reuses memory."""

MAX_POOL_BYTES = 96 << 20
"""The most memory that is kept while nobody uses it."""


class _Lease:
    """Memory lent out: the last object that views of it refer to, so that it goes after them."""

    __slots__ = ("__array_interface__", "_free", "_max_bytes", "_memory")

    def __init__(self, memory: Array, shape: tuple[int, ...], pool: "BufferPool") -> None:
        self.__array_interface__: dict[str, Any] = {**memory.__array_interface__, "shape": shape}
        self._memory, self._free, self._max_bytes = memory, pool.free, pool.max_bytes

    def __del__(self) -> None:
        # Runs in any thread at any moment: no lock may be taken, and a list bears changes.
        if sum(one.size for one in self._free) + self._memory.size <= self._max_bytes:
            self._free.append(self._memory)


class BufferPool:
    """Gives uninitialised (..., 3) uint8 arrays."""

    def __init__(self, max_bytes: int = MAX_POOL_BYTES) -> None:
        self.max_bytes = max_bytes
        self.free: list[Array] = []

    def empty(self, *size_px: int) -> Array:
        """Return an array of any content, such as (height, width, 3) of `empty(height, width)`."""
        shape = (*size_px, 3)
        size = math.prod(shape)
        if size < SMALL_BYTES or size > self.max_bytes:
            return np.empty(shape, np.uint8)
        return np.asarray(_Lease(self._take(size), shape, self))

    def _take(self, size: int) -> Array:
        """Return free memory of at least `size` bytes, or new memory."""
        for _ in range(len(self.free)):
            try:
                memory = self.free.pop()
            except IndexError:  # other threads took the rest
                break
            if size <= memory.size <= 2 * size:
                return memory
            self.free.insert(0, memory)
        with suppress(IndexError):  # sizes that are no longer asked for leave one by one
            self.free.pop()
        return np.empty(size, np.uint8)


@functools.cache
def shared_pool() -> BufferPool:
    """Return the pool of all slides of a process: the next slide starts with memory at hand."""
    return BufferPool()
