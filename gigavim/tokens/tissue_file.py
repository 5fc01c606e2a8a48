"""Tissue that someone else has outlined: QuPath's GeoJSON, or the image of a mask."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gigavim.errors import SettingsError
from gigavim.frames import Bounds

if TYPE_CHECKING:
    from gigavim.slides.base import Slide

Mask = npt.NDArray[np.bool_]

LARGEST_SIDE_PX = 4096
ASPECT_TOLERANCE = 0.01

_AREAS = ("Polygon", "MultiPolygon")


def mask_from_geojson(path: Path, shape: tuple[int, int], bounds: Bounds) -> Mask:
    """Draw the areas of a GeoJSON file into a mask of `shape` (height, width) over the bounds.

    Coordinates are level-0 pixels from the bounds' top-left corner, which is where QuPath starts to
    count. Every mask pixel that an area touches is set. Lines and points are left out.

    Raises:
        SettingsError: if the file is not GeoJSON, or holds no area.
    """
    import orjson
    from affine import Affine
    from rasterio.features import is_valid_geom, rasterize

    try:
        document = orjson.loads(_content(path))
        areas = [area for area in _geometries(document) if area.get("type") in _AREAS]
        if not areas:
            raise SettingsError(f"{path}: holds no polygon, so no tissue is outlined in it")
        if not all(map(is_valid_geom, areas)):
            raise ValueError("a polygon has no valid coordinates")
        height, width = shape
        scale = Affine.scale(bounds.width_level0 / width, bounds.height_level0 / height)
        drawn = rasterize(areas, shape, transform=scale, all_touched=True, dtype=np.uint8)
    except SettingsError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError) as error:
        raise SettingsError(
            f"{path}: cannot be read as GeoJSON polygons ({error}); export the tissue from QuPath "
            "as GeoJSON, or give a mask image"
        ) from error
    return np.asarray(drawn, np.bool_)


def mask_from_image(path: Path, slide: "Slide") -> tuple[Mask, Bounds]:
    """Read a mask image, and which part of the slide it shows: its bounds, or all of level 0.

    What is not black (and not transparent) is tissue. Large masks are reduced; a reduced pixel is
    tissue where any of its parts is.

    Raises:
        SettingsError: if the file is no image, is too large, or has not the slide's aspect.
    """
    from PIL import Image, UnidentifiedImageError

    _content(path, size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                shown = _part_shown(path, image.size, slide)
                mask = _not_black(image)
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:
        raise SettingsError(
            f"{path}: cannot be read as a mask image ({error}); use PNG or TIFF, or GeoJSON"
        ) from error
    except Image.DecompressionBombError as error:
        raise SettingsError(f"{path}: {error}; a mask at 8 µm per pixel is fine enough") from error
    step = -(-max(mask.shape) // LARGEST_SIDE_PX)
    return _reduced(mask, step), shown


def _content(path: Path, size: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise SettingsError(
            f"{path}: the tissue file cannot be read: {error.strerror or error}; --tissue takes "
            "auto, none, or a GeoJSON or image file"
        ) from error


def _geometries(document: Any) -> list[dict[str, Any]]:
    """The geometries of a FeatureCollection, a Feature, a geometry, or a list of these."""
    found, waiting = [], [document]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting.extend(reversed(item))
        elif not isinstance(item, dict):
            raise ValueError("an object with a type was expected")
        elif item.get("type") == "FeatureCollection":
            waiting.append(item["features"])
        elif item.get("type") == "GeometryCollection":
            waiting.append(item["geometries"])
        elif item.get("type") == "Feature":
            if item.get("geometry") is not None:
                waiting.append(item["geometry"])
        else:
            found.append(item)
    return found


def _part_shown(path: Path, size_wh: tuple[int, int], slide: "Slide") -> Bounds:
    whole = Bounds(0, 0, slide.levels[0].width, slide.levels[0].height)
    for part in (slide.bounds, whole):
        if _same_aspect(size_wh, (part.width_level0, part.height_level0)):
            return part
    wanted = f"{slide.bounds.width_level0} x {slide.bounds.height_level0} px"
    raise SettingsError(
        f"{path}: a mask of {size_wh[0]} x {size_wh[1]} px has not the aspect of "
        f"{slide.path.name}, {wanted}: was it made for another slide, or cropped?"
    )


def _same_aspect(size_wh: tuple[int, int], of_wh: tuple[int, int]) -> bool:
    (width, height), (of_width, of_height) = size_wh, of_wh
    across = height * of_width / of_height
    down = width * of_height / of_width
    rounded = abs(width - across) <= 1 or abs(height - down) <= 1
    return rounded or abs(width / across - 1) <= ASPECT_TOLERANCE


def _not_black(image: Any) -> Mask:
    if image.mode in ("P", "PA", "LA", "La", "RGBa"):
        image = image.convert("RGBA")
    pixels: npt.NDArray[Any] = np.asarray(image)
    if pixels.ndim == 2:
        grey: Mask = pixels != 0
        return grey
    colors = pixels[..., :3] if image.mode == "RGBA" else pixels
    found: Mask = np.any(colors != 0, axis=2)
    if image.mode == "RGBA":
        found &= pixels[..., 3] != 0
    return found


def _reduced(mask: Mask, step: int) -> Mask:
    if step == 1:
        return mask
    rows, cols = np.arange(0, mask.shape[0], step), np.arange(0, mask.shape[1], step)
    by_rows = np.logical_or.reduceat(mask, rows, axis=0)
    found: Mask = np.logical_or.reduceat(by_rows, cols, axis=1)
    return found
