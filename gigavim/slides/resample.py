"""Exact resampling of a region, independent of how the slide is cut into regions.

Pillow's antialiased `resize` takes a box with fractional edges. Reduction uses its Hamming window
and enlargement its bilinear one: both are continuous, so that rounding of a box's edge cannot flip
a source pixel in or out (a box filter's would), and neither overshoots.
"""

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = TypeVar("Pixels", bound=npt.NDArray[np.uint8])

EXACT = 1e-7
"""Deviation of a scale from 1, or of an offset from a whole pixel, that is rounding error."""


@dataclass(frozen=True, slots=True)
class SourceWindow:
    """The level pixels that a run of output pixels needs along one axis."""

    first: int
    count: int
    box: tuple[float, float]
    """Where the output run begins and ends, in pixels from `first`."""
    exact: bool
    """Whether output pixels are level pixels, one to one."""

    @property
    def filter(self) -> Image.Resampling:
        """The filter for this axis."""
        reduces = self.box[1] - self.box[0] > 0 and self.scale > 1 + EXACT
        return Image.Resampling.HAMMING if reduces else Image.Resampling.BILINEAR

    scale: float
    """Level pixels per output pixel."""


def source_window(start_level0: float, scale: float, downsample: float, count: int) -> SourceWindow:
    """Find the level pixels, margins included, for `count` output pixels from `start_level0`.

    Args:
        start_level0: the left (upper) edge of the first output pixel.
        scale: level-0 pixels per output pixel.
        downsample: level-0 pixels per level pixel.
        count: output pixels.
    """
    begin = start_level0 / downsample
    step = scale / downsample
    whole = round(begin)
    if abs(step - 1) < EXACT and abs(begin - whole) < EXACT * max(1.0, abs(begin)):
        return SourceWindow(whole, count, (0.0, float(count)), True, 1.0)
    margin = math.ceil(max(step, 1.0)) + 1
    first = math.floor(begin) - margin
    last = math.ceil(begin + count * step) + margin
    box = (begin - first, begin - first + count * step)
    return SourceWindow(first, last - first, box, False, step)


def resample(
    pixels: Pixels, across: SourceWindow, down: SourceWindow, width: int, height: int
) -> Pixels:
    """Resample the window `across` x `down` of a level to (height, width, ...).

    Args:
        pixels: (down.count, across.count, 3) or (down.count, across.count).
        across: the window along x.
        down: the window along y.
        width: output pixels along x.
        height: output pixels along y.
    """
    image = Image.fromarray(pixels)
    (left, right), (top, bottom) = across.box, down.box
    if across.filter == down.filter:
        image = image.resize((width, height), across.filter, box=(left, top, right, bottom))
    else:
        image = image.resize((width, down.count), across.filter, box=(left, 0, right, down.count))
        image = image.resize((width, height), down.filter, box=(0, top, width, bottom))
    return np.asarray(image)  # type: ignore[return-value]
