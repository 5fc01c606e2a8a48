"""Large output arrays, used again once nobody holds them.

The operating system clears fresh memory page by page, which costs a tenth of the time of decoding
into it; a stream of blocks of one size needs only a few arrays.
"""

import sys
import threading

import numpy as np
import numpy.typing as npt

SMALL_BYTES = 1 << 20
"""Below this the allocator itself reuses memory."""

MAX_POOL_BYTES = 96 << 20

# A free array is referred to by the pool's list, the loop variable and getrefcount's argument.
FREE_REFERENCES = 3


class BufferPool:
    """Gives uninitialised (height, width, 3) uint8 arrays.

    Every view of an array refers to the array that owns the memory, so that a count of references
    tells whether any part of it is still in use.
    """

    def __init__(self, max_bytes: int = MAX_POOL_BYTES) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._owners: list[npt.NDArray[np.uint8]] = []

    def empty(self, height: int, width: int) -> npt.NDArray[np.uint8]:
        """Return an array of any content."""
        size = height * width * 3
        if size < SMALL_BYTES or size > self.max_bytes:
            return np.empty((height, width, 3), np.uint8)
        with self._lock:
            for owner in self._owners:
                if size <= owner.size <= 2 * size and sys.getrefcount(owner) == FREE_REFERENCES:
                    return owner[:size].reshape(height, width, 3)
            owner = np.empty(size, np.uint8)
            while self._owners and sum(one.size for one in self._owners) > self.max_bytes - size:
                self._owners.pop(0)
            self._owners.append(owner)
            return owner.reshape(height, width, 3)

    def clear(self) -> None:
        """Let go of every array; those still in use live on with their users."""
        with self._lock:
            self._owners.clear()
