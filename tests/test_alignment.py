"""What is written lies where the slide's pixels lie, to the pixel, through the whole pipeline.

The model of these tests is an exact one: its tokens carry the brightness of their pixels unchanged
through the encoder, and the head calls dark pixels tissue. So the map's edges are the slide's.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.warp
import tifffile
from PIL import Image
from rasterio.crs import CRS
from rasterio.transform import Affine

import gigavim
from gigavim.config import Settings
from gigavim.segmentation import Segmentation

DARK, LIGHT = 60, 240


@pytest.fixture(scope="module", params=[(4, 4), (4, 2)], ids=["adjacent", "overlapping"])
def exact_model(request, make_exact_model) -> Path:
    return make_exact_model(*request.param)


def segment(path: Path, model: Path, **sections) -> Segmentation:
    settings = Settings().with_flags(
        model={"name": str(model), "allow_mpp_mismatch": True},
        tokens={"tissue": "none"},
        compute={"precision": "fp32", "threads": 1},
        output={"directory": str(path.parent / "out"), **sections.get("output", {})},
    )
    return gigavim.segment(path, settings=settings)


def rectangle(height: int, width: int, box_xyxy: tuple[int, int, int, int]) -> np.ndarray:
    pixels = np.full((height, width, 3), LIGHT, np.uint8)
    x0, y0, x1, y1 = box_xyxy
    pixels[y0:y1, x0:x1] = DARK
    return pixels


def box_of(labels: np.ndarray) -> tuple[int, int, int, int]:
    y, x = np.nonzero(labels == 1)
    return int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1


def polygon_box(path: Path) -> tuple[float, float, float, float]:
    (feature,) = json.loads(path.read_text())["features"]
    ring = np.array(feature["geometry"]["coordinates"][0])
    return (*ring.min(0), *ring.max(0))


@pytest.mark.parametrize("in_bounds", [True, False])
def test_a_slide_with_bounds(exact_model, write_scn, tmp_path, in_bounds):
    path = tmp_path / "leica.scn"
    write_scn(path, rectangle(397, 601, (200, 100, 301, 151)), x=100, y=60, canvas_hw=(800, 1000))
    with gigavim.open_slide(path) as slide:
        assert (slide.bounds.x_level0, slide.bounds.y_level0) == (100, 60)
    result = segment(path, exact_model, output={"qupath_bounds": in_bounds})
    labels = tifffile.imread(result.outputs["ome-tiff"])
    assert labels.shape == (397, 601)
    assert box_of(labels) == (200, 100, 301, 151)
    shift = 0 if in_bounds else 1
    expected = (200 + 100 * shift, 100 + 60 * shift, 301 + 100 * shift, 151 + 60 * shift)
    assert polygon_box(result.outputs["geojson"]) == expected


@pytest.mark.parametrize("mpp", [0.5, 0.25])
def test_a_mirax_slide_of_photos_that_stray_from_their_grid(
    exact_model, mrxs_writer, tmp_path, mpp
):
    path = tmp_path / "mirax.mrxs"
    box = (270, 160, 430, 324)  # across all four photos
    photos = {(2, 1): (232, 114), (3, 1): (350, 114), (2, 2): (232, 230), (3, 2): (350, 228)}
    world = rectangle(600, 700, box)
    mrxs_writer(path, world, photos, grid_wh=(6, 5), overlap_px=14, mpp=mpp)
    with gigavim.open_slide(path) as slide:
        assert (slide.bounds.x_level0, slide.bounds.y_level0) == (232, 114)
        assert (slide.bounds.width_level0, slide.bounds.height_level0) == (246, 244)
    result = segment(path, exact_model)
    labels = tifffile.imread(result.outputs["ome-tiff"])
    scale = round(0.5 / mpp)  # at 0.25 the model sees level 1
    assert labels.shape == (244 // scale, 246 // scale)
    moved = [box[0] - 232, box[1] - 114, box[2] - 232, box[3] - 114]
    assert box_of(labels) == tuple(edge // scale for edge in moved)
    assert polygon_box(result.outputs["geojson"]) == tuple(moved)
    assert json.loads(result.outputs["summary"].read_text())["map"]["x_level0"] == 232


@pytest.mark.parametrize("mpp", [0.5, 0.25, 0.3, 0.21])
def test_any_downsample_and_odd_sizes(exact_model, tmp_path, mpp):
    path = tmp_path / "slide.tif"
    box = (121, 77, 433, 250)
    tifffile.imwrite(
        path, rectangle(311, 517, box), tile=(128, 128), photometric="rgb",
        resolution=(1e4 / mpp, 1e4 / mpp), resolutionunit="CENTIMETER",
    )  # fmt: skip
    result = segment(path, exact_model)
    scale = 0.5 / mpp
    labels = tifffile.imread(result.outputs["ome-tiff"])
    assert labels.shape == (int(np.ceil(311 / scale)), int(np.ceil(517 / scale)))
    # In level-0 pixels the written edge is within half a map pixel of the true one.
    assert (
        np.abs(np.subtract(polygon_box(result.outputs["geojson"]), box)).max() <= scale / 2 + 1e-6
    )
    with tifffile.TiffFile(result.outputs["ome-tiff"]) as tiff:
        assert 'PhysicalSizeX="0.5"' in tiff.ome_metadata


def test_the_overlay_shows_it_in_place(exact_model, tmp_path):
    path = tmp_path / "slide.tif"
    tifffile.imwrite(
        path, rectangle(300, 420, (120, 64, 360, 200)), photometric="rgb",
        resolution=(2e4, 2e4), resolutionunit="CENTIMETER",
    )  # fmt: skip
    result = segment(path, exact_model)
    picture = np.asarray(Image.open(result.outputs["overlay"]).convert("RGB")).astype(int)
    reddish = picture[:300, :420, 0] - picture[:300, :420, 1] > 30
    assert box_of(reddish) == (120, 64, 360, 200)


@pytest.mark.parametrize("rotation_degrees", [0, 30])
def test_a_georeferenced_raster_keeps_its_ground(exact_model, tmp_path, rotation_degrees):
    path = tmp_path / "field.tif"
    pixels = rectangle(211, 305, (40, 30, 205, 101))
    transform = (
        Affine.translation(500_000, 4_600_000)
        @ Affine.rotation(rotation_degrees)
        @ Affine.scale(0.6, -0.6)
    )
    with rasterio.open(
        path, "w", driver="GTiff", width=305, height=211, count=3, dtype="uint8",
        crs=CRS.from_epsg(32633), transform=transform,
    ) as raster:  # fmt: skip
        raster.write(pixels.transpose(2, 0, 1))
    result = segment(path, exact_model)
    with rasterio.open(result.outputs["geotiff"]) as labels:
        assert labels.crs == CRS.from_epsg(32633)
        assert labels.transform.almost_equals(transform, precision=1e-6)
        assert box_of(labels.read(1)) == (40, 30, 205, 101)
    (feature,) = json.loads(result.outputs["geojson"].read_text())["features"]
    ring = np.array(feature["geometry"]["coordinates"][0])
    x, y = rasterio.warp.transform(CRS.from_epsg(4326), CRS.from_epsg(32633), *ring.T)
    cols, rows = ~transform @ (np.array(x), np.array(y))
    assert np.abs([cols.min() - 40, cols.max() - 205]).max() < 0.01
    assert np.abs([rows.min() - 30, rows.max() - 101]).max() < 0.01
