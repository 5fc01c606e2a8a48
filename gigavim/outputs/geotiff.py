"""The label map of a georeferenced raster as a cloud-optimised GeoTIFF (COG)."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import rasterio

# GDAL's own errors come through too, and nothing public is their base.
from rasterio._err import CPLE_BaseError
from rasterio.errors import RasterioError
from rasterio.shutil import copy as gdal_copy
from rasterio.windows import Window

from gigavim import __version__
from gigavim.errors import OutputError
from gigavim.frames import ClassSpec, MapFrame
from gigavim.outputs.atomic import atomic_path, output_error
from gigavim.outputs.ground import map_affine, map_crs
from gigavim.outputs.labels import WINDOW_PX, Coverage, LabelMap, LabelStore, windows

NODATA = 255
BLOCK_PX = 512
CACHE_MB = 64
"""GDAL's own cache, by default 5 % of the machine's memory, would not count into any plan."""


def write_geotiff(
    labels: LabelMap,
    frame: MapFrame,
    classes: Sequence[ClassSpec],
    path: str | Path,
    *,
    provenance: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a label map with CRS, transform, colour table, class names and nearest overviews.

    Pixels whose input could not be read are nodata (255). Rotated rasters keep their rotation.
    Class names are metadata items `CLASS_<value>`; item `CLASSES` tells all of them in JSON.

    Args:
        labels: the (height, width) label map; of a `LabelStore` the coverage is used too.
        frame: its placement, with a georeference.
        classes: name and colour of each label value.
        path: the file to write.
        provenance: put into the metadata item `PROVENANCE` as JSON.
        overwrite: replace the file if it exists.

    Raises:
        OutputError: the frame has no georeference, there are more than 255 classes, or the file
            exists or cannot be written.
    """
    transform, crs = map_affine(frame), map_crs(frame)
    if not labels.height or not labels.width or len(classes) > NODATA:
        raise OutputError(f"{path}: cannot be written: the map is empty or has over 255 classes")
    with (
        atomic_path(path, overwrite=overwrite) as partial,
        tempfile.TemporaryDirectory(prefix=".geotiff-", dir=partial.parent) as scratch,
        rasterio.Env(GDAL_CACHEMAX=CACHE_MB, GDAL_PAM_ENABLED=False, GDAL_TIFF_INTERNAL_MASK=True),
    ):
        # GDAL makes a COG by copying, and rasterio would gather the source of the copy in memory.
        plain = Path(scratch) / "plain.tif"
        try:
            with rasterio.open(
                plain,
                "w",
                driver="GTiff",
                dtype="uint8",
                count=1,
                height=labels.height,
                width=labels.width,
                nodata=NODATA,
                crs=crs,
                transform=transform,
                tiled=True,
                blockxsize=BLOCK_PX,
                blockysize=BLOCK_PX,
                compress="deflate",
                zlevel=1,
                bigtiff="if_safer",
            ) as raster:
                raster.write_colormap(1, _palette(classes))
                raster.set_band_description(1, "class")
                raster.update_tags(**_tags(classes, provenance))
                _write_windows(labels, raster)
            gdal_copy(
                str(plain),
                str(partial),
                driver="COG",
                compress="DEFLATE",
                overview_resampling="NEAREST",
                blocksize=BLOCK_PX,
                bigtiff="IF_SAFER",
                num_threads="ALL_CPUS",
            )
            _check(labels, partial)
        except (RasterioError, CPLE_BaseError) as error:
            # Here and now, while the disk is as full as GDAL met it: its errors bear no number.
            cause = error if isinstance(error, OSError) else OSError(str(error))
            raise output_error(partial, cause) from error


def _write_windows(labels: LabelMap, raster: Any) -> None:
    for y0, y1, x0, x1 in windows(labels.height, labels.width, side_px=WINDOW_PX):
        values = _values(labels, y0, y1, x0, x1)
        raster.write(values, 1, window=Window(x0, y0, x1 - x0, y1 - y0))


def _values(labels: LabelMap, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
    values = labels.read(y0, y1, x0, x1)
    if isinstance(labels, LabelStore):
        unreadable = labels.coverage_at(y0, y1, x0, x1) == Coverage.UNREADABLE
        values = np.where(unreadable, np.uint8(NODATA), values)
    return values


def _check(labels: LabelMap, path: Path) -> None:
    """Read the whole file again: GDAL does not report all that goes wrong when it closes one."""
    with rasterio.open(path) as raster:
        for y0, y1, x0, x1 in windows(labels.height, labels.width, side_px=WINDOW_PX):
            written = raster.read(1, window=Window(x0, y0, x1 - x0, y1 - y0))
            if not np.array_equal(written, _values(labels, y0, y1, x0, x1)):
                raise OSError("what was written reads back differently")


def _palette(classes: Sequence[ClassSpec]) -> dict[int, tuple[int, int, int, int]]:
    palette = {value: (*spec.color_rgb, 255) for value, spec in enumerate(classes)}
    return palette | {NODATA: (0, 0, 0, 0)}


def _tags(classes: Sequence[ClassSpec], provenance: dict[str, Any] | None) -> dict[str, str]:
    table = [
        {"value": value, "name": spec.name, "color": spec.color_rgb, "parent": spec.parent}
        for value, spec in enumerate(classes)
    ]
    tags = {f"CLASS_{value}": spec.name for value, spec in enumerate(classes)}
    tags |= {"CLASSES": orjson.dumps(table).decode(), "TIFFTAG_SOFTWARE": f"gigavim {__version__}"}
    if provenance is not None:
        tags["PROVENANCE"] = orjson.dumps(provenance).decode()
    return tags
