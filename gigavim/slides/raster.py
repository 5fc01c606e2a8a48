"""GeoTIFF, COG, JPEG 2000 and images with a world file, by rasterio."""

import logging
import threading
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from gigavim.errors import CorruptSlideError, SlideError, TileReadError, UnsupportedSlideError
from gigavim.frames import Bounds, GeoReference
from gigavim.slides.base import RGB, WHITE, Level, OpenOptions, Slide
from gigavim.slides.ground import ground_mpp
from gigavim.slides.handles import ThreadHandles
from gigavim.slides.mpp import override
from gigavim.slides.pixels import SampleLayout, choose_rule
from gigavim.slides.source import JPEG2000_MAGIC, TIFF_MAGIC

log = logging.getLogger(__name__)

MAX_BLOCK_BYTES = 1 << 30

SAMPLE_BLOCKS = 64
"""Blocks, spread over the coarsest level, from which a brightness scale is taken."""

SAMPLE_BLOCK_PX = 256


DRIVERS = {
    "GTiff": TIFF_MAGIC,
    "JP2OpenJPEG": JPEG2000_MAGIC,
    "PNG": (b"\x89PNG",),
    "JPEG": (b"\xff\xd8\xff",),
    "BMP": (b"BM",),
}
"""What GDAL may take a file for, by its first bytes: formats that hold pixels themselves, and no
references to other files."""

_OPENING = threading.Lock()


class _Datasets:
    """One thread's datasets: the raster and its overviews, opened as they are needed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            head = file.read(16)
        self._driver = next((name for name, magic in DRIVERS.items() if head.startswith(magic)), "")
        if not self._driver:
            raise UnsupportedSlideError(f"{path}: is no raster format that is read")
        self._open: dict[int, rasterio.DatasetReader] = {}

    def level(self, index: int) -> rasterio.DatasetReader:
        if index not in self._open:
            options = {} if index == 0 else {"overview_level": index - 1}
            with _OPENING, warnings.catch_warnings():
                # A raster that is not georeferenced is a plain image, which is fine here.
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
                self._open[index] = rasterio.open(self._path, driver=self._driver, **options)
        return self._open[index]

    def close(self) -> None:
        for dataset in self._open.values():
            with suppress(RasterioError):
                dataset.close()
        self._open.clear()


class RasterSlide(Slide):
    """A georeferenced raster; without a CRS its pixel size is unknown.

    No-data, alpha and mask bands come out as background.

    Raises:
        CorruptSlideError: if GDAL cannot open it.
        UnsupportedSlideError: if its samples are no picture (an elevation model, say).
    """

    reader = "rasterio"

    def __init__(self, path: Path, options: OpenOptions | None = None) -> None:
        self.path = path
        self.options = options or OpenOptions()
        self.background_rgb = WHITE
        self._datasets = ThreadHandles[_Datasets](lambda: _Datasets(path))
        try:
            with rasterio.Env():  # without one, GDAL writes to standard error what it reports too
                self._open()
        except SlideError:
            self.close()
            raise
        # GDAL's own errors reach Python as many unrelated kinds.
        except Exception as error:
            self.close()
            raise CorruptSlideError(
                f"{path}: GDAL cannot open it: {error}; copy or export it again"
            ) from error

    def _open(self) -> None:
        path = self.path
        raster = self._datasets.get().level(0)
        if min(raster.width, raster.height, raster.count) < 1:
            raise CorruptSlideError(f"{path}: has no pixels")
        sizes = [self._datasets.get().level(i) for i in range(len(raster.overviews(1)) + 1)]
        self.levels = tuple(_level(path, raster, one) for one in sizes)
        self.bounds = Bounds(0, 0, raster.width, raster.height)
        layout = _layout(raster)
        # The mask of alpha is the alpha band itself, and that of no-data the rule's.
        flags = raster.mask_flag_enums[0]
        self._masked = MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags
        self._rule = choose_rule(path, layout, self.options.channels, self._sample)
        transform = tuple(float(value) for value in tuple(raster.transform)[:6])
        a, b, c, d, e, f = transform
        # The identity is what GDAL gives where nothing is said.
        placed = raster.crs is not None or transform != (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
        wkt = raster.crs.to_wkt() if raster.crs is not None else ""
        self.georeference = GeoReference(wkt, (a, b, c, d, e, f)) if placed else None
        ground = ground_mpp(raster.crs, raster.transform, raster.width, raster.height)
        self.mpp = override(path, ground, self.options.mpp)
        self.description = {
            "format": raster.driver,
            "pixels": self._rule.text + (", masked parts as background" if self._masked else ""),
        }
        compression = raster.tags(ns="IMAGE_STRUCTURE").get("COMPRESSION")
        if compression:
            self.description["compression"] = compression
        if raster.crs is not None:
            self.description["crs"] = raster.crs.to_string()

    def close(self) -> None:
        """Close every dataset."""
        self._datasets.close()

    def _read_inside(self, level: int, x: int, y: int, width: int, height: int) -> RGB:
        rgb = self._rule.apply(self._raw(level, x, y, width, height), self.background_rgb)
        if self._masked:
            empty = self._read(level, x, y, width, height, mask=True) == 0
            if empty.any():
                rgb = rgb.copy()
                rgb[empty] = self.background_rgb
        return rgb

    def _raw(self, level: int, x: int, y: int, width: int, height: int) -> npt.NDArray[np.generic]:
        """Return (height, width, bands)."""
        return np.moveaxis(self._read(level, x, y, width, height, mask=False), 0, -1)

    def _read(
        self, level: int, x: int, y: int, width: int, height: int, *, mask: bool
    ) -> npt.NDArray[np.generic]:
        """Return (bands, height, width) samples, or the (height, width) mask."""
        window = Window(x, y, width, height)
        try:
            with rasterio.Env():
                raster = self._datasets.get().level(level)
                read = raster.dataset_mask if mask else raster.read
                samples: npt.NDArray[np.generic] = read(window=window)
            return samples
        # GDAL's own errors reach Python as many unrelated kinds.
        except Exception as error:
            self._datasets.drop()
            raise TileReadError(
                f"{self.path}: {width} x {height} px at ({x}, {y}) of level {level} "
                f"cannot be decoded: {error}"
            ) from error

    def _sample(self) -> npt.NDArray[np.generic]:
        """Return raw samples (n, bands) from blocks spread over the coarsest level."""
        level = self.levels[-1]
        wide, high = min(level.width, SAMPLE_BLOCK_PX), min(level.height, SAMPLE_BLOCK_PX)
        columns, rows = -(-level.width // wide), -(-level.height // high)
        count = columns * rows
        parts = []
        for index in np.unique(np.linspace(0, count - 1, min(count, SAMPLE_BLOCKS)).astype(int)):
            row, column = divmod(int(index), columns)
            x, y = min(column * wide, level.width - wide), min(row * high, level.height - high)
            try:
                raw = self._raw(len(self.levels) - 1, x, y, wide, high)
            except TileReadError:
                continue
            parts.append(raw.reshape(-1, raw.shape[-1]))
        if not parts:
            raise CorruptSlideError(f"{self.path}: none of its pixels can be decoded")
        return np.concatenate(parts)


def _level(path: Path, finest: rasterio.DatasetReader, raster: rasterio.DatasetReader) -> Level:
    block_height, block_width = raster.block_shapes[0]
    block_bytes = block_height * block_width * np.dtype(raster.dtypes[0]).itemsize * raster.count
    if block_bytes > MAX_BLOCK_BYTES:
        raise UnsupportedSlideError(
            f"{path}: has blocks of {block_width} x {block_height} px "
            f"({block_bytes / 1e6:.0f} MB); save it as a COG (gdal_translate -of COG)"
        )
    return Level(
        width=raster.width,
        height=raster.height,
        # GDAL's overviews span the raster exactly.
        downsample_x=finest.width / raster.width,
        downsample_y=finest.height / raster.height,
        tile_width=min(block_width, raster.width),
        tile_height=min(block_height, raster.height),
    )


def _layout(raster: rasterio.DatasetReader) -> SampleLayout:
    kinds = list(raster.colorinterp)
    palette = None
    if raster.count == 1 and kinds[0] is ColorInterp.palette:
        colours = raster.colormap(1)
        palette = np.array([colours[i][:3] for i in sorted(colours)], np.uint8)
    stated = raster.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", "")
    bits = int(stated) if stated.isdigit() and 1 <= int(stated) <= 16 else None
    dtypes = {np.dtype(name) for name in raster.dtypes}
    return SampleLayout(
        dtype=max(dtypes, key=lambda dtype: (dtype.kind, dtype.itemsize)),
        bands=raster.count,
        photometric="palette" if palette is not None else "rgb" if raster.count > 1 else "grey",
        alpha_band=kinds.index(ColorInterp.alpha) if ColorInterp.alpha in kinds else None,
        names=tuple(kind.name for kind in kinds),
        significant_bits=bits,
        palette=palette,
        nodata=raster.nodata,
    )
