"""Polygons of a georeferenced raster in its own CRS: GeoPackage and GeoParquet.

GeoParquet follows https://geoparquet.org/releases/v1.1.0 with WKB geometries; GeoPackage is
written by GDAL through pyogrio.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import shapely

from gigavim.extras import installed
from gigavim.frames import ClassSpec, MapFrame
from gigavim.outputs.atomic import atomic_path, output_error
from gigavim.outputs.geojson import region_ids
from gigavim.outputs.ground import GroundTransform
from gigavim.outputs.labels import LabelMap
from gigavim.outputs.polygons import KEEP_ALL, PolygonOptions, Regions, regions
from gigavim.outputs.rings import Rings

BATCH = 50_000
"""Features written at once: a row group of GeoParquet."""
FIELDS = ("id", "class", "value", "color", "area_m2", "area_ha")
LAYER = "regions"

Columns = dict[str, np.ndarray]


def write_geopackage(
    labels: LabelMap,
    frame: MapFrame,
    classes: Sequence[ClassSpec],
    path: str | Path,
    *,
    options: PolygonOptions = KEEP_ALL,
    seed: str = "",
    made: str = "",
    overwrite: bool = False,
) -> int:
    """Write the regions as layer "regions" of a GeoPackage; see `write_geojson` for regions.

    Args:
        labels: the (height, width) label map.
        frame: its placement, with a georeference that has a CRS.
        classes: what its values mean.
        path: the file to write.
        options: which regions, and how smooth.
        seed: as in `write_geojson`.
        made: ISO time put into the file as that of its last change; now if absent.
        overwrite: replace the file if it exists.

    Returns:
        The number of features.

    Raises:
        OutputError: the file exists or cannot be written, or the raster has no usable CRS.
        SettingsError: pyogrio is not installed.
    """
    pyogrio = installed("pyogrio", "vector")
    raw = installed("pyogrio.raw", "vector")
    ground, count = GroundTransform.of(frame), 0
    with (
        atomic_path(path, overwrite=overwrite) as partial,
        _option(pyogrio, "OGR_CURRENT_DATE", _gdal_time(made)),
    ):
        partial.unlink()  # GDAL wants to make the file itself
        batches = _batches(labels, frame, classes, ground, options, seed)
        try:
            for place, (geometry, columns) in enumerate(batches):
                raw.write(
                    str(partial), shapely.to_wkb(geometry), list(columns.values()), list(columns),
                    layer=LAYER, driver="GPKG", geometry_type="Polygon",
                    crs=ground.crs.to_wkt(), append=place > 0,
                )  # fmt: skip
                count += len(geometry)
        except pyogrio.errors.DataSourceError as error:
            raise output_error(partial, OSError(str(error))) from error
    return count


def write_geoparquet(
    labels: LabelMap,
    frame: MapFrame,
    classes: Sequence[ClassSpec],
    path: str | Path,
    *,
    options: PolygonOptions = KEEP_ALL,
    seed: str = "",
    overwrite: bool = False,
) -> int:
    """Write the regions as GeoParquet 1.1; arguments and errors as in `write_geopackage`."""
    pyarrow = installed("pyarrow", "vector")
    parquet = installed("pyarrow.parquet", "vector")
    ground, count = GroundTransform.of(frame), 0
    about = {
        "version": "1.1.0",
        "primary_column": "geometry",
        "columns": {
            "geometry": {
                "encoding": "WKB",
                "geometry_types": ["Polygon"],
                "crs": ground.crs.to_dict(projjson=True),
            }
        },
    }
    schema = pyarrow.schema(
        [("geometry", pyarrow.binary()), ("id", pyarrow.string()), ("class", pyarrow.string()),
         ("value", pyarrow.int32()), ("color", pyarrow.string()), ("area_m2", pyarrow.float64()),
         ("area_ha", pyarrow.float64())],
        metadata={"geo": orjson.dumps(about).decode()},
    )  # fmt: skip
    with (
        atomic_path(path, overwrite=overwrite) as partial,
        parquet.ParquetWriter(partial, schema, compression="zstd") as writer,
    ):
        for geometry, columns in _batches(labels, frame, classes, ground, options, seed):
            arrays = [pyarrow.array(shapely.to_wkb(geometry), pyarrow.binary())]
            arrays += [pyarrow.array(columns[name], schema.field(name).type) for name in FIELDS]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
            count += len(geometry)
    return count


def _batches(
    labels: LabelMap,
    frame: MapFrame,
    classes: Sequence[ClassSpec],
    ground: GroundTransform,
    options: PolygonOptions,
    seed: str,
) -> Iterator[tuple[np.ndarray, Columns]]:
    """Geometries in the raster's CRS with their columns; one empty batch where there are none."""
    waiting: list[tuple[np.ndarray, Columns]] = []
    held, any_yet = 0, False
    for batch in regions(labels, classes, options=options):
        waiting.append(_placed(batch, frame, classes, ground, options, seed))
        held += len(batch.labels)
        if held >= BATCH:
            yield _joined(waiting)
            waiting, held, any_yet = [], 0, True
    if waiting or not any_yet:
        empty = Regions(np.zeros(0, np.int64), Rings.joined([]))
        yield _joined(waiting or [_placed(empty, frame, classes, ground, options, seed)])


def _placed(
    batch: Regions,
    frame: MapFrame,
    classes: Sequence[ClassSpec],
    ground: GroundTransform,
    options: PolygonOptions,
    seed: str,
) -> tuple[np.ndarray, Columns]:
    polygons = options.simplified(batch.polygons)
    _, areas_m2 = ground.to_wgs84(polygons)
    to_crs = np.array(ground.affine[:6]).reshape(2, 3)
    placed = shapely.transform(polygons, lambda xy: xy @ to_crs[:, :2].T + to_crs[:, 2])
    if ground.affine.determinant < 0:
        placed = shapely.reverse(placed)
    names = np.array([spec.name for spec in classes], object)
    colors = np.array(["#{:02x}{:02x}{:02x}".format(*spec.color_rgb) for spec in classes], object)
    return np.asarray(placed), {
        "id": np.array(region_ids(batch, classes, seed=seed), object),
        "class": names[batch.labels],
        "value": batch.labels.astype(np.int32),
        "color": colors[batch.labels],
        "area_m2": np.round(areas_m2, 3),
        "area_ha": np.round(areas_m2 / 1e4, 7),
    }


def _joined(parts: list[tuple[np.ndarray, Columns]]) -> tuple[np.ndarray, Columns]:
    columns = {name: np.concatenate([part[1][name] for part in parts]) for name in FIELDS}
    return np.concatenate([part[0] for part in parts]), columns


@contextlib.contextmanager
def _option(pyogrio: Any, name: str, value: str | None) -> Iterator[None]:
    before = pyogrio.get_gdal_config_option(name)
    change: Callable[[dict[str, Any]], None] = pyogrio.set_gdal_config_options
    change({name: value})
    try:
        yield
    finally:
        change({name: before})


def _gdal_time(iso: str) -> str | None:
    return f"{iso[:19]}.000Z" if iso else None
