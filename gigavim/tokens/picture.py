"""A slide's small picture, made of the blocks that are decoded for the tokens anyway.

A slide without a pyramid would have to be decoded once more for it. Each picture pixel is the mean
of its area; what no block covered is read at the end.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gigavim.compiled import compiled
from gigavim.slides.base import LEVEL_SLACK
from gigavim.tokens.grid import TokenGrid
from gigavim.tokens.stream import PatchBlock

if TYPE_CHECKING:
    from gigavim.slides.base import Slide

Picture = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

TILE_PX = 128
"""Side in picture pixels of the pieces in which missing parts are read."""
READERS = 4
COVERED = 0.999
"""Share of a picture pixel's area from which it counts as covered."""
PICTURE_BYTES = 16
"""Memory per picture pixel while blocks arrive."""


class StreamedPicture:
    """(h, w, 3) uint8 of a slide's bounds out of blocks of its grid, the longer side `max_px`.

    Args:
        slide: the slide.
        grid: of the blocks; its pixels are no larger than the picture's.
        max_px: longer side of the picture at most.
    """

    def __init__(self, slide: "Slide", grid: TokenGrid, max_px: int) -> None:
        self._slide, self._grid = slide, grid
        self._height, self._width, self._scale_xy = slide.thumbnail_shape(max_px)
        self._sums = np.zeros((self._height, self._width, 3), np.float32)
        self._weights = np.zeros((self._height, self._width), np.float32)

    def watch(self, blocks: Iterable[PatchBlock]) -> Iterator[PatchBlock]:
        """Pass blocks on, and take what the picture needs of each."""
        for block in blocks:
            self._add(block)
            yield block

    def finish(self) -> Picture:
        """The picture; parts that no block covered are read from the slide."""
        picture = np.empty(self._sums.shape, np.uint8)
        missing = np.empty(self._weights.shape, np.bool_)
        _round(self._sums, self._weights, picture, missing)
        corners = [
            (x, y)
            for y in range(0, self._height, TILE_PX)
            for x in range(0, self._width, TILE_PX)
            if missing[y : y + TILE_PX, x : x + TILE_PX].any()
        ]
        with ThreadPoolExecutor(READERS, thread_name_prefix="gigavim-picture") as pool:
            for _ in pool.map(lambda corner: self._read(picture, missing, *corner), corners):
                pass
        return picture

    def _add(self, block: PatchBlock) -> None:
        grid, frame = self._grid, self._grid.frame
        rows = _own_px(block.row, block.rows, grid.rows, grid.stride_px, frame.height_px)
        cols = _own_px(block.col, block.cols, grid.cols, grid.stride_px, frame.width_px)
        if not rows or not cols:  # a block of cells beyond the map
            return
        pixels = np.ascontiguousarray(block.pixels[: len(rows), : len(cols)])
        bounds = self._slide.bounds
        y, share_y = _places(rows, frame.y_level0 - bounds.y_level0, frame.scale_y,
                             self._scale_xy[1], self._height)  # fmt: skip
        x, share_x = _places(cols, frame.x_level0 - bounds.x_level0, frame.scale_x,
                             self._scale_xy[0], self._width)  # fmt: skip
        _pool(pixels.reshape(len(pixels), -1), y, share_y, x, share_x, self._sums, self._weights)

    def _read(self, picture: Picture, missing: npt.NDArray[np.bool_], x: int, y: int) -> None:
        """Fill the missing pixels of the tile whose corner is (x, y)."""
        tile = slice(y, y + TILE_PX), slice(x, x + TILE_PX)
        row, col = np.nonzero(missing[tile])
        top, left = int(row.min()), int(col.min())
        bounds, (scale_x, scale_y) = self._slide.bounds, self._scale_xy
        read, _ = self._slide.read_salvage(
            bounds.x_level0 + (x + left) * scale_x,
            bounds.y_level0 + (y + top) * scale_y,
            int(col.max()) - left + 1,
            int(row.max()) - top + 1,
            scale_xy=self._scale_xy,
        )
        picture[tile][row, col] = read[row - top, col - left]


def streamed_picture(slide: "Slide", grid: TokenGrid, max_px: int) -> StreamedPicture | None:
    """A picture to make of the grid's blocks; None where the slide has a small level to read."""
    _, _, scale_xy = slide.thumbnail_shape(max_px)
    finer = all(
        own <= wanted * LEVEL_SLACK for own, wanted in zip(grid.scale_xy, scale_xy, strict=True)
    )
    if not finer or slide.level_for_scale(scale_xy) != slide.level_for_scale(grid.scale_xy):
        return None
    return StreamedPicture(slide, grid, max_px)


def _own_px(first: int, count: int, cells: int, stride_px: int, map_px: int) -> range:
    """Map pixels along an axis that no other block of a run of cells has."""
    end = map_px if first + count == cells else min((first + count) * stride_px, map_px)
    return range(first * stride_px, end)


def _places(
    pixels: range, origin_level0: float, map_scale: float, scale: float, count: int
) -> tuple[npt.NDArray[np.int64], Floats]:
    """In which picture pixel each map pixel begins, and (n, 2) the areas it has of it and the next.

    Areas are along one axis, in picture pixels; 0 beyond the picture.
    """
    step = map_scale / scale
    edges = (origin_level0 + np.arange(pixels.start, pixels.stop + 1) * map_scale) / scale
    edges = np.clip(edges, 0, count)
    first = np.minimum(edges[:-1].astype(np.int64), count - 1)
    inner = np.minimum(edges[1:], first + 1)
    shares = np.stack([inner - edges[:-1], edges[1:] - inner], 1)
    shares[shares < step * 1e-6] = 0
    return first, shares.astype(np.float32)


@compiled
def _round(sums: Floats, weights: Floats, picture: Picture, missing: npt.NDArray[np.bool_]) -> None:
    """Means out of sums, and where there are none."""
    for y in range(sums.shape[0]):
        for x in range(sums.shape[1]):
            missing[y, x] = weights[y, x] < COVERED
            if not missing[y, x]:
                for channel in range(3):
                    mean = sums[y, x, channel] / weights[y, x]
                    picture[y, x, channel] = np.uint8(mean + np.float32(0.5))


@compiled
def _pool(
    pixels: Picture,
    y: npt.NDArray[np.int64],
    share_y: Floats,
    x: npt.NDArray[np.int64],
    share_x: Floats,
    sums: Floats,
    weights: Floats,
) -> None:
    """Add (h, w * 3) pixels to the (H, W, 3) sums and (H, W) weights of the picture."""
    row = np.zeros(pixels.shape[1], np.float32)
    depth, at = np.float32(0), y[0]
    for i in range(len(y)):
        if y[i] != at:
            _spread(row, depth, x, share_x, sums[at], weights[at])
            row[:] = 0
            depth, at = np.float32(0), y[i]
        for k in range(len(row)):
            row[k] += share_y[i, 0] * np.float32(pixels[i, k])
        depth += share_y[i, 0]
        if share_y[i, 1] > 0:
            _spread(row, depth, x, share_x, sums[at], weights[at])
            for k in range(len(row)):
                row[k] = share_y[i, 1] * np.float32(pixels[i, k])
            depth, at = share_y[i, 1], at + 1
    if depth > 0:
        _spread(row, depth, x, share_x, sums[at], weights[at])


@compiled
def _spread(
    row: Floats, depth: float, x: npt.NDArray[np.int64], share_x: Floats, sums: Floats,
    weights: Floats,
) -> None:  # fmt: skip
    """Add a row of map pixels, already weighted along y, to a row of the picture."""
    for j in range(len(x)):
        place = x[j]
        for part in range(2):
            share = share_x[j, part]
            if share > 0:
                weights[place + part] += share * depth
                sums[place + part, 0] += share * row[3 * j]
                sums[place + part, 1] += share * row[3 * j + 1]
                sums[place + part, 2] += share * row[3 * j + 2]
