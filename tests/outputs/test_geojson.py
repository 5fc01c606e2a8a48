import gzip
import json
from uuid import UUID

import numpy as np
import pytest
import rasterio
import shapely
from shapely.geometry import shape

from gigavim.errors import OutputError
from gigavim.frames import GeoReference, MapFrame
from gigavim.outputs.geojson import write_geojson
from gigavim.outputs.ground import GroundTransform, ring_areas_m2
from gigavim.outputs.polygons import PolygonOptions

# (y0, y1, x0, x1) in map pixels, across the seams of the tiles used below.
RECTANGLE = (37, 91, 23, 200)


@pytest.fixture
def labels():
    made = np.zeros((211, 333), np.uint8)
    y0, y1, x0, x1 = RECTANGLE
    made[y0:y1, x0:x1] = 1
    made[50:55, 60:67] = 2
    return made


def features(path):
    collection = json.loads(path.read_bytes())
    assert collection["type"] == "FeatureCollection"
    assert "crs" not in collection
    return collection["features"]


def test_every_feature_is_what_qupath_wants(tmp_path, store, labels, frame_of, classes):
    path = tmp_path / "a.geojson"
    count = write_geojson(store(labels), frame_of(labels), classes, path, tile_px=64)
    found = features(path)
    assert count == len(found) == 2
    by_name = {one["properties"]["classification"]["name"]: one for one in found}
    for one in found:
        assert str(UUID(one["id"])) == one["id"]
        assert set(one) == {"type", "id", "geometry", "properties"}
    tissue, nuclei = by_name["tissue"]["properties"], by_name["nuclei"]["properties"]
    assert tissue["objectType"] == "annotation"
    assert nuclei["objectType"] == "detection"
    assert nuclei["classification"] == {"name": "nuclei", "color": [30, 40, 200]}
    # Tissue is everything in it, nuclei included: no hole.
    assert tissue["measurements"] == {"Area um^2": 54 * 177 * 0.25}
    assert nuclei["measurements"] == {"Area um^2": 35 * 0.25}
    assert len(by_name["tissue"]["geometry"]["coordinates"]) == 1


@pytest.mark.parametrize(
    ("origin", "x0", "y0"), [(None, 0.0, 0.0), ((0, 0), 1037.0, 513.0), ((1000, 500), 37.0, 13.0)]
)
def test_a_rectangle_lies_where_it_is_on_the_slide(
    tmp_path, store, labels, frame_of, classes, origin, x0, y0
):
    path = tmp_path / "a.geojson"
    write_geojson(
        store(labels), frame_of(labels), classes, path, origin_xy_level0=origin, tile_px=64
    )
    tissue = next(
        shape(one["geometry"])
        for one in features(path)
        if one["properties"]["classification"]["name"] == "tissue"
    )
    top, bottom, left, right = RECTANGLE
    expected = (x0 + left * 2.004, y0 + top * 1.996, x0 + right * 2.004, y0 + bottom * 1.996)
    assert tissue.bounds == pytest.approx(expected, abs=1e-3)


def test_whole_pixels_are_written_as_integers(tmp_path, store, labels, frame_of, classes):
    path = tmp_path / "a.geojson"
    write_geojson(store(labels), frame_of(labels, scale_xy=(4.0, 4.0)), classes, path)
    ring = features(path)[0]["geometry"]["coordinates"][0]
    assert all(isinstance(value, int) for point in ring for value in point)


def test_runs_repeat_byte_for_byte_and_ids_differ_between_slides(
    tmp_path, store, labels, frame_of, classes
):
    made, frame = store(labels), frame_of(labels)
    for name, seed in (("a", "one"), ("b", "one"), ("c", "two")):
        write_geojson(made, frame, classes, tmp_path / f"{name}.geojson.gz", seed=seed)
    packed = [(tmp_path / f"{name}.geojson.gz").read_bytes() for name in "abc"]
    assert packed[0] == packed[1]
    ids = [{one["id"] for one in json.loads(gzip.decompress(data))["features"]} for data in packed]
    assert not ids[0] & ids[2]


def test_ids_and_geometry_do_not_depend_on_the_tiles(tmp_path, store, frame_of, classes):
    labels = np.random.default_rng(0).integers(0, 3, (90, 80), dtype=np.uint8)
    made, frame = store(labels), frame_of(labels)
    found = []
    for tile_px in (2048, 32, 17):
        path = tmp_path / f"{tile_px}.geojson"
        write_geojson(made, frame, classes, path, tile_px=tile_px)
        found.append({one["id"]: json.dumps(one) for one in features(path)})
    assert found[0] == found[1] == found[2]


def test_an_empty_map_is_a_valid_collection(tmp_path, store, frame_of, classes):
    labels = np.zeros((1, 1), np.uint8)
    made = store(labels)
    path = tmp_path / "a.geojson"
    assert write_geojson(made, frame_of(labels), classes, path, provenance={"version": "x"}) == 0
    assert features(path) == []
    assert json.loads(path.read_bytes())["gigavim"] == {"version": "x"}


def test_simplification_only_where_asked_for(tmp_path, store, frame_of, classes):
    labels = np.tri(100, 100, dtype=np.uint8)
    made, frame = store(labels), frame_of(labels)
    write_geojson(made, frame, classes, tmp_path / "a.geojson")
    write_geojson(
        made, frame, classes, tmp_path / "b.geojson", options=PolygonOptions(simplify_px=1.0)
    )
    exact, simple = (features(tmp_path / name)[0] for name in ("a.geojson", "b.geojson"))
    assert len(exact["geometry"]["coordinates"][0]) == 203
    assert len(simple["geometry"]["coordinates"][0]) < 10
    assert exact["properties"] == simple["properties"]
    assert exact["id"] == simple["id"]


def test_a_wrong_label_leaves_no_file(tmp_path, store, frame_of, classes):
    labels = np.full((20, 20), 9, np.uint8)
    folder = tmp_path / "out"
    with pytest.raises(OutputError, match="more than 3 classes"):
        write_geojson(store(labels), frame_of(labels), classes, folder / "a.geojson")
    assert not folder.exists()


def ground_frame(labels, epsg, transform, gsd_m, scale=2.0):
    return MapFrame(
        labels.shape[1], labels.shape[0], 10.0, 20.0, scale, scale, gsd_m * 1e6, gsd_m * 1e6,
        GeoReference(rasterio.crs.CRS.from_epsg(epsg).to_wkt(), transform),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("epsg", "transform", "gsd_m"),
    [
        (32618, (0.5, 0.0, 500000.0, 0.0, -0.5, 4300000.0), 1.0),
        (32618, (0.4, 0.3, 500000.0, 0.3, -0.4, 4300000.0), 1.0),
        (3857, (0.5, 0.0, -8e6, 0.0, -0.5, 4.8e6), 1.0),
        (4326, (1e-5, 0.0, -75.0, 0.0, -1e-5, 40.0), 2.0),
    ],
    ids=["utm", "rotated", "mercator", "degrees"],
)
def test_georeferenced_polygons_are_wgs84(tmp_path, store, labels, classes, epsg, transform, gsd_m):
    path = tmp_path / "a.geojson"
    frame = ground_frame(labels, epsg, transform, gsd_m)
    write_geojson(store(labels), frame, classes, path, tile_px=64)
    tissue = next(one for one in features(path) if one["properties"]["class"] == "tissue")
    polygon = shape(tissue["geometry"])
    assert polygon.is_valid
    assert polygon.exterior.is_ccw
    top, bottom, left, right = RECTANGLE
    corners = rasterio.Affine(*transform)
    expected = [
        corners @ (10 + x * 2.0, 20 + y * 2.0)
        if hasattr(corners, "__matmul__")
        else corners * (10 + x * 2.0, 20 + y * 2.0)
        for x, y in ((left, top), (right, top), (right, bottom), (left, bottom))
    ]
    back = rasterio.warp.transform(
        "EPSG:4326", f"EPSG:{epsg}", *np.array(polygon.exterior.coords).T.tolist()
    )
    pixel = np.hypot(transform[0], transform[3])
    assert (
        shapely.hausdorff_distance(
            shapely.Polygon(np.array(back).T).exterior, shapely.Polygon(expected).exterior
        )
        < 0.1 * pixel
    )
    assert tissue["properties"]["area_ha"] == pytest.approx(
        tissue["properties"]["area_m2"] / 1e4, rel=1e-3
    )


def test_areas_are_those_of_the_ellipsoid():
    # UTM's scale on the central meridian is 0.9996.
    labels = np.ones((100, 100), np.uint8)
    frame = ground_frame(labels, 32618, (1.0, 0, 500000.0, 0, -1.0, 4300000.0), 1.0, scale=1.0)
    square = np.array([shapely.box(0, 0, 100, 100)])
    assert GroundTransform.of(frame).to_wgs84(square)[1] == pytest.approx(1e4 / 0.9996**2, rel=1e-6)
    # The whole Earth: 510,065,621.724 km² (WGS 84).
    lon = np.arange(-180, 181, 90.0)
    ring = np.concatenate(
        [np.stack([lon, lon * 0 - 90], 1), np.stack([lon[::-1], lon * 0 + 90], 1)]
    )
    ring = np.concatenate([ring, ring[:1]])
    area_km2 = ring_areas_m2(ring, np.array([0, len(ring)]))[0] / 1e6
    assert area_km2 == pytest.approx(510_065_621.724, rel=1e-9)


def test_a_polygon_over_the_antimeridian_is_cut_there(tmp_path, store, classes):
    labels = np.ones((20, 1200), np.uint8)
    frame = ground_frame(labels, 32601, (500.0, 0, 166000.0, 0, -500.0, 7000000.0), 500.0, 1.0)
    path = tmp_path / "a.geojson"
    write_geojson(store(labels), frame, classes, path)
    geometry = features(path)[0]["geometry"]
    assert geometry["type"] == "MultiPolygon"
    bounds = sorted(part.bounds[::2] for part in shape(geometry).geoms)
    assert bounds[0][0] == -180
    assert bounds[1][1] == 180
    assert all(high - low < 20 for low, high in bounds)


def test_a_crs_that_is_none(tmp_path, store, labels, classes):
    frame = ground_frame(labels, 32618, (1.0, 0, 0, 0, -1.0, 0), 1.0)
    broken = MapFrame(
        frame.width_px, frame.height_px, 0, 0, 1, 1, 1e6, 1e6,
        GeoReference("no such thing", frame.georeference.transform),
    )  # fmt: skip
    with pytest.raises(OutputError, match="not understood"):
        write_geojson(store(labels), broken, classes, tmp_path / "out" / "a.geojson")
    assert not (tmp_path / "out").exists()
