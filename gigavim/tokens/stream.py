"""The pixels of a grid's kept cells, streamed in blocks that are read ahead of their use.

One block is one dask task over the slide's reader, large enough (1,024 to 2,048 pixels a side)
that the cost of a task does not count. The tasks run in order on a pool of threads, so many ahead
and no more: memory is bounded by the blocks read ahead, whatever the slide's size.
"""

import math
import os
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
from dask.delayed import delayed
from dask.local import get_sync

from gigavim.errors import SettingsError
from gigavim.tokens.grid import TokenGrid
from gigavim.tokens.order import ScanOrder, scan_cells

if TYPE_CHECKING:
    from gigavim.slides.base import Slide

Kept = npt.NDArray[np.bool_]
Cell = TypeVar("Cell", bound=np.generic)

_MOST_WORKERS = 16


@dataclass(frozen=True, slots=True)
class CellRect:
    """A rectangle of grid cells."""

    row: int
    col: int
    rows: int
    cols: int

    def of(self, cells: npt.NDArray[Cell]) -> npt.NDArray[Cell]:
        """The rectangle's part of a (grid rows, grid cols) array, as a view."""
        return cells[self.row : self.row + self.rows, self.col : self.col + self.cols]


@dataclass(frozen=True, slots=True, eq=False)
class PatchBlock:
    """The pixels under a rectangle of cells.

    `strips` is (n, (rows - 1) * stride_px + patch_px, ((cols - 1) * stride_px + patch_px) / n, 3)
    uint8 at the grid's resolution: n strips side by side, mirrored where the map ends. There is
    more than one only where patches do not overlap, and each holds whole patches. `unreadable` has
    the height and width of all, True where the file could not be decoded (and `strips` hold
    background); None where all is well.
    """

    row: int
    col: int
    rows: int
    cols: int
    patch_px: int
    stride_px: int
    strips: npt.NDArray[np.uint8]
    unreadable: npt.NDArray[np.bool_] | None

    @property
    def rect(self) -> CellRect:
        """The cells this block holds."""
        return CellRect(self.row, self.col, self.rows, self.cols)

    @property
    def pixels(self) -> npt.NDArray[np.uint8]:
        """The strips as one picture, (height, width, 3)."""
        _, height, _, _ = self.strips.shape
        return self.strips.swapaxes(0, 1).reshape(height, -1, 3)


def stream_blocks(
    slide: "Slide",
    grid: TokenGrid,
    kept: Kept,
    *,
    block_px: int = 2048,
    workers: int | None = None,
    prefetch: int | None = None,
) -> Generator[PatchBlock, None, None]:
    """Yield the blocks that hold kept cells, always in the same order, each read once.

    `kept` is (rows, cols) bool. `block_px` is about the side of a block, in pixels of the slide's
    level that is read. `workers` threads read (default: the CPUs this process may use, at most
    16), and at most `prefetch` blocks (default: one more than the workers) exist beside the one
    that was yielded last. What a reader raises comes out at its block's turn, and the blocks after
    it are dropped; so are they when the generator is closed, which returns when no thread reads
    any more.
    """
    if kept.shape != (grid.rows, grid.cols):
        raise ValueError(f"kept is {kept.shape}, the grid ({grid.rows}, {grid.cols})")
    workers = workers if workers is not None else min(_cpus(), _MOST_WORKERS)
    prefetch = prefetch if prefetch is not None else workers + 1
    for name, value in (("block_px", block_px), ("workers", workers), ("prefetch", prefetch)):
        if value < 1:
            raise SettingsError(f"{name} has to be at least 1, not {value}")
    return _run(delayed_blocks(slide, grid, kept, block_px=block_px), workers, prefetch)


def delayed_blocks(
    slide: "Slide", grid: TokenGrid, kept: Kept, *, block_px: int = 2048
) -> Iterator[Any]:
    """Yield one `dask.delayed` `PatchBlock` per block that holds kept cells, none computed yet."""
    read = delayed(partial(read_block, slide, grid), pure=False, traverse=False)
    for rect in block_rects(slide, grid, kept, block_px=block_px):
        yield read(rect.row, rect.col, rect.rows, rect.cols)


def block_rects(
    slide: "Slide", grid: TokenGrid, kept: Kept, *, block_px: int = 2048
) -> Iterator[CellRect]:
    """Cut the grid into blocks, each trimmed to its kept cells; empty ones are left out.

    The blocks follow the grid's scan order roughly, and neighbours follow each other, so that
    source tiles on their borders are still in the reader's cache and tokens land near each other.
    """
    block_rows, block_cols = _block_cells(slide, grid, block_px)
    across = -(-grid.cols // block_cols)
    every = np.ones((-(-grid.rows // block_rows), across), np.bool_)
    for place in scan_cells(every, _walk(grid.order)):
        row, col = divmod(int(place), across)
        row, col = row * block_rows, col * block_cols
        here = kept[row : row + block_rows, col : col + block_cols]
        if here.any():
            rows = np.flatnonzero(here.any(axis=1))
            cols = np.flatnonzero(here.any(axis=0))
            yield CellRect(
                row + int(rows[0]),
                col + int(cols[0]),
                int(rows[-1] - rows[0]) + 1,
                int(cols[-1] - cols[0]) + 1,
            )


def read_block(
    slide: "Slide", grid: TokenGrid, row: int, col: int, rows: int, cols: int
) -> PatchBlock:
    """Read the pixels under a rectangle of cells; beyond its border the map is mirrored."""
    frame, stride = grid.frame, grid.stride_px
    across = _mirrored(col * stride, grid.span_px(cols), frame.width_px)
    down = _mirrored(row * stride, grid.span_px(rows), frame.height_px)
    x, y = int(across.min()), int(down.min())
    width, height = int(np.ptp(across)) + 1, int(np.ptp(down)) + 1
    strips, unreadable = slide.read_strips(
        frame.x_level0 + x * frame.scale_x,
        frame.y_level0 + y * frame.scale_y,
        width,
        height,
        _strip_px(slide, grid, width),
        scale_xy=grid.scale_xy,
    )
    if (down[-1] - down[0], across[-1] - across[0]) != (len(down) - 1, len(across) - 1):
        whole = strips.swapaxes(0, 1).reshape(height, width, 3)
        strips = whole[(down - y)[:, None], across - x][None]
        if unreadable is not None:
            unreadable = unreadable[(down - y)[:, None], across - x]
    return PatchBlock(row, col, rows, cols, grid.patch_px, stride, strips, unreadable)


def _mirrored(first: int, count: int, size: int) -> npt.NDArray[np.int64]:
    """Places first..first+count-1 along a side, those beyond it mirrored at the border."""
    place = np.arange(first, first + count) % (2 * size)
    return np.minimum(place, 2 * size - 1 - place)


def _strip_px(slide: "Slide", grid: TokenGrid, width_px: int) -> int:
    """The width of the strips a block is read in: that of the file's tiles if patches allow it."""
    tile_px = slide.levels[slide.level_for_scale(grid.scale_xy)].tile_width
    touching = grid.stride_px == grid.patch_px
    fitting = tile_px % grid.stride_px == 0 and width_px % tile_px == 0
    return tile_px if touching and fitting else width_px


def block_patches(block: PatchBlock, kept_rect: Kept) -> npt.NDArray[np.uint8]:
    """Cut a block into patches: (n, patch * patch * 3) uint8, flattened as (row, column, channel).

    `kept_rect` is (block.rows, block.cols) bool; the patches are those of its True cells, row by
    row.
    """
    patch, stride = block.patch_px, block.stride_px
    if kept_rect.shape != (block.rows, block.cols):
        raise ValueError(f"kept is {kept_rect.shape}, the block ({block.rows}, {block.cols})")
    count = len(block.strips)
    strip_step, y_step, x_step, channel_step = block.strips.strides
    patches = np.lib.stride_tricks.as_strided(
        block.strips,
        (block.rows, count, block.cols // count, patch, patch, 3),
        (stride * y_step, strip_step, stride * x_step, y_step, x_step, channel_step),
        writeable=False,
    )
    all_kept = kept_rect.all()
    chosen = patches if all_kept else patches[kept_rect.reshape(block.rows, count, -1)]
    return chosen.reshape(-1, patch * patch * 3)


def _run(tasks: Iterator[Any], workers: int, prefetch: int) -> Generator[PatchBlock, None, None]:
    pool = ThreadPoolExecutor(workers, thread_name_prefix="gigavim-read")
    ahead: deque[Future[PatchBlock]] = deque()

    def start(count: int) -> None:
        ahead.extend(pool.submit(_compute, task) for task in islice(tasks, count))

    try:
        start(prefetch)
        while ahead:
            block = ahead.popleft().result()
            start(1)
            yield block
            del block
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _compute(task: Any) -> PatchBlock:
    # The pool is ours, so that blocks come in order and so many at a time: dask runs each in place,
    # without the preparations of `compute`, which cost a twelfth of the time of reading.
    block: PatchBlock = get_sync(task.__dask_graph__(), task.key)
    return block


def _block_cells(slide: "Slide", grid: TokenGrid, block_px: int) -> tuple[int, int]:
    """Rows and columns of cells per block: whole scan blocks, and source tiles where possible."""
    level = slide.levels[slide.level_for_scale(grid.scale_xy)]
    scale_x, scale_y = grid.scale_xy
    rows = _cells_along(grid, block_px, scale_y / level.downsample_y, level.tile_height)
    cols = _cells_along(grid, block_px, scale_x / level.downsample_x, level.tile_width)
    return rows, cols


def _cells_along(grid: TokenGrid, block_px: int, level_px_per_px: float, tile_px: int) -> int:
    unit_px = grid.block * grid.stride_px
    wanted_px = int(block_px / max(1.0, level_px_per_px))
    step_px = math.lcm(unit_px, tile_px) if level_px_per_px == 1 else unit_px
    if step_px > wanted_px:
        step_px = unit_px
    return max(1, wanted_px // step_px) * step_px // grid.stride_px


def _walk(order: ScanOrder) -> ScanOrder:
    hilbert = order.kind == "hilbert" or order.across == "hilbert"
    return ScanOrder("hilbert" if hilbert else "serpentine")


def _cpus() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        return os.cpu_count() or 1
