"""The grid of patches over a slide, and which of its cells become tokens."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gigavim.errors import MissingMppError, ResourceError, SettingsError
from gigavim.frames import MapFrame
from gigavim.tokens.order import LARGEST_BLOCK, Cells, ScanOrder, scan_cells

if TYPE_CHECKING:
    from gigavim.slides.base import Slide

Index = npt.NDArray[np.int32 | np.int64]

# A scale this close to a whole number is taken as that number. Files state their mpp no better
# (Aperio's 20x says 0.499), and reading whole pixels is faster and blurs nothing. Positions stay
# exact, since the frame keeps the scale that is used and the mpp that follows from it.
WHOLE_SCALE_TOLERANCE = 0.005

# One byte per cell, in the mask of kept cells alone; also 2,000 times the largest slides of today.
LARGEST_GRID_CELLS = 1 << 34
LARGEST_SCALE = 1000
"""Slide pixels to a map pixel: more is a mistyped resolution, and would read the slide at once."""

# A strip narrower than this share of a map pixel, left by a rounded division, is no pixel.
_NO_PIXEL = 1e-6


@dataclass(frozen=True, slots=True)
class TokenGrid:
    """Overlapping or adjacent patches that cover a map.

    Cell (row, col) covers the map pixels x in [col * stride_px, col * stride_px + patch_px), and y
    likewise by row. The last patches may reach over the map, where they see it mirrored.
    """

    frame: MapFrame
    """The map: the slide's bounds at the model's resolution."""
    patch_px: int
    stride_px: int
    rows: int
    cols: int
    """Multiples of the block's side where the order is one of blocks."""
    order: ScanOrder

    @property
    def scale_xy(self) -> tuple[float, float]:
        """Level-0 pixels per map pixel, along x and y."""
        return self.frame.scale_x, self.frame.scale_y

    @property
    def block(self) -> int:
        """Side, in cells, of what is kept or dropped together; 1 where the order has no blocks."""
        return self.order.block or 1

    def span_px(self, cells: int) -> int:
        """Pixels that so many neighbouring cells cover along an axis."""
        return (cells - 1) * self.stride_px + self.patch_px


@dataclass(frozen=True, slots=True)
class TokenSelection:
    """Which cells of a grid are tokens, and where each stands in the sequence."""

    cells: Cells
    """(L,) int64, flat cell indices row * cols + col in scan order."""
    index: Index
    """(rows, cols), the place in the sequence, -1 where no token; int32 where L fits it."""

    def __len__(self) -> int:
        return len(self.cells)


def make_grid(
    slide: "Slide", *, mpp: float | None, patch_px: int, stride_px: int, order: ScanOrder
) -> TokenGrid:
    """Lay a grid of patches over a slide's bounds at `mpp` micrometres per pixel.

    With `mpp` None the map's pixels are those of level 0, and the slide need not state its mpp (the
    frame's is then nan). Raises `MissingMppError` where the slide has none and one is needed,
    `SettingsError` for sizes that make no sense, `ResourceError` for a grid beyond any machine.
    """
    if patch_px < 1:
        raise SettingsError(f"a patch needs at least one pixel a side, not {patch_px}")
    if not 1 <= stride_px <= patch_px:
        raise SettingsError(
            f"a stride of {stride_px} px does not fit patches of {patch_px} px: use 1 to "
            f"{patch_px}, or some pixels would be seen by no patch"
        )
    frame = _map_frame(slide, mpp)
    block = order.block or 1
    rows = _cells_to_cover(frame.height_px, patch_px, stride_px, block)
    cols = _cells_to_cover(frame.width_px, patch_px, stride_px, block)
    return _checked(slide, TokenGrid(frame, patch_px, stride_px, rows, cols, order))


def make_window_grid(
    slide: "Slide", *, mpp: float | None, patch_px: int, stride_px: int, window_px: int
) -> TokenGrid:
    """Lay a grid over a slide whose blocks are windows of `window_px` a side; otherwise as above.

    Windows share no pixel: each cell is of one window, whose last patches may reach over it.
    """
    side = window_px // stride_px
    if window_px % stride_px or window_px < patch_px or side > LARGEST_BLOCK:
        near = min(LARGEST_BLOCK, max(1, round(window_px / stride_px), -(-patch_px // stride_px)))
        raise SettingsError(
            f"windows of {window_px} px do not fit patches of {patch_px} px every {stride_px} px: "
            f"use a multiple of {stride_px} up to {LARGEST_BLOCK * stride_px:,}, such as "
            f"{near * stride_px}"
        )
    frame = _map_frame(slide, mpp)
    rows, cols = (-(-s // window_px) * side for s in (frame.height_px, frame.width_px))
    order = ScanOrder("blocks", side)
    return _checked(slide, TokenGrid(frame, patch_px, stride_px, rows, cols, order))


def cells_on_map(grid: TokenGrid) -> tuple[int, int]:
    """Rows and columns of the cells that begin on the map; the others only fill blocks."""
    return (
        -(-grid.frame.height_px // grid.stride_px),
        -(-grid.frame.width_px // grid.stride_px),
    )


def _checked(slide: "Slide", grid: TokenGrid) -> TokenGrid:
    cells, frame = grid.rows * grid.cols, grid.frame
    if cells > LARGEST_GRID_CELLS:
        raise ResourceError(
            f"{slide.path}: {frame.width_px:,} x {frame.height_px:,} px at {frame.mpp_x:.4g} µm "
            f"per pixel make {cells:,} patches, beyond the largest grid of "
            f"{LARGEST_GRID_CELLS:,}: check the resolution the file states and the model's"
        )
    return grid


def select_tokens(grid: TokenGrid, kept: npt.NDArray[np.bool_]) -> TokenSelection:
    """Put the kept cells of a grid, (rows, cols) bool, in scan order."""
    if kept.shape != (grid.rows, grid.cols):
        raise ValueError(f"kept is {kept.shape}, the grid ({grid.rows}, {grid.cols})")
    cells = scan_cells(kept, grid.order)
    dtype: type[np.int32 | np.int64] = (
        np.int32 if len(cells) <= np.iinfo(np.int32).max else np.int64
    )
    index = np.full(grid.rows * grid.cols, -1, dtype)
    index[cells] = np.arange(len(cells), dtype=dtype)
    return TokenSelection(cells, index.reshape(grid.rows, grid.cols))


def missing_mpp(path: Path) -> MissingMppError:
    """The error for a slide that does not state its resolution, with the ways to mend it."""
    return MissingMppError(
        f"{path}: the file does not say how many micrometres a pixel covers. Give it with "
        "--slide-mpp VALUE, set slide_mpp in gigavim.toml, or write the resolution into the "
        "file's own metadata"
    )


def _map_frame(slide: "Slide", mpp: float | None) -> MapFrame:
    bounds = slide.bounds
    scale_x = scale_y = 1.0
    if mpp is not None:
        if not (math.isfinite(mpp) and mpp > 0):
            raise SettingsError(f"a resolution of {mpp} µm per pixel makes no sense")
        if slide.mpp is None:
            raise missing_mpp(slide.path)
        scale_x = _scale(mpp / slide.mpp.x)
        scale_y = _scale(mpp / slide.mpp.y)
        if max(scale_x, scale_y) > LARGEST_SCALE:
            raise SettingsError(
                f"{slide.path}: {mpp:g} µm per pixel is over {LARGEST_SCALE:,} times the slide's"
                f" {slide.mpp.x:g} (from {slide.mpp.source}): correct --slide-mpp or --mpp"
            )
    return MapFrame(
        width_px=_pixels_to_cover(bounds.width_level0, scale_x),
        height_px=_pixels_to_cover(bounds.height_level0, scale_y),
        x_level0=bounds.x_level0,
        y_level0=bounds.y_level0,
        scale_x=scale_x,
        scale_y=scale_y,
        mpp_x=slide.mpp.x * scale_x if slide.mpp is not None else math.nan,
        mpp_y=slide.mpp.y * scale_y if slide.mpp is not None else math.nan,
        georeference=slide.georeference,
    )


def _scale(scale: float) -> float:
    whole = round(scale)
    return float(whole) if abs(scale - whole) <= WHOLE_SCALE_TOLERANCE * whole else scale


def _pixels_to_cover(length_level0: int, scale: float) -> int:
    return max(1, math.ceil(length_level0 / scale - _NO_PIXEL))


def _cells_to_cover(length_px: int, patch_px: int, stride_px: int, block: int) -> int:
    cells = 1 + max(0, -(-(length_px - patch_px) // stride_px))
    return -(-cells // block) * block
