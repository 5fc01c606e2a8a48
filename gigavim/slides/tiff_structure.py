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
from gigavim.slides.pixels import NotAPictureError, SampleLayout

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

CMYK = 5

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
        layout = _layout(page, channels, choosing or channels > 1)
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
    count = 1
    if channels > 1:
        sizes = dict(zip(series.axes, series.shape))
        shape = [sizes[axis] for axis in leading]
        at = leading.index("C")
        if len(series.pages) < math.prod(shape):
            raise UnsupportedSlideError(
                f"{path}: keeps its {channels} channels in one block without a directory for each; "
                "save it as an ordinary OME-TIFF"
            )
        indices = [
            int(np.ravel_multi_index([c if i == at else 0 for i in range(len(shape))], shape))
            for c in range(channels)
        ]
        pages = [series.pages[index] for index in indices]
        count = channels
    else:
        pages = [series.pages[0]]
    if any(page is None for page in pages):
        raise CorruptSlideError(f"{path}: a channel is missing from the file; export it again")
    tiled = bool(keyframe.is_tiled)
    width, height = int(keyframe.imagewidth), int(keyframe.imagelength)
    segment_width = int(keyframe.tilewidth) if tiled else width
    segment_height = int(keyframe.tilelength) if tiled else min(int(keyframe.rowsperstrip), height)
    if segment_width < 1 or segment_height < 1:
        raise CorruptSlideError(f"{path}: has tiles of {segment_width} x {segment_height} px")
    raw_dtype = _raw_dtype(keyframe) if not tiled else None
    columns, rows = math.ceil(width / segment_width), math.ceil(height / segment_height)
    separate = int(keyframe.samplesperpixel) if keyframe.planarconfig == 2 else 1
    planes = []
    for page in pages:
        offsets = np.asarray(page.dataoffsets, np.int64)
        byte_counts = np.asarray(page.databytecounts, np.int64)
        _check_table(path, offsets, byte_counts, columns * rows * separate, width, height)
        planes += [
            Plane(
                keyframe,
                offsets[k * columns * rows : (k + 1) * columns * rows],
                byte_counts[k * columns * rows : (k + 1) * columns * rows],
                k * columns * rows,
            )
            for k in range(separate)
        ]
    samples = 1 if keyframe.planarconfig == 2 else int(keyframe.samplesperpixel)
    segment_bytes = segment_width * segment_height * samples * keyframe.dtype.itemsize
    level = TiffLevel(
        width, height, segment_width, segment_height, columns, rows, tuple(planes), raw_dtype
    )
    if raw_dtype is not None:
        claimed = width * height * samples * raw_dtype.itemsize
        if claimed > MOST_MISSING * tiff.filehandle.size:
            raise CorruptSlideError(
                f"{path}: claims {width} x {height} uncompressed px in a file of "
                f"{tiff.filehandle.size} bytes; it was cut off, copy it again"
            )
        level = _cut_strips(level, width * samples * raw_dtype.itemsize)
        segment_bytes = level.segment_height * width * samples * raw_dtype.itemsize
    _check_segments(path, level, segment_bytes, tiff.filehandle.size)
    assert len(planes) == count * separate
    return level


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


def _check_table(
    path: Path,
    offsets: npt.NDArray[np.int64],
    byte_counts: npt.NDArray[np.int64],
    needed: int,
    width: int,
    height: int,
) -> None:
    if min(len(offsets), len(byte_counts)) < needed:
        raise CorruptSlideError(
            f"{path}: claims {width} x {height} px, which take {needed} tiles or strips, but lists "
            f"{min(len(offsets), len(byte_counts))}; the file is damaged, export it again"
        )


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


def _layout(page: Any, channels: int, channels_shown: bool) -> SampleLayout:
    samples = int(page.samplesperpixel)
    extra = tuple(int(one) for one in page.extrasamples)
    photometric = int(page.photometric)
    alpha_band = None
    if channels == 1 and extra and extra[-1] in (1, 2):
        alpha_band = samples - 1
    kind = {0: "inverted", 1: "grey", 2: "rgb", 3: "palette", 4: "grey", 6: "rgb"}.get(photometric)
    if kind is None:
        what = f"{page.parent.filehandle.path}: has colours of photometric kind {photometric}, which are"
        if photometric == CMYK and samples == 4:
            raise UnsupportedSlideError(f"{what} not read here; convert it to RGB")
        # Other readers would take these numbers for red, green and blue.
        raise NotAPictureError(f"{what} not read; convert it to RGB")
    palette = None
    if kind == "palette" and channels_shown:
        kind = "grey"
    if kind == "palette":
        palette = _palette(page)
    bits = page.bitspersample if isinstance(page.bitspersample, int) else 8
    return SampleLayout(
        dtype=np.dtype(page.dtype),
        bands=samples * channels,
        photometric=kind,  # type: ignore[arg-type]
        alpha_band=alpha_band,
        premultiplied=alpha_band is not None and extra[-1] == 1,
        names=_channel_names(page, channels),
        are_channels=channels > 1,
        significant_bits=bits if bits not in (8, 16) else _stated_bits(page),
        palette=palette,
    )


def _palette(page: Any) -> npt.NDArray[np.uint8]:
    colormap = np.asarray(page.colormap)  # (3, entries)
    if colormap.ndim != 2 or colormap.shape[0] != 3:
        raise CorruptSlideError(f"{page.parent.filehandle.path}: has a palette without colours")
    if colormap.dtype.itemsize > 1 and colormap.max() > 255:
        colormap = colormap >> 8
    return np.ascontiguousarray(colormap.T.astype(np.uint8))


def _stated_bits(page: Any) -> int | None:
    """Return the depth that a MaxSampleValue tag states."""
    tag = page.tags.get(281)
    value = tag.value if tag is not None else None
    if isinstance(value, tuple):
        value = max(value)
    if page.bitspersample != 16 or not isinstance(value, int) or not 255 < value < 65536:
        return None
    return value.bit_length()


def _channel_names(page: Any, channels: int) -> tuple[str, ...]:
    if channels == 1 or not page.parent.is_ome:
        return ()
    from gigavim.slides.ome import channel_names

    names = channel_names(page.parent.ome_metadata or "")
    return names if len(names) == channels else ()
