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
import torch
from PIL import Image
from rasterio.crs import CRS
from rasterio.transform import Affine

import gigavim
from gigavim.config import Settings
from gigavim.frames import ClassSpec
from gigavim.model.card import ModelCard, TrainingRecord
from gigavim.model.checkpoint import save_model
from gigavim.model.config import VimConfig
from gigavim.model.heads import SegmentationModel
from gigavim.model.vim import Vim
from gigavim.segmentation import Segmentation

THRESHOLD = 0.6
DARK, LIGHT = 60, 240


@pytest.fixture(scope="module", params=[(4, 4), (4, 2)], ids=["adjacent", "overlapping"])
def exact_model(request, tmp_path_factory) -> Path:
    patch_px, stride_px = request.param
    config = VimConfig(
        d_model=patch_px**2, depth=1, patch_px=patch_px, stride_px=stride_px, class_token="none",
        pooling="mean", position="none",
    )  # fmt: skip
    model = SegmentationModel(Vim(config), 2)
    with torch.no_grad():
        for layer in model.encoder.layers:
            layer.mixer.out_proj.weight.zero_()
        pixels = torch.eye(patch_px**2).view(-1, 1, patch_px, patch_px)
        model.encoder.patch_embed.proj.weight.copy_(pixels.expand(-1, 3, -1, -1) / 3)
        model.encoder.patch_embed.proj.bias.zero_()
        model.head.linear.weight.copy_(torch.cat((torch.eye(patch_px**2), -torch.eye(patch_px**2))))
        model.head.linear.bias.zero_()
    card = ModelCard(
        name="exact", description="Dark is tissue.", config=config, mpp=0.5, mpp_range=(0.01, 0.5),
        mean=(THRESHOLD,) * 3, std=(1.0,) * 3,
        classes=(
            ClassSpec("background", (255, 255, 255), object_type="none"),
            ClassSpec("tissue", (255, 0, 0)),
        ),
        order="hilbert", licence="none",
        training=TrainingRecord(script="", data="", data_licence="", split=""),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model") / "exact"
    save_model(folder, model, card)
    return folder


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


def write_scn(path: Path, pixels: np.ndarray, x: int, y: int, canvas_hw: tuple[int, int]) -> None:
    """A Leica SCN, whose scanned area lies at (x, y) of a larger canvas: it has bounds."""
    height, width = pixels.shape[:2]
    nm = 500
    space = "http://www.leica-microsystems.com/scn/2010/10/01"
    scan = (
        "<scanSettings><objectiveSettings><objective>20</objective></objectiveSettings>"
        "<illuminationSettings><numericalAperture>0.75</numericalAperture>"
        "<illuminationSource>brightfield</illuminationSource></illuminationSettings></scanSettings>"
    )
    head = '<creationDate>2026-01-01T00:00:00Z</creationDate><device model="x" version="1"/>'
    canvas = f'sizeX="{canvas_hw[1] * nm}" sizeY="{canvas_hw[0] * nm}"'
    xml = f"""<?xml version="1.0"?><scn xmlns="{space}" uuid="urn:uuid:0">
<collection name="c" uuid="urn:uuid:1" {canvas} barcode="">
<image name="macro" uuid="urn:uuid:2">{head}
<pixels sizeX="64" sizeY="48"><dimension sizeX="64" sizeY="48" r="0" ifd="0"/></pixels>
<view {canvas} offsetX="0" offsetY="0"/>{scan}</image>
<image name="main" uuid="urn:uuid:3">{head}
<pixels sizeX="{width}" sizeY="{height}">
<dimension sizeX="{width}" sizeY="{height}" r="0" ifd="1"/></pixels>
<view sizeX="{width * nm}" sizeY="{height * nm}" offsetX="{x * nm}" offsetY="{y * nm}"/>{scan}
</image></collection></scn>"""
    common = {"photometric": "rgb", "compression": "jpeg", "metadata": None}
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        macro = np.full((48, 64, 3), 200, np.uint8)
        writer.write(macro, tile=(64, 64), description=xml, **common)
        writer.write(
            pixels, tile=(128, 128), compressionargs={"level": 98}, resolutionunit="CENTIMETER",
            resolution=(1e7 / nm, 1e7 / nm), **common,
        )  # fmt: skip


@pytest.mark.parametrize("in_bounds", [True, False])
def test_a_slide_with_bounds(exact_model, tmp_path, in_bounds):
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
