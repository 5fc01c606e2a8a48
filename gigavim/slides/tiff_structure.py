"""What a TIFF holds, found out with tifffile and then distrusted.

Nothing here reads pixels. Sizes and tables are checked against each other and against the file's
size, so that the decoder never meets a claim that the file cannot keep.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile

from gigavim.errors import CorruptSlideError, SlideError, UnsupportedSlideError
from gigavim.slides.pixels import SampleLayout
from gigavim.slides.tiff_layout import layout_of

log = logging.getLogger(__name__)

MAX_SEGMENT_BYTES = 1 << 30
"""A tile or strip that decodes to more than this is refused."""

SAFE_SEGMENT_BYTES = 64 << 20
MAX_COMPRESSION_RATIO = 4000
"""Segments above SAFE_SEGMENT_BYTES must hold at least this fraction of what they decode to."""

RAW_STRIP_BYTES = 1 << 20
"""Uncompressed images of one huge strip are read in pieces of about this size."""

MOST_MISSING = 100
"""An uncompressed image is refused if its pixels take this many times the file's size."""

AUXILIARY = ("label", "macro", "thumbnail", "overview", "map")

WORST_FACTOR = 1.5
"""A level whose two axes are reduced by factors further apart than this is another image."""


@dataclass(frozen=True, slots=True)
class Plane:
    """One table of segments (tiles or strips); several planes give the bands of a level."""

    page: Any
    """tifffile's TiffPage, whose `decode` understands the segments."""
    offsets: npt.NDArray[np.int64]
    byte_counts: npt.NDArray[np.int64]
    first_index: int
    """The index of the first segment in the page's own table, which `decode` wants."""


@dataclass(frozen=True, slots=True)
class TiffLevel:
    """One resolution: segments in raster order, `columns` to a row."""

    width: int
    height: int
    segment_width: int
    segment_height: int
    columns: int
    rows: int
    planes: tuple[Plane, ...]
    raw_dtype: np.dtype[np.generic] | None
    """Set where segments are plain samples, of this byte order, to be read without a decoder."""


@dataclass(frozen=True, slots=True)
class TiffStructure:
    """A picture in a TIFF, with its levels, finest first."""

    levels: tuple[TiffLevel, ...]
    layout: SampleLayout
    bands_per_plane: int
    kind: str
    """tifffile's name of the dialect: "svs", "ome", "qpi", "generic" and so on."""
    axes: str
    missing_is_empty: bool
    """Whether a segment of no bytes means "nothing here" and not "lost"."""


def parse(path: Path, tiff: tifffile.TiffFile, *, choosing: bool) -> TiffStructure:
    """Find the picture in a TIFF.

    Args:
        path: the file, for messages.
        tiff: the open file.
        choosing: whether the user chose channels, so that a palette is a channel's display colour.

    Raises:
        CorruptSlideError: if what the file claims cannot be.
        UnsupportedSlideError: if it is of a kind that is not read here.
    """
    try:
        series = _main_series(path, tiff)
        axes, shape = _normal_axes(series)
        channels = shape[axes.index("C")] if "C" in axes else 1
        levels: list[TiffLevel] = []
        for index, part in enumerate(series.levels):
            try:
                level = _level(path, tiff, part, axes, channels)
                if levels and not _is_reduction(levels[0], level, levels[-1]):
                    continue
                levels.append(level)
            except SlideError as error:
                if index == 0:
                    raise
                log.warning("level %d left out: %s", index, error)
        page = levels[0].planes[0].page
        layout = layout_of(page, channels, channels_shown=choosing or channels > 1)
        return TiffStructure(
            levels=tuple(levels),
            layout=layout,
            bands_per_plane=layout.bands // len(levels[0].planes),
            kind=series.kind,
            axes=series.axes,
            missing_is_empty=series.kind != "svs" and bool(page.is_tiled),
        )
    except SlideError:
        raise
    # tifffile's own checks stop at its own needs: on damaged tags it raises whatever comes.
    except Exception as error:
        raise CorruptSlideError(
            f"{path}: is a damaged TIFF ({type(error).__name__}: {error}); export it again"
        ) from error


def _main_series(path: Path, tiff: tifffile.TiffFile) -> Any:
    series = [
        one
        for one in tiff.series
        if {"Y", "X"} <= set(one.axes) and one.name.strip().lower() not in AUXILIARY
    ]
    if not series:
        raise CorruptSlideError(f"{path}: is a TIFF without any image; export it again")

    def area(one: Any) -> int:
        size = dict(zip(one.axes, one.shape))
        return int(size["Y"]) * int(size["X"])

    return max(series, key=area)


def _normal_axes(series: Any) -> tuple[str, tuple[int, ...]]:
    """Return axes and shape with the samples' axis, if any, dropped."""
    page_axes = series.keyframe.axes
    axes, shape = series.axes, series.shape
    leading = len(axes) - len(page_axes)
    if leading < 0 or axes[leading:] != page_axes:
        kept = [(axis, size) for axis, size in zip(axes, shape) if axis not in "YXS"]
    else:
        kept = list(zip(axes[:leading], shape[:leading]))
    return "".join(axis for axis, _ in kept), tuple(size for _, size in kept)


def _level(path: Path, tiff: Any, series: Any, leading: str, channels: int) -> TiffLevel:
    keyframe = series.keyframe
    _check_page(path, keyframe)
    tiled = bool(keyframe.is_tiled)
    width, height = int(keyframe.imagewidth), int(keyframe.imagelength)
    wide = int(keyframe.tilewidth) if tiled else width
    high = int(keyframe.tilelength) if tiled else min(int(keyframe.rowsperstrip), height)
    if wide < 1 or high < 1:
        raise CorruptSlideError(f"{path}: has tiles of {wide} x {high} px; export it again")
    columns, rows = math.ceil(width / wide), math.ceil(height / high)
    planes: list[Plane] = []
    for page in _channel_pages(path, tiff, series, leading, channels):
        planes += _planes(path, keyframe, page, columns * rows)
    raw_dtype = None if tiled else _raw_dtype(keyframe)
    level = TiffLevel(width, height, wide, high, columns, rows, tuple(planes), raw_dtype)
    samples = 1 if keyframe.planarconfig == 2 else int(keyframe.samplesperpixel)
    pixel_bytes, file_bytes = samples * keyframe.dtype.itemsize, tiff.filehandle.size
    if raw_dtype is not None:
        if width * height * pixel_bytes > MOST_MISSING * file_bytes:
            raise CorruptSlideError(
                f"{path}: claims {width} x {height} uncompressed px in a file of {file_bytes} "
                "bytes; it was cut off, copy it again"
            )
        level = _cut_strips(level, width * pixel_bytes)
    segment_bytes = level.segment_width * level.segment_height * pixel_bytes
    _check_segments(path, level, segment_bytes, file_bytes)
    return level


def _channel_pages(path: Path, tiff: Any, series: Any, leading: str, channels: int) -> list[Any]:
    """Return the pages of the channels, of the first of every other axis."""
    if channels == 1:
        pages = [series.pages[0]]
    else:
        sizes = dict(zip(series.axes, series.shape))
        shape = [sizes[axis] for axis in leading]
        if len(series.pages) < math.prod(shape):
            raise UnsupportedSlideError(
                f"{path}: keeps its {channels} channels in one block without a directory for each; "
                "save it as an ordinary OME-TIFF"
            )
        step = math.prod(shape[leading.index("C") + 1 :])
        pages = [series.pages[channel * step] for channel in range(channels)]
    for page in pages:
        if page is None:
            raise CorruptSlideError(f"{path}: a channel is missing from the file; export it again")
        if page.parent.filehandle.path != tiff.filehandle.path:
            raise UnsupportedSlideError(
                f"{path}: keeps its channels in several files; save it as one OME-TIFF"
            )
    return pages


def _planes(path: Path, keyframe: Any, page: Any, segments: int) -> list[Plane]:
    """Return a page's planes: one, or one to a sample where these are stored apart."""
    separate = int(keyframe.samplesperpixel) if keyframe.planarconfig == 2 else 1
    offsets = np.asarray(page.dataoffsets, np.int64)
    byte_counts = np.asarray(page.databytecounts, np.int64)
    listed = min(len(offsets), len(byte_counts))
    if listed < segments * separate:
        raise CorruptSlideError(
            f"{path}: claims {keyframe.imagewidth} x {keyframe.imagelength} px, which take "
            f"{segments * separate} tiles or strips, but lists {listed}; the file is damaged, "
            "export it again"
        )
    firsts = [sample * segments for sample in range(separate)]
    return [
        Plane(keyframe, offsets[at : at + segments], byte_counts[at : at + segments], at)
        for at in firsts
    ]


def _check_page(path: Path, page: Any) -> None:
    if page.imagewidth < 1 or page.imagelength < 1 or page.samplesperpixel < 1:
        raise CorruptSlideError(
            f"{path}: claims {page.imagewidth} x {page.imagelength} px of "
            f"{page.samplesperpixel} samples; export it again"
        )
    if page.dtype is None:
        raise UnsupportedSlideError(
            f"{path}: has samples of {page.bitspersample} bits of format {page.sampleformat}, "
            "which are not read; convert it to 8 bits"
        )
    if page.imagedepth != 1:
        raise UnsupportedSlideError(f"{path}: is a volume; extract one plane of it")


def _check_segments(path: Path, level: TiffLevel, segment_bytes: int, file_bytes: int) -> None:
    largest = max(int(plane.byte_counts.max(initial=0)) for plane in level.planes)
    bomb = segment_bytes > MAX_COMPRESSION_RATIO * max(min(largest, file_bytes), 1)
    if segment_bytes > MAX_SEGMENT_BYTES or (segment_bytes > SAFE_SEGMENT_BYTES and bomb):
        raise UnsupportedSlideError(
            f"{path}: has tiles or strips of {level.segment_width} x {level.segment_height} px "
            f"({segment_bytes / 1e6:.0f} MB) in a file of {file_bytes / 1e6:.1f} MB; if it is "
            "sound, save it as a tiled TIFF"
        )
    for plane in level.planes:
        present = (plane.byte_counts > 0) & (plane.offsets > 0)
        ends = plane.offsets + plane.byte_counts
        if not present.any():
            raise CorruptSlideError(f"{path}: has no bytes for any of its tiles; export it again")
        if not (present & (plane.offsets < file_bytes)).any():
            raise CorruptSlideError(
                f"{path}: every tile lies beyond the end of the file ({file_bytes} bytes); it was "
                "cut off, copy it again"
            )
        cut = int((present & ((ends > file_bytes) | (ends < 0))).sum())
        if cut:
            log.warning("%s: %d of %d tiles lie beyond the end of the file", path, cut, len(ends))


def _is_reduction(finest: TiffLevel, level: TiffLevel, last: TiffLevel) -> bool:
    """Whether a level is a smaller copy of the finest one."""
    if level.width >= last.width or level.height > last.height:
        return False
    factor_x, factor_y = finest.width / level.width, finest.height / level.height
    # One pixel of rounding either way matters only where levels are tiny.
    slack = 1 / level.width + 1 / level.height
    return max(factor_x / factor_y, factor_y / factor_x) < WORST_FACTOR + slack and len(
        level.planes
    ) == len(finest.planes)


def _raw_dtype(page: Any) -> np.dtype[np.generic] | None:
    """Return the samples' type if strips hold nothing but samples."""
    plain = page.compression == 1 and page.predictor == 1 and page.fillorder == 1
    if not plain or page.is_subsampled or page.bitspersample not in (8, 16, 32, 64):
        return None
    dtype: np.dtype[np.generic] = np.dtype(page.dtype).newbyteorder(page.parent.byteorder)
    return dtype


def _cut_strips(level: TiffLevel, row_bytes: int) -> TiffLevel:
    """Cut the strips of an uncompressed image into shorter ones."""
    height = max(RAW_STRIP_BYTES // max(row_bytes, 1), 1)
    if level.segment_height <= height:
        return level
    starts = np.arange(0, level.height, height, dtype=np.int64)
    # Pieces must not cross strips.
    edges = np.arange(0, level.height, level.segment_height, dtype=np.int64)
    if len(edges) > 1:
        height = math.gcd(height, level.segment_height)
        starts = np.arange(0, level.height, height, dtype=np.int64)
    strip, inner = starts // level.segment_height, starts % level.segment_height
    planes = []
    for plane in level.planes:
        counts = np.minimum(height, level.height - starts) * row_bytes
        left = np.clip(plane.byte_counts[strip] - inner * row_bytes, 0, None)
        planes.append(
            Plane(
                plane.page,
                plane.offsets[strip] + inner * row_bytes,
                np.minimum(counts, left),
                plane.first_index,
            )
        )
    return TiffLevel(
        level.width,
        level.height,
        level.segment_width,
        height,
        1,
        len(starts),
        tuple(planes),
        level.raw_dtype,
    )
