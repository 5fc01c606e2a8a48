"""The direct TIFF reader: the bytes of a tile from the file, through one decoder, into place.

Reads SVS, BigTIFF, OME-TIFF with sub-IFDs, QPTIFF, tiled and striped, one level or many. On JPEG it
is about four times as fast as OpenSlide: nothing lies between the decoder and the result.
"""

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile

from gigavim.errors import (
    CorruptSlideError,
    SettingsError,
    SlideError,
    TileReadError,
)
from gigavim.frames import Bounds, Mpp
from gigavim.slides.base import RGB, WHITE, Level, Mask, OpenOptions, Slide, level_downsample
from gigavim.slides.buffers import shared_pool
from gigavim.slides.cache import TileCache
from gigavim.slides.handles import FileBytes, ThreadHandles
from gigavim.slides.mpp import choose_mpp, from_description, from_ome, from_resolution
from gigavim.slides.ome import pixels_attributes
from gigavim.slides.pixels import choose_rule
from gigavim.slides.tiff_codecs import jpeg_decoder, tile_decoder
from gigavim.slides.tiff_rows import TileRows
from gigavim.slides.tiff_structure import TiffLevel, parse

log = logging.getLogger(__name__)

SAMPLE_SEGMENTS = 64
"""Segments, spread over the coarsest level, from which a brightness scale is taken."""

RESOLUTION_UNITS = {2: "inch", 3: "cm"}

ICC_TAG = 34675


class TiffSlide(Slide):
    """A slide read straight from its TIFF file.

    Raises:
        CorruptSlideError: if the file's claims contradict each other or its size.
        UnsupportedSlideError: if its samples or compression are not read here.
    """

    reader = "tiff"

    def __init__(self, path: Path, options: OpenOptions | None = None) -> None:
        self.path = path
        self.options = options or OpenOptions()
        self.background_rgb = WHITE
        self.georeference = None
        self.tiles_decoded = 0
        self._files = ThreadHandles[FileBytes](lambda: FileBytes(path))
        self._cache = TileCache()
        self._buffers = shared_pool()
        self._tiff: tifffile.TiffFile | None = None
        try:
            self._tiff = tifffile.TiffFile(path)
            self._open(self._tiff)
        except (SlideError, SettingsError, OSError):
            self.close()
            raise
        # Damaged tags have values of any type; tifffile and its users stumble over them anywhere.
        except Exception as error:
            self.close()
            senseless = isinstance(
                error, TypeError | LookupError | AttributeError | ArithmeticError
            )
            why = "its tags make no sense" if senseless else str(error)
            raise CorruptSlideError(
                f"{path}: is a damaged TIFF ({why}); export it again"
            ) from error

    def _open(self, tiff: tifffile.TiffFile) -> None:
        path, options = self.path, self.options
        structure = parse(path, tiff, choosing=options.channels is not None)
        self._structure = structure
        finest = structure.levels[0]
        self._decoders = [
            [
                tile_decoder(plane, level.raw_dtype, structure.bands_per_plane)
                for plane in level.planes
            ]
            for level in structure.levels
        ]
        self.levels = tuple(
            Level(
                width=level.width,
                height=level.height,
                downsample_x=level_downsample(finest.width, level.width),
                downsample_y=level_downsample(finest.height, level.height),
                tile_width=level.segment_width,
                tile_height=level.segment_height,
            )
            for level in structure.levels
        )
        self.bounds = Bounds(0, 0, finest.width, finest.height)
        self._rule = choose_rule(path, structure.layout, options.channels, self._sample)
        page = finest.planes[0].page
        self._rows = [
            _whole_rows(level) if self._rule.keeps_rgb else None for level in structure.levels
        ]
        self.mpp = choose_mpp(path, _claims(tiff, page), user=options.mpp)
        self.description = {
            "format": f"TIFF ({structure.kind})",
            "compression": str(getattr(page.compression, "name", page.compression)),
            "pixels": self._rule.text,
        }
        if any(axis in structure.axes for axis in "TZQI"):
            self.description["planes"] = f"first of axes {structure.axes}"
        power = re.search(r"\bAppMag\s*=\s*([0-9.]+)", str(page.description))
        if power:
            self.description["objective power"] = power[1]
        if ICC_TAG in page.tags:
            self.description["icc"] = "present, not applied"

    def close(self) -> None:
        """Close the file."""
        self._files.close()
        self._cache.clear()
        if self._tiff is not None:
            self._tiff.close()

    def read_strips(
        self,
        x_level0: float,
        y_level0: float,
        width: int,
        height: int,
        strip_px: int,
        *,
        scale_xy: tuple[float, float],
    ) -> tuple[RGB, Mask | None]:
        """Return strips, see `Slide.read_strips`; columns of whole tiles are decoded in place."""
        index, across, down = self._windows(x_level0, y_level0, width, height, scale_xy)
        level, x, y = self.levels[index], across.first, down.first
        inside = x >= 0 and y >= 0 and x + width <= level.width and y + height <= level.height
        columns = strip_px == level.tile_width and x % strip_px == 0 and width % strip_px == 0
        if across.exact and down.exact and inside and columns:
            strips = self._buffers.empty(width // strip_px, height, strip_px)
            try:
                self._fill(index, x, y, strips)
                return strips, None
            except TileReadError as error:
                log.debug("%s; reading tile by tile", error)
        return super().read_strips(x_level0, y_level0, width, height, strip_px, scale_xy=scale_xy)

    def _read_inside(self, level: int, x: int, y: int, width: int, height: int) -> RGB:
        out = self._buffers.empty(height, width)
        self._fill(level, x, y, out[None])
        return out

    def _fill(self, level: int, x: int, y: int, strips: RGB) -> None:
        """Read (strips, height, strip width, 3), strips side by side, at level pixel (x, y)."""
        table = self._structure.levels[level]
        wide, high = table.segment_width, table.segment_height
        count, height, strip_px, _ = strips.shape
        width = count * strip_px
        for row in range(y // high, (y + height - 1) // high + 1):
            upper = row * high
            columns = range(x // wide, (x + width - 1) // wide + 1)
            for column in self._fill_row(level, row, columns, x, y, strips):
                left = column * wide
                right, lower = min(left + wide, table.width), min(upper + high, table.height)
                x0, x1 = max(left, x), min(right, x + width)
                y0, y1 = max(upper, y), min(lower, y + height)
                use_px, whole_px = (x1 - x0) * (y1 - y0), (right - left) * (lower - upper)
                tile = self._tile(level, row * table.columns + column, use_px, whole_px)
                strip, at = divmod(x0 - x, strip_px)
                strips[strip, y0 - y : y1 - y, at : at + x1 - x0] = tile[
                    y0 - upper : y1 - upper, x0 - left : x1 - left
                ]

    def _fill_row(
        self, level: int, row: int, columns: range, x: int, y: int, strips: RGB
    ) -> Iterable[int]:
        """Put those tiles of a row that lie whole in the strips there; return the others."""
        table, rows = self._structure.levels[level], self._rows[level]
        wide, high = table.segment_width, table.segment_height
        count, height, strip_px, _ = strips.shape
        first, stop = -(-x // wide), (x + count * strip_px) // wide
        whole_rows = y <= row * high and (row + 1) * high <= y + height
        if rows is None or not whole_rows or first >= stop:
            return columns
        try:
            file = self._files.get()
        except OSError:
            return columns
        indices = range(row * table.columns + first, row * table.columns + stop)
        if self._cache.holds_any((level, index) for index in indices):
            return columns
        high_part = strips[:, row * high - y :][:, :high]
        corners = (divmod(column * wide - x, strip_px) for column in range(first, stop))
        places = [high_part[strip, :, at : at + wide] for strip, at in corners]
        undone = rows.fill(file, indices.start, places)
        self.tiles_decoded += len(indices) - len(undone)
        left_over = [first + place for place in undone]
        return [*range(columns.start, first), *left_over, *range(stop, columns.stop)]

    def _tile(self, level: int, index: int, use_px: int, whole_px: int) -> RGB:
        """Return a tile of whose `whole_px` pixels `use_px` are used; if not all, it stays."""
        key = (level, index)
        if use_px < whole_px:
            return self._cache.get(key, lambda: self._decode(level, index), use_px, whole_px)
        tile = self._cache.find(key)
        return tile if tile is not None else self._decode(level, index)

    def _decode(self, level: int, index: int) -> RGB:
        """Return (segment_height, segment_width, 3), or less at the level's edges."""
        raw = self._decode_raw(level, index)
        if raw is None:
            table = self._structure.levels[level]
            return self._background(table.segment_width, table.segment_height)
        return self._rule.apply(raw, self.background_rgb)

    def _decode_raw(self, level: int, index: int) -> npt.NDArray[np.generic] | None:
        """Return (h, w, bands) raw samples, or None of a segment left out on purpose."""
        table = self._structure.levels[level]
        parts = []
        for plane, decode in zip(table.planes, self._decoders[level]):
            offset, count = int(plane.offsets[index]), int(plane.byte_counts[index])
            if offset <= 0 or count <= 0:
                if self._structure.missing_is_empty:
                    return None
                raise self._unreadable(level, index, "it has no bytes")
            try:
                part = decode(self._files.get().read(offset, count), index)
                parts.append(part if part.ndim == 3 else part[..., None])
            except Exception as error:  # codecs raise errors of many unrelated kinds
                raise self._unreadable(level, index, str(error)) from error
        if len({part.shape[:2] for part in parts}) > 1:
            raise self._unreadable(level, index, "its bands decode to different sizes")
        raw = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
        row, column = divmod(index, table.columns)
        need_h = min(table.segment_height, table.height - row * table.segment_height)
        need_w = min(table.segment_width, table.width - column * table.segment_width)
        fits = raw.ndim == 3 and raw.shape[2] == self._structure.layout.bands
        if not fits or raw.shape[0] < need_h or raw.shape[1] < need_w:
            raise self._unreadable(level, index, f"it decodes to the shape {raw.shape}")
        self.tiles_decoded += 1
        return raw

    def _unreadable(self, level: int, index: int, why: str) -> TileReadError:
        row, column = divmod(index, self._structure.levels[level].columns)
        return TileReadError(
            f"{self.path}: tile ({column}, {row}) of level {level} cannot be decoded: {why}"
        )

    def _sample(self) -> npt.NDArray[np.generic]:
        """Return raw samples (n, bands) from segments spread over the coarsest level."""
        level = len(self._structure.levels) - 1
        table = self._structure.levels[level]
        count = table.columns * table.rows
        chosen = np.unique(np.linspace(0, count - 1, min(count, SAMPLE_SEGMENTS)).astype(int))
        parts = []
        for index in chosen.tolist():
            try:
                raw = self._decode_raw(level, index)
            except TileReadError:
                continue
            if raw is not None:
                parts.append(raw.reshape(-1, raw.shape[-1]))
        bands = self._structure.layout.bands
        dtype = self._structure.layout.dtype
        return np.concatenate(parts) if parts else np.empty((0, bands), dtype)


def _whole_rows(level: TiffLevel) -> TileRows | None:
    """Return what decodes whole rows of a level's tiles, where they are ordinary JPEG."""
    plane = level.planes[0]
    decode = jpeg_decoder(plane.page)
    if decode is None or level.raw_dtype is not None or len(level.planes) > 1:
        return None
    return TileRows(plane.offsets, plane.byte_counts, decode)


def _claims(tiff: tifffile.TiffFile, page: Any) -> list[Mpp | None]:
    """Return what the file says of the pixel size, the most trusted first."""
    claims: list[Mpp | None] = []
    if tiff.is_ome:
        said = pixels_attributes(tiff.ome_metadata or "")
        claims.append(
            from_ome(
                said.get("PhysicalSizeX"),
                said.get("PhysicalSizeY"),
                said.get("PhysicalSizeXUnit"),
                said.get("PhysicalSizeYUnit"),
            )
        )
    text = page.description if isinstance(page.description, str) else ""
    claims.append(from_description(text))
    unit = RESOLUTION_UNITS.get(int(page.tags.valueof(296, 2)), "")
    if tiff.is_imagej:
        unit = str((tiff.imagej_metadata or {}).get("unit", ""))
    claims.append(
        from_resolution(_rational(page.tags.valueof(282)), _rational(page.tags.valueof(283)), unit)
    )
    return claims


def _rational(value: Any) -> float | None:
    if isinstance(value, tuple) and len(value) == 2 and value[1]:
        return float(value[0]) / float(value[1])
    return None
