"""Whole JPEG tiles, a row of them at a time, with next to nothing between decoder and result.

Decoding leaves the interpreter to other threads, all else keeps them waiting: so there is as little
else here as is safe. A tile that does not go the plain way (no bytes, damaged, not the size it
should be) is left to the caller, who reads it alone and knows what to say of it.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from gigavim.slides.handles import FileBytes


class TileRows:
    """The tiles of a level, each of which decodes to (tile_height, tile_width, 3) uint8."""

    def __init__(
        self,
        offsets: npt.NDArray[np.int64],
        byte_counts: npt.NDArray[np.int64],
        decode: Callable[..., npt.NDArray[np.generic]],
    ) -> None:
        self._offsets, self._byte_counts, self._decode = offsets, byte_counts, decode

    def fill(
        self, file: FileBytes, index: int, places: Sequence[npt.NDArray[np.uint8]]
    ) -> list[int]:
        """Decode the tiles from `index` on into places, each (tile_height, tile_width, 3).

        A contiguous place is decoded into, another one copied to.

        Returns:
            Which of the places are not done; they may hold anything.
        """
        stop = index + len(places)
        offsets = self._offsets[index:stop].tolist()
        byte_counts = self._byte_counts[index:stop].tolist()
        undone = []
        for number, (place, offset, count) in enumerate(zip(places, offsets, byte_counts)):
            if not (offset > 0 and count > 0 and self._fill_one(file, offset, count, place)):
                undone.append(number)
        return undone

    def _fill_one(
        self, file: FileBytes, offset: int, count: int, place: npt.NDArray[np.uint8]
    ) -> bool:
        try:
            if place.flags.c_contiguous:
                self._decode(file.read(offset, count), place)
                return True
            tile = self._decode(file.read(offset, count))
        except Exception:  # codecs raise errors of many unrelated kinds
            return False
        if tile.shape != place.shape or tile.dtype != np.uint8:
            return False
        place[...] = tile
        return True
