"""Regions as GeoJSON: QuPath objects for slides, WGS84 features for georeferenced rasters.

QuPath's dialect is that of its QuPathTypeAdapters and GsonTools (v0.5 and later): `objectType`,
`classification` with name and colour, and `measurements` are properties, ids are UUIDs, coordinates
are level-0 pixels of the image as QuPath shows it, and there is no `crs` member. For georeferenced
rasters RFC 7946 applies: longitude and latitude in WGS84, exterior rings counter-clockwise.
"""

import contextlib
import gzip
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO
from uuid import NAMESPACE_URL, uuid5

import numpy as np
import orjson
import shapely

from gigavim.frames import ClassSpec, MapFrame
from gigavim.outputs.atomic import atomic_path
from gigavim.outputs.ground import GroundTransform
from gigavim.outputs.labels import LabelMap
from gigavim.outputs.polygons import KEEP_ALL, TILE_PX, PolygonOptions, Regions, regions

RINGS_AT_ONCE = 4096
DECIMALS_PX = 3
DECIMALS_DEGREES = 8
"""About a millimetre."""


def write_geojson(
    labels: LabelMap,
    frame: MapFrame,
    classes: Sequence[ClassSpec],
    path: str | Path,
    *,
    origin_xy_level0: tuple[float, float] | None = None,
    seed: str = "",
    provenance: dict[str, Any] | None = None,
    options: PolygonOptions = KEEP_ALL,
    overwrite: bool = False,
    tile_px: int = TILE_PX,
    workers: int = 2,
    done: Callable[[int], None] | None = None,
) -> int:
    """Write the regions of a label map feature by feature; gzip if `path` ends in `.gz`.

    Regions are 4-connected and follow the edges of map pixels; holes are kept. A class's regions
    include those of the classes below it; "background" and classes of object type "none" are not
    written. Where the frame has a georeference with a CRS the features are in WGS84 with areas in
    m² and ha on the ellipsoid, else they are QuPath objects with the area in µm².

    Args:
        labels: the (height, width) label map.
        frame: its placement on the slide.
        classes: name, colour, parent and object type of each label value.
        path: the file to write.
        origin_xy_level0: level-0 (x, y) that becomes (0, 0). By default the map's own, which is
            that of the slide's bounds: QuPath crops slides to their bounds. Pass (0, 0) for
            absolute coordinates. Georeferenced features have no use for it.
        seed: makes ids differ between slides (the slide's fingerprint, say). The same seed and
            the same map give the same ids.
        provenance: written as the collection's member "gigavim", which readers ignore.
        options: which regions, and how smooth.
        overwrite: replace the file if it exists.
        tile_px: side of the tiles the map is traced in; no geometry depends on it.
        workers: threads that read and trace tiles.
        done: called with the map pixels finished since the last call.

    Returns:
        The number of features.

    Raises:
        OutputError: the file exists or cannot be written, or the raster's CRS is not convertible.
    """
    describe = _describer(frame, classes, origin_xy_level0=origin_xy_level0, seed=seed)
    count = 0
    with atomic_path(path, overwrite=overwrite) as partial, _opened(partial) as out:
        head = b'{"type":"FeatureCollection",'
        if provenance is not None:
            head += b'"gigavim":' + orjson.dumps(provenance) + b","
        out.write(head + b'"features":[')
        found = regions(
            labels, classes, options=options, tile_px=tile_px, workers=workers, done=done
        )
        for batch in found:
            for feature in describe(batch, options):
                out.write(b",\n" if count else b"\n")
                _write_feature(out, feature)
                count += 1
        out.write(b"\n]}\n")
    return count


def _write_feature(out: BinaryIO, feature: dict[str, Any]) -> None:
    """Write one feature; the rings of a polygon with very many in parts, not all as one text."""
    rings = feature["geometry"]["coordinates"]
    if feature["geometry"]["type"] != "Polygon" or len(rings) <= RINGS_AT_ONCE:
        out.write(orjson.dumps(feature, option=orjson.OPT_SERIALIZE_NUMPY))
        return
    empty = feature | {"geometry": {"type": "Polygon", "coordinates": []}}
    head, tail = orjson.dumps(empty).split(b'"coordinates":[]', 1)
    out.write(head + b'"coordinates":[')
    for start in range(0, len(rings), RINGS_AT_ONCE):
        part = orjson.dumps(rings[start : start + RINGS_AT_ONCE], option=orjson.OPT_SERIALIZE_NUMPY)
        out.write((b"," if start else b"") + part[1:-1])
    out.write(b"]" + tail)


Describer = Callable[[Regions, PolygonOptions], Iterator[dict[str, Any]]]


def _describer(
    frame: MapFrame,
    classes: Sequence[ClassSpec],
    *,
    origin_xy_level0: tuple[float, float] | None,
    seed: str,
) -> Describer:
    if frame.georeference is not None and frame.georeference.crs_wkt:
        return _ground_describer(frame, classes, seed=seed)
    return _qupath_describer(frame, classes, origin_xy_level0=origin_xy_level0, seed=seed)


def _qupath_describer(
    frame: MapFrame,
    classes: Sequence[ClassSpec],
    *,
    origin_xy_level0: tuple[float, float] | None,
    seed: str,
) -> Describer:
    own = (frame.x_level0, frame.y_level0)
    shift = np.subtract(own, own if origin_xy_level0 is None else origin_xy_level0)
    scale = np.array([frame.scale_x, frame.scale_y])
    known = math.isfinite(frame.mpp_x * frame.mpp_y)

    def describe(batch: Regions, options: PolygonOptions) -> Iterator[dict[str, Any]]:
        areas_um2 = batch.rings.areas() * frame.mpp_x * frame.mpp_y
        ids = region_ids(batch, classes, seed=seed)
        geometries: Iterable[dict[str, Any]]
        if options.simplify_px > 0:
            polygons = options.simplified(batch.polygons)
            geometries = _geometries(polygons, lambda xy: _exact(xy, scale, shift))
        else:
            shapes = batch.rings.geojson(_exact(batch.rings.xy, scale, shift))
            geometries = ({"type": "Polygon", "coordinates": rings} for rings in shapes)
        for label, area_um2, uid, geometry in zip(
            batch.labels.tolist(), areas_um2.tolist(), ids, geometries, strict=True
        ):
            spec = classes[label]
            yield {
                "type": "Feature",
                "id": uid,
                "geometry": geometry,
                "properties": {
                    "objectType": spec.object_type,
                    "classification": {"name": spec.name, "color": spec.color_rgb},
                    "measurements": {"Area um^2": round(area_um2, 6)} if known else {},
                },
            }

    return describe


def _ground_describer(frame: MapFrame, classes: Sequence[ClassSpec], *, seed: str) -> Describer:
    ground = GroundTransform.of(frame)

    def describe(batch: Regions, options: PolygonOptions) -> Iterator[dict[str, Any]]:
        ids = region_ids(batch, classes, seed=seed)
        polygons, areas_m2 = ground.to_wgs84(options.simplified(batch.polygons))
        geometries = _geometries(polygons, lambda xy: np.round(xy, DECIMALS_DEGREES))
        for label, area_m2, uid, geometry in zip(
            batch.labels.tolist(), areas_m2.tolist(), ids, geometries, strict=True
        ):
            spec = classes[label]
            yield {
                "type": "Feature",
                "id": uid,
                "geometry": geometry,
                "properties": {
                    "class": spec.name,
                    "value": label,
                    "color": "#{:02x}{:02x}{:02x}".format(*spec.color_rgb),
                    "area_m2": round(area_m2, 3),
                    "area_ha": round(area_m2 / 1e4, 7),
                },
            }

    return describe


def region_ids(batch: Regions, classes: Sequence[ClassSpec], *, seed: str) -> list[str]:
    """UUIDs of regions: no two of a class begin at the same corner of a pixel."""
    if not len(batch.labels):
        return []
    corners = batch.rings.first_corners().tolist()
    return [
        str(uuid5(NAMESPACE_URL, f"gigavim:{seed}:{classes[label].name}:{x}:{y}"))
        for label, (x, y) in zip(batch.labels.tolist(), corners, strict=True)
    ]


def _exact(xy: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """`xy` scaled and shifted, to a thousandth of a pixel; as integers where all are."""
    if (scale == np.round(scale)).all() and (shift == np.round(shift)).all():
        if (scale == 1).all() and not shift.any():
            return xy
        exact = xy * scale.astype(np.int32)
        exact += shift.astype(np.int32)
        return exact
    xy = xy * scale
    xy += shift
    rounded = np.round(xy, DECIMALS_PX, out=xy)
    whole = rounded.astype(np.int32)  # no slide has 2^31 px a side
    return whole if np.array_equal(whole, rounded) else rounded


def _geometries(
    polygons: np.ndarray, convert: Callable[[np.ndarray], np.ndarray]
) -> Iterator[dict[str, Any]]:
    """GeoJSON geometries whose coordinates are slices of one array."""
    multi = (shapely.get_type_id(polygons) == shapely.GeometryType.MULTIPOLYGON).tolist()
    parts, owner = polygons, np.arange(len(polygons))
    if any(multi):  # parts are copies
        parts, owner = shapely.get_parts(polygons, return_index=True)
    _, xy, (ring_starts, polygon_starts) = shapely.to_ragged_array(parts)
    xy = np.ascontiguousarray(convert(xy))
    starts, first_ring = ring_starts.tolist(), polygon_starts.tolist()
    rings = [xy[start:stop] for start, stop in pairwise(starts)]
    shapes = [rings[a:b] for a, b in pairwise(first_ring)]
    part_of = np.searchsorted(owner, np.arange(len(polygons) + 1)).tolist()
    for place, is_multi in enumerate(multi):
        mine = shapes[part_of[place] : part_of[place + 1]]
        if is_multi:
            yield {"type": "MultiPolygon", "coordinates": mine}
        else:
            yield {"type": "Polygon", "coordinates": mine[0]}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A buffered file to write to, compressed where the name says so; the same bytes every time."""
    with path.open("wb") as raw:
        if path.suffix != ".gz":
            yield raw
            return
        with (
            # No name and no time in the header, or two runs would differ.
            gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0) as packed,
            io.BufferedWriter(packed, 1 << 20) as out,
        ):
            yield out
