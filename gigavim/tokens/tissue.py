"""Which part of a slide is worth a look: a low-resolution mask, and the grid cells that touch it.

The mask only saves time. It is therefore generous: what it drops is never seen by the model, what
it keeps too much costs a moment, since time grows with the number of tokens and no faster.
"""

import logging
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from gigavim.frames import Bounds, MapFrame
from gigavim.tokens.foreground import Mask, drop_specks, fill_holes, not_background, off_glass
from gigavim.tokens.grid import TokenGrid
from gigavim.tokens.tissue_file import mask_from_geojson, mask_from_image

if TYPE_CHECKING:
    from gigavim.slides.base import Slide

log = logging.getLogger(__name__)

MASK_UM_PER_PX = 8.0
FINEST_SIDE_PX = 1024
"""A small slide's mask has up to so many pixels a side, finer than 8 µm where the slide is."""
LARGEST_SIDE_PX = 3072

DILATION_UM = 48.0
"""A patch's width at usual resolutions."""
CLOSING_UM = 96.0
"""Gaps of up to twice this are closed: between the septa of fat, between loose fibres."""
SMALLEST_SPECK_UM2 = 200.0
"""A large cell. Found pixels are counted together where widening joins them."""
LARGEST_FILLED_HOLE_UM2 = 250_000.0

# Where lengths are unknown or not those of tissue, they are taken in pixels of the mask.
_DILATION_PX = 4
_LARGEST_FILLED_HOLE_PX = 256
_SMALLEST_SPECK_PX = 10
# In an image a few cells wide, a speck is measured by the image.
_SPECK_SHARE = 1e-3

_STRIP_PX = 256
_ROWS_AT_ONCE = 64
_READERS = 4

# Below this share of its area a patch does not touch: what rounding leaves of an edge that meets.
_TOUCHING = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class TissueMask:
    """A low-resolution mask and where it lies; outside of it nothing is tissue."""

    mask: Mask
    """(height, width) bool."""
    frame: MapFrame
    """Of the mask's pixels, which need not be square."""
    source: str
    """"auto", "none", or the path of the file it came from."""

    @property
    def share(self) -> float:
        """The share of the mask's area that is tissue."""
        return float(self.mask.mean())


def tissue_mask(slide: "Slide", *, mode: str | Path = "auto") -> TissueMask:
    """Find what of a slide to look at.

    `mode` is "auto" (tissue on glass or in the dark, found at about 8 µm per pixel and widened by
    48 µm; of rasters on Earth and of images of unknown resolution, all that is not plain
    background), "none" (everything), or a file: QuPath's GeoJSON in level-0 pixels from the
    bounds' corner, as QuPath shows the slide, or an image of the slide's aspect that is not black
    where there is tissue. A file is taken as it is. Raises `SettingsError` for a file that cannot
    be used; an empty mask is an answer.
    """
    if isinstance(mode, str) and mode in ("auto", "none"):
        found = _found(slide) if mode == "auto" else np.ones((1, 1), np.bool_)
        tissue = TissueMask(found, _mask_frame(slide, slide.bounds, *found.shape), mode)
    else:
        tissue = _from_file(slide, Path(mode))
    log.info("tissue (%s): %.1f %% of %s", tissue.source, 100 * tissue.share, slide.path)
    return tissue


def kept_cells(grid: TokenGrid, tissue: TissueMask, *, min_tissue: float = 0.0) -> Mask:
    """Find the cells of which `min_tissue` (0 to 1), and something, is tissue: (rows, cols) bool.

    The share is by area, exact whatever the resolutions, and of the part of the patch that lies on
    the map. With an order of blocks a block is kept whole as soon as one of its cells is.
    """
    frame, of = grid.frame, tissue.frame
    to_mask_y = ((frame.y_level0 - of.y_level0) / of.scale_y, frame.scale_y / of.scale_y)
    to_mask_x = ((frame.x_level0 - of.x_level0) / of.scale_x, frame.scale_x / of.scale_x)
    upper, lower = _edges(grid, grid.rows, frame.height_px, to_mask_y, of.height_px)
    left, right = _edges(grid, grid.cols, frame.width_px, to_mask_x, of.width_px)
    sums = np.zeros((of.height_px + 1, of.width_px + 1), np.int32)
    np.cumsum(tissue.mask, axis=0, out=sums[1:, 1:])
    np.cumsum(sums[1:, 1:], axis=1, out=sums[1:, 1:])
    kept = np.empty((grid.rows, grid.cols), np.bool_)
    for start in range(0, grid.rows, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        bands = _interpolate(sums, lower[rows]) - _interpolate(sums, upper[rows])
        area = _interpolate(bands.T, right) - _interpolate(bands.T, left)  # (cols, rows)
        full = (right - left)[:, None] * (lower - upper)[rows]
        kept[rows] = (area > full * max(min_tissue - _TOUCHING, _TOUCHING)).T
    if grid.block > 1:
        kept = _whole_blocks(kept, grid.block)
    return kept


def _found(slide: "Slide") -> Mask:
    """The mask of mode "auto", over the slide's bounds."""
    overview, unreadable = _overview(slide)
    height, width = unreadable.shape
    um_y = um_x = math.inf
    if slide.georeference is None and slide.mpp is not None:
        um_y = slide.mpp.y * slide.bounds.height_level0 / height
        um_x = slide.mpp.x * slide.bounds.width_level0 / width
        found = off_glass(overview, slide.background_rgb)
        dilation_yx = _pixels(DILATION_UM, um_y, height), _pixels(DILATION_UM, um_x, width)
        closing_yx = _pixels(CLOSING_UM, um_y, height), _pixels(CLOSING_UM, um_x, width)
        hole_px = int(LARGEST_FILLED_HOLE_UM2 / (um_x * um_y))
    else:
        found = not_background(overview, slide.background_rgb)
        dilation_yx, closing_yx = (_DILATION_PX, _DILATION_PX), (0, 0)
        hole_px = _LARGEST_FILLED_HOLE_PX
    speck_px = max(_SMALLEST_SPECK_PX, int(SMALLEST_SPECK_UM2 / (um_x * um_y)))
    speck_px = min(speck_px, int(height * width * _SPECK_SHARE))
    wide = drop_specks(_widened(found, dilation_yx, closing_yx), found, speck_px)
    # Unreadable pixels stay in, so that they are met again, counted and reported.
    return fill_holes(wide, hole_px) | unreadable


def _pixels(length_um: float, um_per_px: float, most: int) -> int:
    return min(math.ceil(length_um / um_per_px), most)


def _widened(mask: Mask, dilation_yx: tuple[int, int], closing_yx: tuple[int, int]) -> Mask:
    """Dilate, and close gaps of up to twice `closing_yx`, both by squares, in pixels."""
    beyond = [(closing, closing) for closing in closing_yx]  # or closing would stick to the border
    sides = [2 * (d + c) + 1 for d, c in zip(dilation_yx, closing_yx)]
    wide = ndimage.maximum_filter(np.pad(mask, beyond), sides, mode="constant")
    wide = ndimage.minimum_filter(wide, [2 * closing + 1 for closing in closing_yx])
    closed: Mask = wide[tuple(slice(c, c + size) for c, size in zip(closing_yx, mask.shape))]
    return closed


def _overview_shape(slide: "Slide") -> tuple[int, int]:
    """Height and width of a mask over the bounds."""
    bounds = slide.bounds
    longer = max(bounds.width_level0, bounds.height_level0)
    wanted = float(LARGEST_SIDE_PX)
    if slide.mpp is not None and slide.georeference is None:
        wanted = longer * max(slide.mpp.x, slide.mpp.y) / MASK_UM_PER_PX
    share = min(1.0, min(max(FINEST_SIDE_PX, wanted), LARGEST_SIDE_PX) / longer)
    height, width = bounds.height_level0 * share, bounds.width_level0 * share
    return max(1, round(height)), max(1, round(width))


def _overview(slide: "Slide") -> tuple[npt.NDArray[np.uint8], Mask]:
    """Read the bounds small: (height, width, 3), and (height, width) True where unreadable."""
    bounds = slide.bounds
    height, width = _overview_shape(slide)
    scale_xy = (bounds.width_level0 / width, bounds.height_level0 / height)
    overview = np.empty((height, width, 3), np.uint8)
    unreadable = np.zeros((height, width), np.bool_)

    def read(y: int) -> None:
        rows = slice(y, min(y + _STRIP_PX, height))
        y_level0 = bounds.y_level0 + y * scale_xy[1]
        pixels, bad = slide.read_salvage(
            bounds.x_level0, y_level0, width, rows.stop - y, scale_xy=scale_xy
        )
        overview[rows] = pixels
        if bad is not None:
            unreadable[rows] = bad

    with ThreadPoolExecutor(_READERS, thread_name_prefix="gigavim-tissue") as pool:
        list(pool.map(read, range(0, height, _STRIP_PX)))
    return overview, unreadable


def _from_file(slide: "Slide", path: Path) -> TissueMask:
    if path.suffix.lower() in (".geojson", ".json"):
        shape = _overview_shape(slide)
        mask = mask_from_geojson(path, shape, slide.bounds)
        return TissueMask(mask, _mask_frame(slide, slide.bounds, *shape), str(path))
    mask, bounds = mask_from_image(path, slide)
    return TissueMask(mask, _mask_frame(slide, bounds, *mask.shape), str(path))


def _mask_frame(slide: "Slide", bounds: Bounds, height: int, width: int) -> MapFrame:
    scale_x, scale_y = bounds.width_level0 / width, bounds.height_level0 / height
    return MapFrame(
        width_px=width,
        height_px=height,
        x_level0=bounds.x_level0,
        y_level0=bounds.y_level0,
        scale_x=scale_x,
        scale_y=scale_y,
        mpp_x=slide.mpp.x * scale_x if slide.mpp is not None else math.nan,
        mpp_y=slide.mpp.y * scale_y if slide.mpp is not None else math.nan,
        georeference=slide.georeference,
    )


def _edges(
    grid: TokenGrid, cells: int, length_px: int, to_mask: tuple[float, float], mask_px: int
) -> npt.NDArray[np.float64]:
    """Where patches start and stop along an axis, in mask pixels, cut where map or mask end.

    `to_mask` is the mask pixel at which the map starts, and mask pixels per map pixel. The answer
    is (2, cells).
    """
    start = np.arange(cells, dtype=np.int64) * grid.stride_px
    edges = np.minimum(np.stack([start, start + grid.patch_px]), length_px)
    return np.clip(to_mask[0] + edges * to_mask[1], 0, mask_px)


def _interpolate(
    sums: npt.NDArray[Any], positions: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Rows of a table of running sums at fractional positions: (len(positions), columns)."""
    whole = np.minimum(positions.astype(np.int64), len(sums) - 2)
    below = sums[whole].astype(np.float64)
    below += (positions - whole)[:, None] * (sums[whole + 1] - sums[whole])
    return below


def _whole_blocks(kept: Mask, block: int) -> Mask:
    rows, cols = kept.shape
    blocks = kept.reshape(rows // block, block, cols // block, block).any(axis=(1, 3))
    return np.repeat(np.repeat(blocks, block, axis=0), block, axis=1)
