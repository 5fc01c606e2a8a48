"""What of a small picture of a slide is not its empty background.

Thresholds are Otsu's (skimage) held between limits: it is right where there are two kinds of
pixels, and would halve the tissue of a slide without glass, or find some on an empty one.
"""

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage.filters import threshold_otsu

Mask = npt.NDArray[np.bool_]
RGB = npt.NDArray[np.uint8]
Grey = npt.NDArray[np.uint8]

# All of these are grey levels out of 255, or shares of the picture.
GLASS_AT_LEAST = 170
GLASS_COLOR_SPREAD = 30
GLASS_PEAK_WIDTH = 6
GLASS_SHARE = 0.005
DARK_AT_MOST = 30
DARK_SHARE = 0.3
FAINTEST = 7
"""Contrast below this is taken as dirt or noise, whatever Otsu says."""
FAINT = 16
"""Contrast above this is taken as tissue, whatever Otsu says: fat, pale stains, blood."""
NO_DATA_AT_MOST = 4


def off_glass(rgb: RGB, background_rgb: tuple[int, int, int]) -> Mask:
    """Find what stands out from bright glass, or from the dark of fluorescence.

    `rgb` is (height, width, 3) at some µm per pixel; the answer is (height, width). Where there is
    neither glass nor darkness, all is kept but the plain background that readers fill in.
    """
    darkest, brightest = _channels(np.minimum, rgb), _channels(np.maximum, rgb)
    bright = (darkest >= GLASS_AT_LEAST) & (brightest - darkest <= GLASS_COLOR_SPREAD)
    scanned = not_background(rgb, background_rgb)
    # What readers fill in is not the colour of the glass, unless there is no other.
    glass_rgb = _glass(rgb, darkest, bright & scanned) or _glass(rgb, darkest, bright)
    if glass_rgb is not None:
        # The most absorbing channel tells both colour and darkness; pen and ink stay in.
        glass = np.array(glass_rgb, np.uint8)
        contrast = _channels(np.maximum, glass - np.minimum(rgb, glass))
        return _stands_out(contrast) & (brightest > NO_DATA_AT_MOST)
    dark = brightest <= DARK_AT_MOST
    if dark.mean() >= DARK_SHARE:
        level = np.uint8(np.median(brightest[dark]))
        return _stands_out(np.maximum(brightest, level) - level)
    return scanned


def not_background(rgb: RGB, background_rgb: tuple[int, int, int]) -> Mask:
    """Find what is not exactly the colour that a reader gives to places without data."""
    differs = rgb != np.asarray(background_rgb, np.uint8)
    found: Mask = differs[..., 0] | differs[..., 1] | differs[..., 2]
    return found


def drop_specks(areas: Mask, found: Mask, smallest_px: int) -> Mask:
    """Clear the connected areas (4 neighbours) that hold fewer than `smallest_px` found pixels."""
    labels, count = ndimage.label(areas)
    large = np.bincount(labels[found], minlength=count + 1) >= smallest_px
    large[0] = False
    left: Mask = large[labels]
    return left


def fill_holes(mask: Mask, largest_px: int) -> Mask:
    """Set connected gaps of at most `largest_px` pixels that do not reach the picture's border."""
    labels, _ = ndimage.label(~mask)
    small = np.bincount(labels.ravel()) <= largest_px
    for border in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        small[border] = False
    small[0] = False
    filled: Mask = mask | small[labels]
    return filled


def _channels(reduce: np.ufunc, rgb: RGB) -> Grey:
    """Reduce over the channels, many times faster than numpy does along a short last axis."""
    reduced: Grey = reduce(reduce(rgb[..., 0], rgb[..., 1]), rgb[..., 2])
    return reduced


def _glass(rgb: RGB, darkest: Grey, candidates: Mask) -> tuple[int, int, int] | None:
    """The colour of the glass, a peak among bright and colourless pixels; None if there is none.

    `darkest` is each pixel's least channel.
    """
    levels = np.bincount(darkest[candidates], minlength=256)
    peak = int(np.convolve(levels, np.ones(GLASS_PEAK_WIDTH), "same").argmax())
    near = candidates & (darkest >= peak - GLASS_PEAK_WIDTH)
    near &= darkest <= min(peak + GLASS_PEAK_WIDTH, 255)
    if near.mean() < GLASS_SHARE:
        return None
    red, green, blue = np.median(rgb[near], axis=0)
    return int(red), int(green), int(blue)


def _stands_out(contrast: Grey) -> Mask:
    smooth = ndimage.uniform_filter(contrast, 3)
    found: Mask = smooth > _threshold(smooth)
    return found


def _threshold(contrast: Grey) -> float:
    otsu = float(threshold_otsu(contrast))  # type: ignore[no-untyped-call]
    # The noise of the background, from the part of the picture that is surely faint.
    faint = contrast[contrast <= FAINT]
    deviation = 1.4826 * float(np.median(np.abs(faint - np.median(faint)))) if faint.size else 0.0
    return max(FAINTEST, 3 * deviation, min(otsu, FAINT))
