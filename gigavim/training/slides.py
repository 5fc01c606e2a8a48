"""Whole slides as training pictures, with QuPath's GeoJSON or a label image as their masks."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gigavim.errors import SettingsError
from gigavim.training.recipe import IGNORED, Recipe

LARGEST_PX = 1 << 29
"""Of a slide held in memory as one picture, at the resolution that the recipe stores."""


def read_slide(path: Path, recipe: Recipe) -> tuple[NDArray[np.uint8], float]:
    """Read a slide's scanned part (h, w, 3) at the resolution to be stored, and say which.

    The slide's own mpp counts; where it states none, the recipe's `data.mpp` does.

    Raises `SettingsError` where that is too large for one picture, `SlideError` where it cannot be
    read.
    """
    from gigavim.slides import open_slide

    with open_slide(path) as slide:
        own = (slide.mpp.x * slide.mpp.y) ** 0.5 if slide.mpp else recipe.data.mpp
        mpp = max(own, recipe.data.pack_mpp or recipe.model.mpp)
        bounds, scale = slide.bounds, mpp / own
        width, height = (
            max(1, round(side / scale)) for side in (bounds.width_level0, bounds.height_level0)
        )
        if width * height > LARGEST_PX:
            raise SettingsError(
                f"{path}: {width} x {height} px at {mpp:g} um per pixel is more than memory "
                "should hold; set data.pack_mpp coarser, or cut the annotated parts out"
            )
        pixels = slide.read(
            bounds.x_level0, bounds.y_level0, width, height,
            scale_xy=(bounds.width_level0 / width, bounds.height_level0 / height),
        )  # fmt: skip
    return pixels, mpp


def draw_annotations(path: Path, image: Path, shape: tuple[int, int], recipe: Recipe) -> Any:
    """Draw QuPath's annotations (GeoJSON, level-0 pixels from the bounds' corner) as labels (h, w).

    An area is of the class that has its classification's name; later classes of the recipe lie
    over earlier ones. Areas named `data.region` say what was looked at: outside of them nothing is
    labelled. What no area covers is the default class.

    Raises `SettingsError` where the file holds no area of any class, or is no GeoJSON.
    """
    import orjson
    from affine import Affine
    from rasterio.features import rasterize

    from gigavim.slides import open_slide

    with open_slide(image) as slide:
        bounds = slide.bounds
    scale = Affine.scale(bounds.width_level0 / shape[1], bounds.height_level0 / shape[0])
    default = next((i for i, c in enumerate(recipe.classes) if c.is_default), IGNORED)
    labels = np.full(shape, default, np.uint8)
    try:
        areas = _areas(orjson.loads(path.read_bytes()))
        for index, name in enumerate(recipe.class_names):
            own = [geometry for title, geometry in areas if title.lower() == name.lower()]
            if own:
                labels[rasterize(own, shape, transform=scale, dtype=np.uint8) > 0] = index
        regions = [geometry for title, geometry in areas if title == recipe.data.region]
        if regions:
            seen = rasterize(regions, shape, transform=scale, dtype=np.uint8) > 0
            labels[~seen] = IGNORED
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SettingsError(f"{path}: cannot be read as QuPath's GeoJSON ({error})") from error
    named = {title.lower() for title, _ in areas}
    if not named & {name.lower() for name in recipe.class_names}:
        raise SettingsError(
            f"{path}: no area is classified as {', '.join(recipe.class_names)}; its "
            f"classifications are {', '.join(sorted(named)) or 'none'}"
        )
    return labels


def fit_labels(labels: NDArray[Any], shape: tuple[int, int], path: Path) -> NDArray[Any]:
    """Bring a label image of the same part of the slide to the picture's size, by nearest.

    Raises `SettingsError` where its aspect is another.
    """
    height, width = shape
    if abs(labels.shape[1] * height / labels.shape[0] - width) > max(2, 0.01 * width):
        raise SettingsError(
            f"{path}: {labels.shape[1]} x {labels.shape[0]} px has not the aspect of its picture, "
            f"{width} x {height}"
        )
    row, col = (
        (2 * np.arange(new) + 1) * old // (2 * new)
        for new, old in zip(shape, labels.shape[:2], strict=True)
    )
    return np.asarray(labels[row[:, None], col])


def _areas(document: Any) -> list[tuple[str, dict[str, Any]]]:
    """Classification and geometry of every polygon of a FeatureCollection or a list of features."""
    features = document["features"] if isinstance(document, dict) else document
    found = []
    for feature in features:
        geometry = feature["geometry"]
        name = ((feature.get("properties") or {}).get("classification") or {}).get("name", "")
        if geometry and geometry["type"] in ("Polygon", "MultiPolygon"):
            found.append((str(name), geometry))
    return found
