"""Whether an image is dark where it is empty, as in fluorescence, or lit from behind."""

from typing import TYPE_CHECKING

import numpy as np

from gigavim.tokens.foreground import DARK_AT_MOST, DARK_SHARE, NO_DATA_AT_MOST, RGB

if TYPE_CHECKING:
    from gigavim.slides.base import Slide

OVERVIEW_PX = 1024
"""A coarsest level of up to so many pixels a side is looked at whole."""
PLACES = 8
PLACE_PX = 64
"""Of a larger one so many places along each axis, so many pixels a side."""

# A nucleus in the deepest hematoxylin lets through more than this of one colour, and this of all.
_LIT_BRIGHTEST = 100
_LIT_DARKEST = 20
_LIT_SHARE = 0.5


def has_dark_background(slide: "Slide") -> bool:
    """Tell fluorescence from brightfield by a sample of the slide's coarsest level.

    A dark background is 30 % of the image or more at 30 of 255 or less. Black that was only filled
    in around a scan is told from it by the rest, which is bright in all colours where a slide was
    lit from behind. What cannot be read, and an image of nothing, have none.
    """
    pixels = _sample(slide)  # (n, 3)
    if not len(pixels):
        return False
    brightest, darkest = pixels.max(axis=1), pixels.min(axis=1)
    seen = brightest > NO_DATA_AT_MOST
    if np.mean(brightest <= DARK_AT_MOST) < DARK_SHARE or not seen.any():
        return False
    lit = (brightest >= _LIT_BRIGHTEST) & (darkest >= _LIT_DARKEST)
    return bool(lit[seen].mean() < _LIT_SHARE)


def _sample(slide: "Slide") -> RGB:
    """Pixels (n, 3) within the bounds, without those that could not be read."""
    index = len(slide.levels) - 1
    level, bounds = slide.levels[index], slide.bounds
    left = int(bounds.x_level0 / level.downsample_x)
    upper = int(bounds.y_level0 / level.downsample_y)
    width = max(int(bounds.width_level0 / level.downsample_x), 1)
    height = max(int(bounds.height_level0 / level.downsample_y), 1)
    if max(width, height) <= OVERVIEW_PX:
        places = [(left, upper, width, height)]
    else:
        size = (min(PLACE_PX, width), min(PLACE_PX, height))
        columns = np.linspace(left, left + width - size[0], PLACES).astype(int).tolist()
        rows = np.linspace(upper, upper + height - size[1], PLACES).astype(int).tolist()
        places = [(column, row, *size) for row in rows for column in columns]
    parts = []
    for place in places:
        pixels, unreadable = slide.read_level_salvage(index, *place)
        filled = (pixels == np.asarray(slide.background_rgb, np.uint8)).all(axis=2)
        usable = ~filled if unreadable is None else ~(filled | unreadable)
        parts.append(pixels[usable])
    return np.concatenate(parts)
