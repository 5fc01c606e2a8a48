import json

import numpy as np
import pytest
import rasterio

from gigavim.errors import OutputError
from gigavim.frames import GeoReference, MapFrame
from gigavim.outputs.geojson import write_geojson
from gigavim.outputs.summary import summarize, write_summary


@pytest.fixture
def labels():
    made = np.zeros((50, 70), np.uint8)
    made[10:30, 20:60] = 1
    made[15:20, 30:40] = 2
    return made


def test_areas_of_a_slide(store, frame_of, classes, labels):
    summary = summarize(store(labels), frame_of(labels), classes, tokens=12)
    tissue, nuclei = summary["classes"][1:]
    assert (tissue["pixels"], nuclei["pixels"]) == (750, 50)
    assert nuclei["fraction"] == pytest.approx(50 / 3500)
    assert tissue["area_mm2"] == pytest.approx(750 * 0.25e-6)
    assert tissue["region_area_mm2"] == pytest.approx(800 * 0.25e-6)
    assert summary["tokens"] == 12


@pytest.mark.parametrize("epsg", [32618, 3857, 4326])
def test_hectares_agree_with_the_polygons(tmp_path, store, classes, labels, epsg):
    transform = (1e-3, 0, -75.0, 0, -1e-3, 60.0) if epsg == 4326 else (30, 0, 4e5, 0, -30, 6.6e6)
    wkt = rasterio.crs.CRS.from_epsg(epsg).to_wkt()
    frame = MapFrame(70, 50, 0, 0, 1, 1, 3e7, 3e7, GeoReference(wkt, transform))
    made = store(labels)
    summary = summarize(made, frame, classes)
    write_geojson(made, frame, classes, tmp_path / "a.geojson")
    found = json.loads((tmp_path / "a.geojson").read_bytes())["features"]
    for one in found:
        value = one["properties"]["value"]
        expected = summary["classes"][value]["region_area_ha"]
        assert one["properties"]["area_ha"] == pytest.approx(expected, rel=2e-4)


def test_coverage_counts_the_map_not_what_lies_beyond(store, frame_of, classes, labels):
    coverage = np.ones((4, 5), np.uint8)
    coverage[:, 4] = 0  # 6 of 70 columns
    coverage[3, :4] = 2  # 2 of 50 rows
    summary = summarize(store(labels, coverage), frame_of(labels), classes)
    unreadable = 64 * 2 / 3500
    skipped = 6 / 70
    assert summary["coverage"] == pytest.approx(
        {"predicted": 1 - unreadable - skipped, "skipped": skipped, "unreadable": unreadable},
        abs=1e-6,
    )


def test_unknown_pixel_sizes_give_no_areas(tmp_path, store, classes, labels):
    frame = MapFrame(70, 50, 0, 0, 1, 1, float("nan"), float("nan"))
    write_summary(summarize(store(labels), frame, classes), tmp_path / "a.json")
    summary = json.loads((tmp_path / "a.json").read_bytes())
    assert summary["classes"][1]["area_mm2"] is None
    assert summary["classes"][1]["pixels"] == 750


def test_summaries_hold_paths_and_numpy_numbers(tmp_path):
    write_summary({"path": tmp_path, "n": np.int64(3), "x": np.float32(0.5)}, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_bytes()) == {
        "path": str(tmp_path), "n": 3, "x": 0.5,
    }  # fmt: skip
    with pytest.raises(OutputError, match="as JSON"):
        write_summary({"x": object()}, tmp_path / "b.json")
    assert not (tmp_path / "b.json").exists()


def test_a_label_that_is_no_class(store, frame_of, classes):
    labels = np.full((5, 5), 9, np.uint8)
    with pytest.raises(OutputError, match="value 9"):
        summarize(store(labels), frame_of(labels), classes)
