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
    glass_rgb = _glass(rgb)
    if glass_rgb is not None:
        # The most absorbing channel tells both colour and darkness; pen and ink stay in.
        contrast = np.subtract(glass_rgb, rgb, dtype=np.int16).max(axis=2)
        no_data = rgb.max(axis=2) <= NO_DATA_AT_MOST
        found: Mask = _stands_out(contrast) & ~no_data
        return found
    brightest = rgb.max(axis=2)
    dark = brightest <= DARK_AT_MOST
    if dark.mean() >= DARK_SHARE:
        contrast = brightest.astype(np.int16) - np.int16(np.median(brightest[dark]))
        return _stands_out(contrast)
    return not_background(rgb, background_rgb)


def not_background(rgb: RGB, background_rgb: tuple[int, int, int]) -> Mask:
    """Find what is not exactly the colour that a reader gives to places without data."""
    found: Mask = np.any(rgb != np.asarray(background_rgb, np.uint8), axis=2)
    return found


def drop_specks(mask: Mask, smallest_px: int) -> Mask:
    """Clear connected parts (4 neighbours) of fewer than `smallest_px` pixels."""
    if smallest_px <= 1:
        return mask
    labels, _ = ndimage.label(mask)
    large = np.bincount(labels.ravel()) >= smallest_px
    large[0] = False
    found: Mask = large[labels]
    return found


def fill_holes(mask: Mask, largest_px: int) -> Mask:
    """Set connected gaps of at most `largest_px` pixels that do not reach the picture's border."""
    labels, _ = ndimage.label(~mask)
    small = np.bincount(labels.ravel()) <= largest_px
    for border in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        small[border] = False
    small[0] = False
    filled: Mask = mask | small[labels]
    return filled


def _glass(rgb: RGB) -> npt.NDArray[np.int16] | None:
    """The colour of the glass, a peak among bright and colourless pixels; None if there is none."""
    darkest = rgb.min(axis=2)
    candidates = darkest >= GLASS_AT_LEAST
    candidates &= rgb.max(axis=2) - darkest <= GLASS_COLOR_SPREAD
    bright = rgb[candidates]  # (n, 3)
    if len(bright) < GLASS_SHARE * candidates.size:
        return None
    levels = np.bincount(bright.min(axis=1), minlength=256)
    peak = int(np.convolve(levels, np.ones(GLASS_PEAK_WIDTH), "same").argmax())
    near = np.abs(bright.min(axis=1).astype(np.int16) - peak) <= GLASS_PEAK_WIDTH
    if near.sum() < GLASS_SHARE * candidates.size:
        return None
    color: npt.NDArray[np.int16] = np.median(bright[near], axis=0).astype(np.int16)
    return color


def _stands_out(contrast: npt.NDArray[np.int16]) -> Mask:
    smooth = ndimage.uniform_filter(np.clip(contrast, 0, 255).astype(np.uint8), 3)
    found: Mask = smooth > _threshold(smooth)
    return found


def _threshold(contrast: Grey) -> float:
    otsu = float(threshold_otsu(contrast))  # of an even picture, its one level
    # The noise of the background, from the part of the picture that is surely faint.
    faint = contrast[contrast <= FAINT]
    deviation = 1.4826 * float(np.median(np.abs(faint - np.median(faint)))) if faint.size else 0.0
    return max(FAINTEST, 3 * deviation, min(otsu, FAINT))
