"""OME-TIFF and GeoTIFF, read back by libraries that did not write them."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import rasterio
import tifffile
from PIL import Image
from rasterio.crs import CRS

from gigavim.errors import OutputError
from gigavim.frames import GeoReference, MapFrame
from gigavim.outputs.geotiff import NODATA, write_geotiff
from gigavim.outputs.ome_tiff import TOP_LEVEL_PX, level_shapes, write_ome_tiff

OME = {"ome": "http://www.openmicroscopy.org/Schemas/OME/2016-06"}
SHAPES = [(1, 1), (1500, 1), (1, 1500), (513, 511), (2049, 1031)]


def noise(shape):
    return np.random.default_rng(1).integers(0, 3, shape, dtype=np.uint8)


def geo_frame(labels, transform=(0.4, 0.3, 500000.0, 0.3, -0.4, 4300000.0), epsg=32618):
    return MapFrame(
        labels.shape[1], labels.shape[0], 10.0, 20.0, 2.0, 2.0, 1e6, 1e6,
        GeoReference(CRS.from_epsg(epsg).to_wkt(), transform),
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ome_tiff_reads_back(tmp_path, store, frame_of, classes, shape):
    labels = noise(shape)
    path = tmp_path / "a.ome.tif"
    write_ome_tiff(store(labels), frame_of(labels), classes, path)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_ome
        levels = tiff.series[0].levels
        assert np.array_equal(levels[0].asarray(), labels)
        assert [level.shape for level in levels] == level_shapes(*shape)
        assert max(levels[-1].shape) <= TOP_LEVEL_PX
        assert all(level.keyframe.is_tiled for level in levels)
    # An independent decoder: GDAL.
    with rasterio.open(path) as raster:
        assert np.array_equal(raster.read(1), labels)
        assert raster.colormap(1)[2][:3] == classes[2].color_rgb


def test_reduced_levels_stay_in_place(tmp_path, store, frame_of, classes):
    labels = np.zeros((4096, 4096), np.uint8)
    labels[1024:3072, 512:2048] = 1
    path = tmp_path / "a.ome.tif"
    write_ome_tiff(store(labels), frame_of(labels), classes, path)
    for level in tifffile.TiffFile(path).series[0].levels:
        ys, xs = np.nonzero(level.asarray())
        factor = 4096 / level.shape[0]
        found = np.array([ys.min(), ys.max() + 1, xs.min(), xs.max() + 1]) * factor
        assert np.abs(found - (1024, 3072, 512, 2048)).max() <= factor / 2


def test_ome_xml_tells_size_and_classes(tmp_path, store, frame_of, classes):
    labels = noise((20, 30))
    path = tmp_path / "a.ome.tif"
    write_ome_tiff(store(labels), frame_of(labels), classes, path, name="CMU <1> & 2")
    with tifffile.TiffFile(path) as tiff:
        root = ET.fromstring(tiff.ome_metadata)
        x_resolution = tiff.pages[0].tags["XResolution"].value
    assert root.find(".//ome:Image", OME).get("Name") == "CMU <1> & 2"
    pixels = root.find(".//ome:Pixels", OME)
    assert float(pixels.get("PhysicalSizeX")) == 0.5
    assert pixels.get("PhysicalSizeXUnit") == "µm"
    assert (pixels.get("SizeX"), pixels.get("SizeY")) == ("30", "20")
    names = {item.get("K"): item.text for item in root.iterfind(".//ome:M", OME)}
    assert names == {"0": "background", "1": "tissue", "2": "nuclei"}
    table = json.loads(root.find(".//ome:CommentAnnotation/ome:Value", OME).text)
    assert table[2] == {"value": 2, "name": "nuclei", "color": [30, 40, 200], "parent": "tissue"}
    assert x_resolution[0] / x_resolution[1] == pytest.approx(20000)  # per cm


def test_any_viewer_shows_the_colours(tmp_path, store, frame_of, classes):
    labels = noise((40, 30))
    path = tmp_path / "a.ome.tif"
    write_ome_tiff(store(labels), frame_of(labels), classes, path)
    with Image.open(path) as image:
        shown = np.asarray(image.convert("RGB"))
    assert np.array_equal(shown, np.array([c.color_rgb for c in classes], np.uint8)[labels])


def test_ome_tiff_repeats_byte_for_byte(tmp_path, store, frame_of, classes):
    labels = noise((1300, 700))
    made = store(labels)
    for name in ("a", "b"):
        write_ome_tiff(made, frame_of(labels), classes, tmp_path / name, workers=2)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_geotiff_reads_back(tmp_path, store, classes, shape):
    labels = noise(shape)
    path = tmp_path / "a.tif"
    frame = geo_frame(labels)
    write_geotiff(store(labels), frame, classes, path, provenance={"version": "x"})
    with rasterio.open(path) as raster:
        assert np.array_equal(raster.read(1), labels)
        assert raster.crs == CRS.from_epsg(32618)
        # Map pixel edge (0, 0) is level-0 (10, 20): 500000 + 0.4 * 10 + 0.3 * 20.
        assert raster.transform[:6] == pytest.approx((0.8, 0.6, 500010.0, 0.6, -0.8, 4299995.0))
        assert raster.nodata == NODATA
        assert raster.colormap(1)[1] == (*classes[1].color_rgb, 255)
        assert raster.tags()["CLASS_2"] == "nuclei"
        assert json.loads(raster.tags()["PROVENANCE"]) == {"version": "x"}
        assert raster.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        if min(shape) > 1000:
            assert raster.overviews(1)
    assert np.array_equal(tifffile.imread(path), labels)
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "scratch"] == ["a.tif"]


def test_overviews_hold_labels_only(tmp_path, store, classes):
    labels = noise((1025, 1025)) // 2 * 2
    path = tmp_path / "a.tif"
    write_geotiff(store(labels), geo_frame(labels), classes, path)
    with rasterio.open(path, overview_level=0) as raster:
        assert set(np.unique(raster.read(1))) <= {0, 2}


def test_what_was_unreadable_is_nodata(tmp_path, store, classes):
    labels = np.ones((40, 40), np.uint8)
    coverage = np.ones((3, 3), np.uint8)
    coverage[1, 2] = 2
    path = tmp_path / "a.tif"
    write_geotiff(store(labels, coverage), geo_frame(labels), classes, path)
    with rasterio.open(path) as raster:
        mask = raster.read_masks(1)
    assert not mask[16:32, 32:].any()
    assert (mask == 0).sum() == 16 * 8


def test_writers_refuse_what_they_cannot_write(tmp_path, store, frame_of, classes):
    labels = noise((20, 30))
    made = store(labels)
    with pytest.raises(OutputError, match="not georeferenced"):
        write_geotiff(made, frame_of(labels), classes, tmp_path / "a.tif")
    (tmp_path / "a.ome.tif").write_text("good")
    with pytest.raises(OutputError, match="exists already"):
        write_ome_tiff(made, frame_of(labels), classes, tmp_path / "a.ome.tif")
    assert (tmp_path / "a.ome.tif").read_text() == "good"
    assert not (tmp_path / "a.tif").exists()
