"""Polygons of rasters on Earth, opened by geopandas or pyogrio and pyarrow."""

import numpy as np
import pytest
import shapely
from rasterio.crs import CRS

from gigavim.errors import OutputError
from gigavim.frames import GeoReference
from gigavim.outputs.polygons import PolygonOptions
from gigavim.outputs.vector import write_geopackage, write_geoparquet

CRS_WKT = CRS.from_epsg(32633).to_wkt()
TRANSFORMS = {
    "north up": (0.6, 0.0, 500_000.0, 0.0, -0.6, 4_600_000.0),
    "rotated": (0.52, 0.3, 500_000.0, 0.3, -0.52, 4_600_000.0),
}


@pytest.fixture(params=list(TRANSFORMS))
def ground_map(request, store, frame_of):
    labels = np.zeros((211, 305), np.uint8)
    labels[30:101, 40:205] = 1
    labels[50:60, 50:60] = 0
    labels[70:80, 100:110] = 2
    georeference = GeoReference(CRS_WKT, TRANSFORMS[request.param])
    frame = frame_of(labels, scale_xy=(1.5, 1.5), georeference=georeference)
    return store(labels), frame


def expected_corners(frame):
    a, b, c, d, e, f = frame.georeference.transform
    xy = np.array([[40, 30], [205, 30], [205, 101], [40, 101]], float)
    xy = xy * (frame.scale_x, frame.scale_y) + (frame.x_level0, frame.y_level0)
    return np.stack([a * xy[:, 0] + b * xy[:, 1] + c, d * xy[:, 0] + e * xy[:, 1] + f], 1)


def read_gpkg(path):
    raw = pytest.importorskip("pyogrio.raw")
    meta, _, wkb, columns = raw.read(path, layer="regions")
    return meta["crs"], shapely.from_wkb(wkb), dict(zip(meta["fields"], columns, strict=True))


def read_parquet(path):
    geopandas = pytest.importorskip("geopandas")
    table = geopandas.read_parquet(path)
    columns = {name: table[name].to_numpy() for name in table.columns if name != "geometry"}
    return table.crs.to_string(), table.geometry.to_numpy(), columns


WRITERS = {"a.gpkg": (write_geopackage, read_gpkg), "a.parquet": (write_geoparquet, read_parquet)}


@pytest.mark.parametrize("name", list(WRITERS))
def test_polygons_lie_where_the_ground_is(ground_map, classes, tmp_path, name):
    pytest.importorskip("pyogrio" if name.endswith("gpkg") else "pyarrow")
    labels, frame = ground_map
    write, read = WRITERS[name]
    assert write(labels, frame, classes, tmp_path / name) == 2
    crs, polygons, columns = read(tmp_path / name)
    assert crs == "EPSG:32633"
    assert sorted(columns["class"]) == ["nuclei", "tissue"]
    tissue = polygons[list(columns["class"]).index("tissue")]
    assert len(tissue.interiors) == 1  # the other hole is a nucleus, which is in tissue
    assert tissue.exterior.is_ccw
    corners = np.array(tissue.exterior.coords)[:-1]
    for corner in expected_corners(frame):
        assert np.abs(corners - corner).sum(1).min() < 1e-3
    pixel_m2 = (
        abs(np.linalg.det(np.array(frame.georeference.transform).reshape(2, 3)[:, :2])) * 2.25
    )
    area = float(columns["area_m2"][list(columns["class"]).index("tissue")])
    assert area == pytest.approx((165 * 71 - 100) * pixel_m2, rel=2e-3)


@pytest.mark.parametrize("name", list(WRITERS))
def test_nothing_to_draw_is_an_empty_layer(store, frame_of, classes, tmp_path, name):
    pytest.importorskip("pyogrio" if name.endswith("gpkg") else "pyarrow")
    labels = np.zeros((20, 30), np.uint8)
    frame = frame_of(labels, georeference=GeoReference(CRS_WKT, TRANSFORMS["north up"]))
    write, read = WRITERS[name]
    assert write(store(labels), frame, classes, tmp_path / name) == 0
    assert len(read(tmp_path / name)[1]) == 0


def test_small_ones_are_left_out(ground_map, classes, tmp_path):
    pytest.importorskip("pyarrow")
    labels, frame = ground_map
    options = PolygonOptions(min_area_px=101)
    assert write_geoparquet(labels, frame, classes, tmp_path / "a.parquet", options=options) == 1


def test_the_same_bytes_whatever_the_clock_says(ground_map, classes, tmp_path):
    pytest.importorskip("pyogrio")
    labels, frame = ground_map
    for name in ("a.gpkg", "b.gpkg"):
        write_geopackage(labels, frame, classes, tmp_path / name, made="2026-01-02T03:04:05+00:00")
    assert (tmp_path / "a.gpkg").read_bytes() == (tmp_path / "b.gpkg").read_bytes()


def test_without_a_crs_it_cannot_be_placed(store, frame_of, classes, tmp_path):
    pytest.importorskip("pyarrow")
    labels = np.ones((20, 30), np.uint8)
    frame = frame_of(labels, georeference=GeoReference("", TRANSFORMS["north up"]))
    with pytest.raises(OutputError, match="no CRS"):
        write_geoparquet(store(labels), frame, classes, tmp_path / "a.parquet")
