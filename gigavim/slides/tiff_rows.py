"""Whole JPEG tiles, a row of them at a time, with next to nothing between decoder and result.

Decoding leaves the interpreter to other threads, all else keeps them waiting: so there is as little
else here as is safe. A tile that does not go the plain way (no bytes, damaged, not the size it
should be) is left to the caller, who reads it alone and knows what to say of it.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from gigavim.slides.handles import FileBytes


class TileRows:
    """The tiles of a level, each of which decodes to (tile_height, tile_width, 3) uint8."""

    def __init__(
        self,
        offsets: npt.NDArray[np.int64],
        byte_counts: npt.NDArray[np.int64],
        decode: Callable[[bytes], npt.NDArray[np.generic]],
        tile_hw: tuple[int, int],
    ) -> None:
        self._offsets, self._byte_counts, self._decode = offsets, byte_counts, decode
        self._shape = (*tile_hw, 3)

    def fill(self, file: FileBytes, index: int, out: npt.NDArray[np.uint8]) -> list[int]:
        """Decode the n tiles from `index` on into `out`, (tile_height, n * tile_width, 3).

        Returns:
            Which of the n are not done; `out` keeps what it held there.
        """
        shape, decode, width = self._shape, self._decode, self._shape[1]
        stop = index + out.shape[1] // width
        offsets = self._offsets[index:stop].tolist()
        byte_counts = self._byte_counts[index:stop].tolist()
        undone = []
        for place, (offset, count) in enumerate(zip(offsets, byte_counts)):
            tile = None
            if offset > 0 and count > 0:
                try:
                    tile = decode(file.read(offset, count))
                except Exception:  # codecs raise errors of many unrelated kinds
                    tile = None
            if tile is not None and tile.shape == shape and tile.dtype == np.uint8:
                out[:, place * width : (place + 1) * width] = tile
            else:
                undone.append(place)
        return undone
