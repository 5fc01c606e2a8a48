"""A pyramid built band by band from the top, in memory of one band and compressed tiles."""

import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import imagecodecs
import numpy as np

from painting.bands import MOST_THREADS, Render, render_bands

TILE_PX = 256
LEVEL_STEP = 4
SMALLEST_LEVEL_PX = 1024  # no further level once the longer side is within this


def level_sizes(width: int, height: int) -> list[tuple[int, int]]:
    """(width, height) of each level, every one a quarter of the one above, rounded down."""
    sizes = [(width, height)]
    while max(sizes[-1]) > SMALLEST_LEVEL_PX and min(sizes[-1]) >= LEVEL_STEP:
        sizes.append((sizes[-1][0] // LEVEL_STEP, sizes[-1][1] // LEVEL_STEP))
    return sizes


def shrink(rows: np.ndarray) -> np.ndarray:
    """Area mean of 4 x 4 pixels of (h, w, 3) uint8; a remainder at right and below is dropped."""
    height, width = rows.shape[0] // LEVEL_STEP, rows.shape[1] // LEVEL_STEP
    cut = rows[: height * LEVEL_STEP, : width * LEVEL_STEP]
    blocks = cut.reshape(height, LEVEL_STEP, width, LEVEL_STEP, 3)
    total = blocks.sum(axis=(1, 3), dtype=np.uint16)
    mean: np.ndarray = ((total + LEVEL_STEP**2 // 2) // LEVEL_STEP**2).astype(np.uint8)
    return mean


def jpeg_tile(rows: np.ndarray, x: int, quality: int) -> bytes:
    """JPEG of the tile at column `x` of (n, width, 3) rows, edges repeated to fill it."""
    tile = rows[:, x : x + TILE_PX]
    missing = ((0, TILE_PX - tile.shape[0]), (0, TILE_PX - tile.shape[1]), (0, 0))
    return bytes(
        imagecodecs.jpeg8_encode(
            np.ascontiguousarray(np.pad(tile, missing, mode="edge")),
            level=quality,
            colorspace="RGB",
            outcolorspace="YCBCR",
            subsampling="420",
            optimize=True,
        )
    )


def deflate_tile(rows: np.ndarray, x: int) -> bytes:
    """Deflated label tile at column `x` of (n, width) rows, filled up with 0."""
    tile = np.zeros((TILE_PX, TILE_PX), dtype=np.uint8)
    part = rows[:TILE_PX, x : x + TILE_PX]
    tile[: part.shape[0], : part.shape[1]] = part
    return zlib.compress(tile.tobytes(), 9)


class _Level:
    """Collects rows of one level and hands out full rows of tiles."""

    def __init__(self, width: int, height: int) -> None:
        self.height = height
        self.rows = np.empty((0, width, 3), dtype=np.uint8)
        self.taken = 0

    def push(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Take rows; yield each complete (TILE_PX, width, 3) row of tiles, and the last one."""
        rows = rows[: self.height - self.taken]
        self.taken += rows.shape[0]
        self.rows = np.concatenate([self.rows, rows])
        while self.rows.shape[0] >= TILE_PX or (self.taken == self.height and len(self.rows)):
            yield self.rows[:TILE_PX]
            self.rows = self.rows[TILE_PX:]


class PyramidStream:
    """Renders an image band by band and hands out JPEG tiles of level 0 in file order.

    After the last tile, `reduced` holds the tiles of the other levels, `label_tiles` the deflated
    label map, and `overview` the pixels of the smallest level.
    """

    def __init__(
        self,
        render: Render,
        width: int,
        height: int,
        *,
        quality: int,
        region_px: int,
        progress: Callable[[int], object],
    ) -> None:
        self.sizes = level_sizes(width, height)
        self.reduced: list[list[bytes]] = [[] for _ in self.sizes[1:]]
        self.label_tiles: list[bytes] = []
        self._overview: list[np.ndarray] = []
        self._render = render
        self._quality = quality
        self._region_px = region_px
        self._progress = progress

    def tiles(self) -> Iterator[bytes]:
        """Encoded tiles of level 0, row by row.

        Everything else is complete once the last tile is out, even if nobody asks for more.
        """
        width, height = self.sizes[0]
        bands = render_bands(
            self._render, width, height, band_px=self._region_px, progress=self._progress
        )
        levels = [_Level(w, h) for w, h in self.sizes]
        with ThreadPoolExecutor(MOST_THREADS) as pool:
            for _, band, labels in bands:
                self._keep_labels(pool, labels)
                smaller = band
                for level, tiles in zip(levels[1:], self.reduced):
                    smaller = shrink(smaller)
                    for rows in level.push(smaller):
                        tiles += self._encode(pool, rows)
                self._overview.append(smaller)
                for rows in levels[0].push(band):
                    yield from self._encode(pool, rows)

    @property
    def overview(self) -> np.ndarray:
        """Pixels (h, w, 3) of the smallest level."""
        width, height = self.sizes[-1]
        return np.concatenate(self._overview)[:height, :width]

    def _encode(self, pool: ThreadPoolExecutor, rows: np.ndarray) -> list[bytes]:
        xs = range(0, rows.shape[1], TILE_PX)
        return list(pool.map(lambda x: jpeg_tile(rows, x, self._quality), xs))

    def _keep_labels(self, pool: ThreadPoolExecutor, labels: np.ndarray) -> None:
        for y in range(0, labels.shape[0], TILE_PX):
            xs = range(0, labels.shape[1], TILE_PX)
            self.label_tiles += pool.map(deflate_tile, [labels[y : y + TILE_PX]] * len(xs), xs)
