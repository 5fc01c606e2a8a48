"""Write an aerial scene and its label map as Cloud Optimized GeoTIFFs."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.shutil import copy
from rasterio.transform import from_origin
from rasterio.windows import Window

BLOCK_PX = 512
_GDAL_CACHE_MB = 128


def write_cogs(
    image_path: Path,
    label_path: Path,
    bands: Iterator[tuple[int, np.ndarray, np.ndarray]],
    *,
    width: int,
    height: int,
    crs: str,
    origin_xy: tuple[float, float],
    metres_per_px: float,
    quality: int,
    classes: Mapping[int, tuple[str, tuple[int, int, int]]],
) -> None:
    """Write the picture (JPEG in YCbCr) and its labels (deflate, with a colour table).

    `bands` yields (y, pixels (h, width, 3), labels (h, width)); `classes` maps a label to its
    name and RGB; label 0 is nodata. The COG driver builds overviews, so the full-size picture
    passes through a temporary file beside `image_path`.
    """
    common: dict[str, Any] = {
        "driver": "GTiff",
        "width": width,
        "height": height,
        "dtype": "uint8",
        "crs": crs,
        "transform": from_origin(*origin_xy, metres_per_px, metres_per_px),
        "tiled": True,
        "blockxsize": BLOCK_PX,
        "blockysize": BLOCK_PX,
        "bigtiff": "if_safer",
    }
    options = {"blocksize": BLOCK_PX, "num_threads": 2, "bigtiff": "if_safer"}
    with (
        tempfile.TemporaryDirectory(dir=image_path.parent, prefix=".make-") as scratch,
        rasterio.Env(GDAL_CACHEMAX=_GDAL_CACHE_MB, GDAL_PAM_ENABLED=False),
    ):
        raw_image, raw_labels = Path(scratch, "image.tif"), Path(scratch, "labels.tif")
        with (
            rasterio.open(
                raw_image, "w", count=3, photometric="RGB", interleave="pixel", **common
            ) as image,
            rasterio.open(
                raw_labels, "w", count=1, nodata=0, compress="deflate", **common
            ) as truth,
        ):
            truth.write_colormap(
                1, {0: (0, 0, 0, 0)} | {k: (*c, 255) for k, (_, c) in classes.items()}
            )
            truth.update_tags(**{f"CLASS_{k}": name for k, (name, _) in classes.items()})
            for y, pixels, labels in bands:
                window = Window(0, y, width, pixels.shape[0])
                image.write(np.moveaxis(pixels, -1, 0), window=window)
                truth.write(labels, 1, window=window)
        copy(
            raw_image,
            image_path,
            driver="COG",
            compress="JPEG",
            quality=quality,
            overview_quality=quality,
            resampling="average",
            **options,
        )
        copy(
            raw_labels,
            label_path,
            driver="COG",
            compress="DEFLATE",
            level=9,
            resampling="mode",
            **options,
        )
