"""The reader of everything that OpenSlide knows: MRXS, NDPI, SCN, BIF, CZI, DICOM and the rest."""

import logging
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import openslide

from gigavim.errors import CorruptSlideError, TileReadError, UnsupportedSlideError
from gigavim.frames import Bounds
from gigavim.slides.base import RGB, WHITE, Level, OpenOptions, Slide, level_downsample
from gigavim.slides.handles import ThreadHandles
from gigavim.slides.mpp import choose_mpp, from_properties
from gigavim.slides.source import MIRAX_INDEX, MIRAX_SUFFIX

log = logging.getLogger(__name__)

CACHE_BYTES = 64 << 20

DEFAULT_TILE_PX = 256

DESCRIBED = {
    "vendor": "openslide.vendor",
    "objective power": "openslide.objective-power",
    "comment": "openslide.comment",
}


class OpenSlideSlide(Slide):
    """A slide read by OpenSlide.

    Raises:
        UnsupportedSlideError: if OpenSlide does not know the format.
        CorruptSlideError: if it knows the format and cannot open the file.
    """

    reader = "openslide"

    def __init__(self, path: Path, options: OpenOptions | None = None) -> None:
        self.path = path
        self.options = options or OpenOptions()
        self.georeference = None
        self._target = _dicom_instance(path)
        self._handles = ThreadHandles[openslide.OpenSlide](self._open)
        if self.options.channels is not None:
            raise UnsupportedSlideError(
                f"{path}: OpenSlide gives colours, not channels; leave --channels out"
            )
        try:
            handle = self._handles.get()
            properties = _properties(handle)
            dimensions = handle.level_dimensions
            self.icc = "openslide.icc-size" in properties
        except openslide.OpenSlideUnsupportedFormatError as error:
            raise UnsupportedSlideError(
                f"{path}: is no whole-slide image that OpenSlide reads (of DICOM, only slide "
                "microscopy images are slides: no segmentations, annotations or radiology)"
            ) from error
        except (openslide.OpenSlideError, OSError) as error:
            raise CorruptSlideError(
                f"{path}: OpenSlide cannot open it: {error}; copy or export it again"
            ) from error
        if not dimensions or min(dimensions[0]) < 1:
            raise CorruptSlideError(f"{path}: has no level with pixels")
        self.levels = tuple(
            _level(properties, dimensions, index) for index in range(len(dimensions))
        )
        self.bounds = _bounds(properties, dimensions[0])
        self.background_rgb = _background(properties)
        self.mpp = choose_mpp(path, from_properties(properties), user=self.options.mpp)
        self.description = {
            name: properties[key] for name, key in DESCRIBED.items() if properties.get(key)
        }
        self.description["pixels"] = "RGB, alpha composited on the background"
        if self.icc:
            self.description["icc"] = "present, not applied"

    def _companions(self) -> Iterable[Path]:
        folder = self.path.with_suffix("")
        if self.path.suffix == MIRAX_SUFFIX and (folder / MIRAX_INDEX).is_file():
            return folder, folder / MIRAX_INDEX
        return ()

    def _open(self) -> openslide.OpenSlide:
        handle = openslide.OpenSlide(self._target)
        handle.set_cache(openslide.OpenSlideCache(CACHE_BYTES))
        return handle

    def close(self) -> None:
        """Close every handle."""
        self._handles.close()

    def _read_inside(self, level: int, x: int, y: int, width: int, height: int) -> RGB:
        size = self.levels[level]
        try:
            handle = self._handles.get()
            # OpenSlide takes whole level-0 pixels; the nearest is within half of one.
            downsample = handle.level_downsamples[level]
            location = (round(x * downsample), round(y * downsample))
            image = handle.read_region(location, level, (width, height))
        except (openslide.OpenSlideError, OSError, ValueError, MemoryError) as error:
            # A handle is dead after one error.
            self._handles.drop()
            raise TileReadError(
                f"{self.path}: {width} x {height} px at ({x}, {y}) of level {level} "
                f"({size.width} x {size.height} px) cannot be decoded: {error}"
            ) from error
        return _opaque(np.asarray(image), self.background_rgb)


def _opaque(
    rgba: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], background: tuple[int, ...]
) -> RGB:
    """Composite (h, w, 4) straight alpha on the background."""
    from gigavim.slides.pixels import composite

    rgb, alpha = rgba[..., :3], rgba[..., 3]
    if alpha.min(initial=255) == 255:
        return np.ascontiguousarray(rgb)
    colour = (background[0], background[1], background[2])
    return composite(rgb, alpha.astype(np.float32) / np.float32(255), colour)


def _dicom_instance(path: Path) -> Path:
    """Return the file to give to OpenSlide: of a DICOM folder, one instance stands for all."""
    if not path.is_dir():
        return path
    for item in sorted(path.iterdir()):
        if item.is_file() and openslide.OpenSlide.detect_format(item) == "dicom":
            return item
    raise UnsupportedSlideError(
        f"{path}: is a directory without a DICOM slide or OME-Zarr image in it; give a slide"
    )


def _properties(handle: openslide.OpenSlide) -> dict[str, str]:
    """Return the properties that are text; damaged names and values are left out."""
    properties = {}
    for name in handle.properties:
        with suppress(KeyError, UnicodeDecodeError):
            properties[name] = handle.properties[name]
    return properties


def _level(
    properties: dict[str, str], dimensions: tuple[tuple[int, int], ...], index: int
) -> Level:
    width, height = dimensions[index]
    prefix = f"openslide.level[{index}]"
    return Level(
        width=width,
        height=height,
        downsample_x=level_downsample(dimensions[0][0], width),
        downsample_y=level_downsample(dimensions[0][1], height),
        tile_width=int(properties.get(f"{prefix}.tile-width", DEFAULT_TILE_PX)),
        tile_height=int(properties.get(f"{prefix}.tile-height", DEFAULT_TILE_PX)),
    )


def _bounds(properties: dict[str, str], size: tuple[int, int]) -> Bounds:
    """Return the scanned part; the whole slide where it is not said or makes no sense."""
    try:
        x = int(properties.get("openslide.bounds-x", 0))
        y = int(properties.get("openslide.bounds-y", 0))
        width = int(properties.get("openslide.bounds-width", size[0] - x))
        height = int(properties.get("openslide.bounds-height", size[1] - y))
    except ValueError:
        return Bounds(0, 0, *size)
    if x < 0 or y < 0 or width < 1 or height < 1 or x + width > size[0] or y + height > size[1]:
        log.warning("bounds (%d, %d, %d, %d) do not fit the slide; not used", x, y, width, height)
        return Bounds(0, 0, *size)
    return Bounds(x, y, width, height)


def _background(properties: dict[str, str]) -> tuple[int, int, int]:
    text = properties.get("openslide.background-color", "")
    try:
        red, green, blue = bytes.fromhex(text)
    except ValueError:
        return WHITE
    return red, green, blue
