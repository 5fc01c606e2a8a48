"""Which reader opens what: one ordered table, and the order of trying for each kind of file."""

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from gigavim.errors import (
    CorruptSlideError,
    GigavimError,
    SlideError,
    TileReadError,
    UnsupportedSlideError,
)
from gigavim.slides.base import OpenOptions, Slide
from gigavim.slides.pixels import NotAPictureError
from gigavim.slides.source import Source, look_at

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reader:
    """A way to open slides."""

    target: str
    """The class, as "module:name"; imported when first needed."""
    rank: Callable[[Source], int]
    """How early to try this reader on a file: 1 first, 0 never."""

    def open(self, path: Path, options: OpenOptions) -> Slide:
        """Open the slide with this reader."""
        module, name = self.target.split(":")
        opener = cast(type[Slide], getattr(importlib.import_module(module), name))
        return opener(path, options)  # type: ignore[call-arg]


READERS: dict[str, Reader] = {
    "zarr": Reader(
        "gigavim.slides.omezarr:ZarrSlide",
        lambda source: int(source.kind == "zarr"),
    ),
    "rasterio": Reader(
        "gigavim.slides.raster:RasterSlide",
        lambda source: {"geotiff": 1, "jpeg2000": 1, "georeferenced image": 1, "tiff": 4}.get(
            source.kind, 0
        ),
    ),
    "tiff": Reader(
        "gigavim.slides.tiff:TiffSlide",
        lambda source: {"tiff": 1, "damaged tiff": 1, "geotiff": 2, "vendor tiff": 2}.get(
            source.kind, 0
        ),
    ),
    "openslide": Reader(
        "gigavim.slides.openslide_reader:OpenSlideSlide",
        lambda source: {"openslide": 1, "vendor tiff": 1, "tiff": 2, "dicom": 1}.get(
            source.kind, 0
        ),
    ),
    "image": Reader(
        "gigavim.slides.image:ImageSlide",
        lambda source: {"image": 1, "georeferenced image": 2, "damaged tiff": 2, "tiff": 3}.get(
            source.kind, 0
        ),
    ),
}


PROBES = 3
"""Places along each axis at which a newly opened slide is tried."""


def open_with_registry(path: Path, options: OpenOptions) -> Slide:
    """Open a slide with the first reader that can.

    Raises:
        SlideError: with the first reader's reason, if none can.
    """
    source = look_at(path)
    ranked = [(reader.rank(source), name) for name, reader in READERS.items()]
    names = [name for rank, name in sorted(item for item in ranked if item[0] > 0)]
    failures: list[GigavimError] = []
    for name in names:
        try:
            slide = READERS[name].open(path, options)
            _prove(slide)
        except NotAPictureError:
            raise
        except SlideError as error:
            log.debug("reader %s: %s", name, error)
            failures.append(error)
            continue
        except OSError as error:
            raise CorruptSlideError(f"{path}: cannot be read: {error.strerror or error}") from error
        if failures:
            log.warning("%s; read by %s instead", failures[0], name)
        log.info("%s: read by %s", path, name)
        return slide
    if failures:
        raise failures[0]
    raise UnsupportedSlideError(
        f"{path}: is of no format that gigavim reads (whole-slide formats, TIFF, OME-Zarr, "
        "GeoTIFF, DICOM, PNG, JPEG); check the file"
    )


def _prove(slide: Slide) -> None:
    """Read single pixels all over the coarsest level: headers open, pixels are what counts.

    Raises:
        CorruptSlideError: if not one can be read.
    """
    index = len(slide.levels) - 1
    level = slide.levels[index]
    failure: TileReadError | None = None
    for row in range(PROBES):
        for column in range(PROBES):
            x = column * (level.width - 1) // (PROBES - 1)
            y = row * (level.height - 1) // (PROBES - 1)
            try:
                slide.read_level(index, x, y, 1, 1)
                return
            except TileReadError as error:
                failure = failure or error
    slide.close()
    raise CorruptSlideError(f"{failure}; nor can the rest, copy or export it again")
