"""A first look at a path: what kind of file it is, by its content and not by its name."""

import difflib
import logging
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from gigavim.errors import CorruptSlideError, SlideError, UnsupportedSlideError

log = logging.getLogger(__name__)

Kind = Literal[
    "zarr",
    "dicom",
    "tiff",
    "vendor tiff",
    "damaged tiff",
    "geotiff",
    "jpeg2000",
    "image",
    "georeferenced image",
    "openslide",
    "unknown",
]

HEAD_BYTES = 4096

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
IMAGE_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM")
JPEG2000_MAGIC = (b"\0\0\0\x0cjP  \r\n", b"\xff\x4f\xff\x51")
ZARR_FILES = ("zarr.json", ".zgroup", ".zattrs", ".zarray")
GEO_SIDECARS = (".aux.xml", ".wld", ".jgw", ".pgw", ".bpw", ".jpw", ".tfw")

MIRAX_SUFFIX = ".mrxs"
MIRAX_INDEX = "Slidedat.ini"

GEO_TAGS = frozenset((33550, 33922, 34264, 34735))
VENDOR_SUFFIXES = frozenset((".ndpi", ".scn", ".bif"))
NDPI_TAG = 65420

GUARDED_PAGES = 64

MAX_TILE_PX = 1 << 26

MAX_UNPROVEN_PX = 100_000_000
MAX_PX_PER_BYTE = 20_000
"""More pixels than this to a byte of the file are believed of small images only; blank tiles of the
best codecs reach half of it."""


@dataclass(frozen=True, slots=True)
class Source:
    """A path and what it holds."""

    path: Path
    kind: Kind


def look_at(path: Path) -> Source:
    """Find out what a path holds.

    Raises:
        SlideError: if there is nothing to read: a missing or empty file, a Git LFS pointer, a
            directory that is no slide.
    """
    if not _exists(path):
        raise SlideError(f"{path}: {_why_missing(path)}")
    if path.is_dir():
        return Source(path, _kind_of_directory(path))
    if not path.is_file():
        raise UnsupportedSlideError(f"{path}: is not an ordinary file; copy it to one first")
    if path.suffix.lower() == MIRAX_SUFFIX:
        return Source(path, _kind_of_mirax(path))
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except PermissionError as error:
        raise SlideError(f"{path}: no permission to read it; ask its owner or chmod it") from error
    except OSError as error:
        raise CorruptSlideError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not head:
        raise CorruptSlideError(f"{path}: is empty; copy or download it again")
    if head.startswith(b"version https://git-lfs"):
        raise UnsupportedSlideError(
            f"{path}: is a Git LFS pointer, not the image itself; fetch it with: git lfs pull"
        )
    return Source(path, _kind_of_file(path, head))


def _kind_of_mirax(path: Path) -> Kind:
    """The file itself is a JPEG of the label; the slide is the folder beside it.

    Raises:
        SlideError: if it is not there.
    """
    folder = path.with_suffix("")
    if not _exists(folder / MIRAX_INDEX):
        raise CorruptSlideError(
            f"{path}: a MIRAX slide is this file and the folder {folder.name} beside it, with "
            f"{MIRAX_INDEX} in it, which is missing; copy both"
        )
    if path.suffix != MIRAX_SUFFIX:
        raise UnsupportedSlideError(
            f"{path}: OpenSlide knows MIRAX slides by {MIRAX_SUFFIX} in small letters; rename it"
        )
    return "openslide"


def _kind_of_file(path: Path, head: bytes) -> Kind:
    if head.startswith(TIFF_MAGIC):
        return _kind_of_tiff(path)
    if head.startswith(JPEG2000_MAGIC):
        return "jpeg2000"
    if head.startswith(IMAGE_MAGIC):
        beside = (Path(f"{path}{end}") for end in GEO_SIDECARS)
        instead = (path.with_suffix(end) for end in GEO_SIDECARS if end != ".aux.xml")
        if any(_exists(item) for item in (*beside, *instead)):
            return "georeferenced image"
        return "image"
    if head[128:132] == b"DICM":
        return "dicom"
    return _kind_by_openslide(path)


def _kind_by_openslide(path: Path) -> Kind:
    import openslide

    try:
        vendor = openslide.OpenSlide.detect_format(path)
    except openslide.OpenSlideError:
        vendor = None
    if vendor is None:
        return "unknown"
    return "dicom" if vendor == "dicom" else "openslide"


def _kind_of_tiff(path: Path) -> Kind:
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            for page in islice(tiff.pages, GUARDED_PAGES):
                _refuse_impossible(path, page, tiff.filehandle.size)
            page = tiff.pages.first
            if GEO_TAGS & {tag.code for tag in page.tags} or path.with_suffix(".tfw").exists():
                return "geotiff"
            vendor = tiff.is_ndpi or NDPI_TAG in page.tags or page.is_scn or page.is_bif
            if vendor or page.is_philips or path.suffix.lower() in VENDOR_SUFFIXES:
                return "vendor tiff"
            return "tiff"
    except SlideError:
        raise
    # On damaged headers tifffile raises whatever comes; the direct reader says what it is.
    except Exception as error:
        log.debug("%s: %s", path, error)
        return "damaged tiff"


def _refuse_impossible(path: Path, page: Any, file_bytes: int) -> None:
    """Keep sizes that no file keeps from libraries that end the process when memory runs out."""
    if not hasattr(page, "imagewidth"):
        return
    pixels = page.imagewidth * page.imagelength
    tile_px = page.tilewidth * page.tilelength if page.is_tiled else 0
    too_many = pixels > MAX_UNPROVEN_PX and pixels > MAX_PX_PER_BYTE * file_bytes
    if too_many or tile_px > MAX_TILE_PX:
        tiles = f" in tiles of {page.tilewidth} x {page.tilelength}" if tile_px else ""
        raise CorruptSlideError(
            f"{path}: claims {page.imagewidth} x {page.imagelength} px{tiles} in a file of "
            f"{file_bytes} bytes, which cannot be; export it again"
        )


def _kind_of_directory(path: Path) -> Kind:
    if any((path / name).exists() for name in ZARR_FILES):
        return "zarr"
    if any(_is_dicom(item) for item in sorted(path.iterdir())[:64]):
        return "dicom"
    if _exists(path / MIRAX_INDEX):
        raise UnsupportedSlideError(
            f"{path}: is the data of a MIRAX slide; give {path.name}{MIRAX_SUFFIX} beside it"
        )
    files = [item.name for item in path.iterdir() if item.is_file()]
    shown = f"; it holds {', '.join(sorted(files)[:3])}" if files else ""
    raise UnsupportedSlideError(
        f"{path}: is a directory and no slide (no OME-Zarr, no DICOM){shown}; give one slide, "
        "or a folder of slides to gigavim batch"
    )


def _is_dicom(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a name too long for the file system
        return False


def _why_missing(path: Path) -> str:
    with suppress(OSError):  # no link, or no such name
        return f"is a link to {path.readlink()}, which does not exist; mend the link or fetch it"
    return f"does not exist{_did_you_mean(path)}"


def _did_you_mean(path: Path) -> str:
    try:
        names = [item.name for item in path.parent.iterdir()]
    except OSError:
        return f"; nor does the folder {path.parent}"
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else "; check the path"
