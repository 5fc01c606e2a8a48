"""A store as a SpatialData zarr that is a WSIData store too; SpatialData need not be installed.

Elements are those that wsidata and LazySlide expect, all in level-0 pixels of the whole slide:
image `wsi_thumbnail`, labels `segmentation`, shapes `tiles` and `tissues`, and table
`<model>_tiles`, whose rows annotate the tiles. The layout is that of SpatialData 0.7 (containers
0.2, rasters and shapes 0.3, tables 0.2); tables are written by anndata, shapes by pyarrow.
"""

import math
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import orjson
import shapely
import zarr

from gigavim import __version__
from gigavim.extras import installed
from gigavim.frames import ClassSpec, MapFrame
from gigavim.outputs.atomic import explained
from gigavim.outputs.h5 import encoder_name
from gigavim.outputs.labels import every_second, windows
from gigavim.outputs.ome_tiff import level_shapes
from gigavim.outputs.polygons import regions
from gigavim.store.views import Spots, spots

if TYPE_CHECKING:
    from gigavim.store.reader import EmbeddingStore

CHUNK_PX = 1024
SHAPES_AT_ONCE = 200_000
TILES, TISSUES, LABELS, THUMBNAIL = "tiles", "tissues", "segmentation", "wsi_thumbnail"
FORMAT = {"spatialdata_attrs": {"version": "0.3"}}
"""Of rasters and shapes."""


def write_spatialdata(store: "EmbeddingStore", folder: Path, *, pool: int = 1) -> None:
    """Fill an empty folder with the elements of a SpatialData.

    Args:
        store: with embeddings.
        folder: exists, and is empty.
        pool: side in cells of the windows that become one tile.

    Raises:
        OutputError: the folder cannot be written.
        SettingsError: anndata or pyarrow is not installed.
    """
    installed("anndata", "spatialdata")
    installed("pyarrow", "spatialdata")
    where = spots(store, pool)
    with explained(folder):
        root = zarr.open_group(folder, mode="w", zarr_format=3)
        root.attrs.update(
            {
                "spatialdata_attrs": {
                    "version": "0.2",
                    "spatialdata_software_version": f"gigavim {__version__}",
                },
                "tile_spec": {TILES: _tile_spec(store, where, pool)},
                "slide_properties": _slide_properties(store),
            }
        )
        _write_thumbnail(root.create_group("images"), store)
        _write_labels(root.create_group("labels"), store)
        shapes = root.create_group("shapes")
        tissue_ids = _write_tissues(shapes, folder, store, where)
        _write_tiles(shapes, folder, where, tissue_ids)
        _write_table(root, folder, store, where, pool)


def _write_thumbnail(images: zarr.Group, store: "EmbeddingStore") -> None:
    picture, bounds = store.thumbnail(), store.bounds
    height, width = picture.shape[:2]
    scale = bounds.width_level0 / width, bounds.height_level0 / height
    group = images.create_group(THUMBNAIL)
    _plain(group, "s0", (3, height, width), ("c", "y", "x"))[...] = picture.transpose(2, 0, 1)
    affine = [
        [1.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, scale[0], float(bounds.x_level0)],
        [0.0, scale[1], 0.0, float(bounds.y_level0)],
    ]
    channels = [{"label": label} for label in ("r", "g", "b")]
    group.attrs.update(
        {"ome": _raster(THUMBNAIL, "cyx", 1, affine, {"omero": {"channels": channels}}), **FORMAT}
    )


def _write_labels(container: zarr.Group, store: "EmbeddingStore") -> None:
    container.attrs["ome"] = {"labels": [LABELS]}
    labels, frame = store.labels, store.frame
    shapes = level_shapes(labels.height, labels.width)
    group = container.create_group(LABELS)
    levels = [_plain(group, f"s{i}", shape, ("y", "x")) for i, shape in enumerate(shapes)]
    for y0, y1, x0, x1 in windows(*shapes[0], side_px=CHUNK_PX):
        levels[0][y0:y1, x0:x1] = labels.read(y0, y1, x0, x1)
    for number, (fine, coarse) in enumerate(pairwise(levels), 1):
        for y0, y1, x0, x1 in windows(*coarse.shape, side_px=CHUNK_PX):
            values = np.asarray(fine[2 * y0 : 2 * y1, 2 * x0 : 2 * x1])
            half = every_second(values, (y1 - y0, x1 - x0), offset=number % 2)
            coarse[y0:y1, x0:x1] = half
    affine = [[0.0, frame.scale_x, frame.x_level0], [frame.scale_y, 0.0, frame.y_level0]]
    group.attrs.update(
        {
            "ome": _raster(LABELS, "yx", len(shapes), affine, {}),
            "gigavim_classes": {str(v): spec.name for v, spec in enumerate(store.classes)},
            **FORMAT,
        }
    )


def _write_tissues(
    shapes: zarr.Group, folder: Path, store: "EmbeddingStore", where: Spots
) -> npt.NDArray[np.int64]:
    """Outlines of the tissue; (n,) which of them holds each tile's centre, -1 none."""
    mask, frame = store.tissue.astype(np.uint8), store.info.tissue.frame()
    classes = (ClassSpec("background", (0, 0, 0), object_type="none"), ClassSpec("t", (0, 0, 0)))
    found = [batch.polygons for batch in regions(_Mask(mask), classes)]
    outlines = np.concatenate([np.empty(0, object), *found])
    placed = shapely.transform(outlines, lambda xy: xy * _scale(frame) + _origin(frame))
    tree = shapely.STRtree(placed)
    points = shapely.points(where.centres_xy_level0)
    ids = np.full(len(points), -1, np.int64)
    hits = tree.query(points, predicate="within")
    ids[hits[0]] = hits[1]
    _write_shapes(shapes, folder, TISSUES, iter([placed]), {"tissue_id": np.arange(len(placed))})
    return ids


def _write_tiles(
    shapes: zarr.Group, folder: Path, where: Spots, tissue_ids: npt.NDArray[np.int64]
) -> None:
    x, y = where.xy_level0.T
    across, down = where.side_xy_level0

    def boxes() -> Iterator[npt.NDArray[np.object_]]:
        for start in range(0, max(len(x), 1), SHAPES_AT_ONCE):
            part = slice(start, start + SHAPES_AT_ONCE)
            yield np.asarray(shapely.box(x[part], y[part], x[part] + across, y[part] + down))

    columns = {"tile_id": np.arange(len(x)), "x": x, "y": y, "tissue_id": tissue_ids}
    _write_shapes(shapes, folder, TILES, boxes(), columns)


def _write_shapes(
    shapes: zarr.Group,
    folder: Path,
    name: str,
    geometries: Iterator[npt.NDArray[np.object_]],
    columns: dict[str, npt.NDArray[Any]],
) -> None:
    pyarrow = installed("pyarrow", "spatialdata")
    parquet = installed("pyarrow.parquet", "spatialdata")
    about = {
        "version": "1.1.0",
        "primary_column": "geometry",
        "columns": {"geometry": {"encoding": "WKB", "geometry_types": ["Polygon"], "crs": None}},
    }
    fields = [(key, pyarrow.from_numpy_dtype(values.dtype)) for key, values in columns.items()]
    schema = pyarrow.schema(
        [*fields, ("geometry", pyarrow.binary())], metadata={"geo": orjson.dumps(about).decode()}
    )
    group = shapes.create_group(name)
    identity: dict[str, Any] = {
        "type": "identity",
        "input": _system("xy", "xy"),
        "output": _system("global", "xy"),
    }
    group.attrs.update(
        {
            "encoding-type": "ngff:shapes",
            "axes": ["x", "y"],
            "coordinateTransformations": [identity],
            **FORMAT,
        }
    )
    path, done = folder / "shapes" / name / "shapes.parquet", 0
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for part in geometries:
            rows = slice(done, done + len(part))
            arrays = [pyarrow.array(values[rows]) for values in columns.values()]
            arrays.append(pyarrow.array(shapely.to_wkb(part), pyarrow.binary()))
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
            done += len(part)


def _write_table(
    root: zarr.Group, folder: Path, store: "EmbeddingStore", where: Spots, pool: int
) -> None:
    anndata = installed("anndata", "spatialdata")
    pandas = installed("pandas", "spatialdata")
    name = re.sub(r"[^A-Za-z0-9._-]", "_", f"{encoder_name(store)}_{TILES}")
    table = store.to_anndata(pool=pool, lazy=True)
    codes = np.zeros(len(where.xy_level0), np.int8)
    table.obs["library_id"] = pandas.Categorical.from_codes(codes, categories=[TILES])
    table.varm["agg_slide"] = table.varm.pop("slide")
    table.uns["agg_ops"] = {"agg_slide": {"features": store.info.slide_embedding}}
    region = {"region": TILES, "region_key": "library_id", "instance_key": "tile_id"}
    table.uns["spatialdata_attrs"] = region
    tables = root.create_group("tables")
    with anndata.settings.override(auto_shard_zarr_v3=False):
        anndata.io.write_elem(tables, name, table)
    group = zarr.open_group(folder / "tables" / name, mode="r+")
    group.attrs.update(
        {"spatialdata-encoding-type": "ngff:regions_table", "version": "0.2", **region}
    )


def _tile_spec(store: "EmbeddingStore", where: Spots, pool: int) -> dict[str, Any]:
    frame, stride = store.frame, pool * store.info.grid.stride_px
    return {
        "height": where.side_px,
        "width": where.side_px,
        "stride_height": stride,
        "stride_width": stride,
        "mpp": frame.mpp_x if math.isfinite(frame.mpp_x) else None,
        "ops_level": 0,
        "ops_downsample": frame.scale_x,
        "base_level": 0,
        "base_downsample": frame.scale_x,
        "tissue_name": TISSUES,
    }


def _slide_properties(store: "EmbeddingStore") -> dict[str, Any]:
    (width, height), frame, bounds = store.info.slide.size_level0, store.frame, store.bounds
    mpp = frame.mpp_x / frame.scale_x
    return {
        "shape": [height, width],
        "n_level": 1,
        "level_shape": [[height, width]],
        "level_downsample": [1.0],
        "mpp": mpp if math.isfinite(mpp) else None,
        "bounds": [bounds.x_level0, bounds.y_level0, bounds.width_level0, bounds.height_level0],
    }


def _raster(
    name: str, axes: str, levels: int, affine: list[list[float]], more: dict[str, Any]
) -> dict[str, Any]:
    ones = [1.0] * (len(axes) - 2)
    datasets = [
        {
            "path": f"s{level}",
            "coordinateTransformations": [
                {"type": "scale", "scale": [*ones, 2.0**level, 2.0**level]}
            ],
        }
        for level in range(levels)
    ]
    transform = {
        "type": "affine",
        "affine": affine,
        "input": _system(axes, axes),
        # Rows of the matrix are in this order.
        "output": _system("global", axes[:-2] + "xy"),
    }
    entry = {
        "name": name,
        "axes": [_axis(axis, unit=False) for axis in axes],
        "datasets": datasets,
        "coordinateTransformations": [transform],
    }
    return {"version": "0.5-dev-spatialdata", "multiscales": [entry], **more}


def _system(name: str, axes: str) -> dict[str, Any]:
    return {"name": name, "axes": [_axis(axis, unit=True) for axis in axes]}


def _axis(name: str, *, unit: bool) -> dict[str, str]:
    if name == "c":
        return {"name": "c", "type": "channel"}
    return {"name": name, "type": "space", **({"unit": "unit"} if unit else {})}


def _plain(
    group: zarr.Group, name: str, shape: Sequence[int], dimensions: Sequence[str]
) -> "zarr.Array[Any]":
    chunks = tuple(
        side if axis < len(shape) - 2 else min(CHUNK_PX, side) for axis, side in enumerate(shape)
    )
    return group.create_array(
        name, shape=tuple(shape), chunks=chunks, dtype="uint8", dimension_names=tuple(dimensions)
    )


def _scale(frame: MapFrame) -> npt.NDArray[np.float64]:
    return np.array([frame.scale_x, frame.scale_y])


def _origin(frame: MapFrame) -> npt.NDArray[np.float64]:
    return np.array([frame.x_level0, frame.y_level0])


class _Mask:
    """A mask in memory as a label map."""

    def __init__(self, values: npt.NDArray[np.uint8]) -> None:
        self._values = values
        self.height, self.width = values.shape

    def read(self, y0: int, y1: int, x0: int, x1: int) -> npt.NDArray[np.uint8]:
        return self._values[y0:y1, x0:x1]
