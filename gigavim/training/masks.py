"""Masks of pictures: found beside them, read from any file, and told what they show."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from gigavim.errors import SettingsError
from gigavim.training.recipe import IGNORED, Recipe

SHOWN = 3
"""Files that an error names."""
MOST_VALUES = 1000
"""Distinct values of a mask that are told apart; a mask of more holds no classes."""


def find_mask(image: Path, pattern: str) -> Path | None:
    """The mask of a picture by a pattern from its folder; the picture itself is none."""
    stem = re.sub(r"([*?\[])", r"[\1]", image.stem)  # its brackets and stars mean themselves
    found = sorted(image.parent.glob(pattern.replace("{stem}", stem)))
    mask = next((path for path in found if path.resolve() != image.resolve()), None)
    return None if mask is None else Path(os.path.normpath(mask))


def without_mask(images: Sequence[Path], pattern: str) -> str:
    """Name the pictures that have no mask, "" where all have one."""
    missing = [path.name for path in images if find_mask(path, pattern) is None]
    if not missing:
        return ""
    names = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
    return f"{len(missing)} of {len(images)} pictures have no mask {pattern!r} ({names})"


def open_picture(path: Path) -> Image.Image:
    """Open and decode a picture; raises `SettingsError` where it is none."""
    try:
        picture = Image.open(path)
        picture.load()
    except UnidentifiedImageError:
        raise SettingsError(f"{path}: cannot be read as a picture (of no known format)") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SettingsError(f"{path}: cannot be read as a picture ({error})") from error
    return picture


def read_mask(path: Path, *, colours: bool = False) -> NDArray[Any]:
    """Read integers (h, w) from a label TIFF (16 or 32 bits too) or a picture, or colours.

    Args:
        colours: of a picture with a palette, give its colours and not the numbers of these.

    Returns:
        (h, w) integers, where colours are all grey too, or bool of one bit; else (h, w, 3) uint8.

    Raises:
        SettingsError: it cannot be read, or is no mask.
    """
    if path.suffix.lower() in (".tif", ".tiff"):
        import tifffile

        try:
            mask = np.squeeze(tifffile.imread(path))
        except (OSError, ValueError, tifffile.TiffFileError) as error:
            raise SettingsError(f"{path}: cannot be read as a TIFF ({error})") from error
    else:
        picture = open_picture(path)
        has_palette = picture.mode == "P"
        mask = np.asarray(picture.convert("RGB") if has_palette and colours else picture)
    if mask.ndim == 3 and mask.shape[2] in (2, 3, 4):
        mask = mask[..., : 1 if mask.shape[2] == 2 else 3]
        if (mask == mask[..., :1]).all():
            mask = mask[..., 0]
    is_map = mask.ndim == 2 or (mask.ndim == 3 and mask.shape[2] == 3 and mask.dtype == np.uint8)
    if not is_map or mask.dtype.kind not in "buif":
        raise SettingsError(
            f"{path}: shows {'x'.join(str(n) for n in mask.shape)} values of {mask.dtype}, not one "
            "number or colour a pixel"
        )
    return np.asarray(mask)


def label_map(
    image: NDArray[np.uint8],
    mask: NDArray[Any],
    recipe: Recipe,
    unnamed: "Counter[Any] | None" = None,
) -> NDArray[np.uint8]:
    """Turn a mask (h, w) or (h, w, 3) into label values (h, w).

    Args:
        mask: in masks of one bit the upper value is 255, as programs that show them have it.
        unnamed: takes the pixels of every value or colour that no class names.
    """
    if mask.dtype == np.bool_:
        mask = mask.astype(np.uint8) * 255
    default = next((i for i, c in enumerate(recipe.classes) if c.is_default), IGNORED)
    labels = np.full(mask.shape[:2], default, np.uint8)
    for index, spec in enumerate(recipe.classes):
        if spec.is_empty_glass:
            assert recipe.data.glass is not None
            labels[glass_mask(image, recipe.data.glass)] = index
    named = np.zeros(mask.shape[:2], np.bool_)
    for index, spec in enumerate(recipe.classes):
        if spec.mask_values:
            if mask.ndim == 3:
                raise SettingsError(
                    f"{spec.name}: mask_values are for masks of one channel, this one shows "
                    "colours: name the class's colours as mask_rgb"
                )
            shown = np.isin(mask, spec.mask_values)
            labels[shown] = index
            named |= shown
        for colour in spec.mask_rgb:
            seen = mask if mask.ndim == 3 else np.repeat(mask[..., None], 3, 2)
            shown = (seen == np.array(colour)).all(-1)
            labels[shown] = index
            named |= shown
    if unnamed is not None and not named.all():
        _count(mask[~named], unnamed)
    return labels


def glass_mask(image: NDArray[np.uint8], glass: float) -> NDArray[np.bool_]:
    """Where an H&E picture (h, w, 3) shows empty glass: bright and colourless after smoothing.

    Smoothed by a Gaussian of 3 parts in 320 of the picture's side (about 1 um in a 40x field of
    512 px), the darkest channel is at least 0.88 of the glass and the channels differ by at most
    0.075 of it; specks and holes under 400 such squares (some 45 um2) are dropped. Lumina and fat
    count as background where they are this empty.
    """
    from scipy.ndimage import gaussian_filter
    from skimage.morphology import remove_small_holes, remove_small_objects

    unit = min(image.shape[:2]) / 320
    smooth = gaussian_filter(image.astype(np.float32), (3 * unit, 3 * unit, 0))
    low, high = smooth.min(-1), smooth.max(-1)
    mask = (low >= 0.88 * glass) & (high - low <= 0.075 * glass)
    smallest = round(400 * unit**2)
    mask = remove_small_objects(mask, max_size=smallest)
    return np.asarray(remove_small_holes(mask, max_size=smallest), np.bool_)


def in_words(unnamed: "Counter[Any]") -> str:
    """The commonest values that no class names, with their share of those."""
    total = sum(unnamed.values())
    most = [f"{value} ({count / total:.0%})" for value, count in unnamed.most_common(5)]
    return ", ".join(most) + (", ..." if len(unnamed) > 5 else "")


def _count(values: NDArray[Any], into: "Counter[Any]") -> None:
    """Add up values (n,) or colours (n, 3), as many as classes might have."""
    if values.ndim == 2:
        wide = values.astype(np.int64)
        values = (wide[:, 0] << 16) | (wide[:, 1] << 8) | wide[:, 2]
        found, counts = np.unique(values, return_counts=True)
        names: list[Any] = [(v >> 16, v >> 8 & 255, v & 255) for v in found.tolist()]
    else:
        found, counts = np.unique(values, return_counts=True)
        names = found.tolist()
    most = np.argsort(counts)[::-1][:MOST_VALUES].tolist()
    into.update({names[place]: int(counts[place]) for place in most})
