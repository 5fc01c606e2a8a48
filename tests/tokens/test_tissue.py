"""Tissue masks keep all that is tissue, and cells touch it to the area."""

import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from gigavim.errors import SettingsError
from gigavim.frames import Bounds, GeoReference, MapFrame
from gigavim.tokens.grid import make_grid
from gigavim.tokens.order import ScanOrder
from gigavim.tokens.tissue import TissueMask, kept_cells, tissue_mask

GLASS = (243, 241, 244)
STAINED = (205, 130, 180)
RASTER = ScanOrder("raster")


def picture(height, width, color=GLASS, noise=2, seed=0):
    """An even picture with the noise of a camera."""
    random = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), color, float) + random.normal(0, noise, (height, width, 1))
    return np.clip(pixels, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("color", [GLASS, (255, 255, 255), (214, 216, 222), (0, 0, 0), (12, 11, 9)])
def test_a_blank_slide_is_empty(array_slide, color):
    slide = array_slide(picture(700, 900, color), mpp=8.0, background=(255, 255, 255))
    assert not tissue_mask(slide).mask.any()


def test_tissue_on_glass_is_found_and_widened(array_slide):
    pixels = picture(600, 800)
    pixels[200:400, 300:500] = picture(200, 200, STAINED, noise=15)
    tissue = tissue_mask(array_slide(pixels, mpp=8.0))
    assert tissue.mask.shape == (600, 800)
    assert tissue.mask[195:405, 295:505].all()
    assert not tissue.mask[:185].any()
    assert not tissue.mask[:, 515:].any()


@pytest.mark.parametrize("color", [STAINED, (150, 90, 60), (120, 120, 120), (225, 215, 228)])
def test_a_slide_without_glass_loses_nothing(array_slide, color):
    random = np.random.default_rng(3)
    texture = random.normal(0, 1, (60, 80)).repeat(10, axis=0).repeat(10, axis=1)
    pixels = np.clip(np.array(color) + 25 * texture[..., None], 0, 255).astype(np.uint8)
    assert tissue_mask(array_slide(pixels, mpp=4.0)).share > 0.97


def test_pale_tissue_beside_dark_is_kept(array_slide):
    pixels = picture(500, 900)
    pixels[100:400, 100:300] = picture(300, 200, (110, 60, 130), noise=10)
    pixels[100:400, 600:800] = picture(300, 200, (236, 222, 234), noise=3)
    mask = tissue_mask(array_slide(pixels, mpp=8.0)).mask
    assert mask[100:400, 600:800].mean() > 0.99


def test_fat_is_kept(array_slide):
    pixels = picture(600, 600)
    for at in range(100, 500, 14):  # membranes 112 µm apart, half a pixel wide
        pixels[at, 100:500] = pixels[100:500, at] = (228, 205, 222)
    assert tissue_mask(array_slide(pixels, mpp=8.0)).mask[105:490, 105:490].all()


def test_dust_is_dropped_and_ink_is_no_reason_to_crash(array_slide):
    pixels = picture(600, 800)
    pixels[300, 100] = (40, 40, 40)
    pixels[100:500, 400:420] = (20, 60, 170)
    mask = tissue_mask(array_slide(pixels, mpp=8.0)).mask
    assert not mask[:, :300].any()
    assert mask[100:500, 400:420].all()


def test_fluorescence_stands_out_from_the_dark(array_slide):
    pixels = picture(600, 800, (4, 4, 6), noise=1)
    pixels[200:300, 300:500] = (10, 10, 140)
    tissue = tissue_mask(array_slide(pixels, mpp=8.0))
    assert tissue.mask[200:300, 300:500].all()
    assert tissue.share < 0.1


def test_black_padding_beside_glass_is_not_tissue(array_slide):
    pixels = picture(600, 800)
    pixels[:, 600:] = 0
    pixels[100:300, 100:300] = STAINED
    mask = tissue_mask(array_slide(pixels, mpp=8.0)).mask
    assert mask[100:300, 100:300].all()
    assert not mask[:, 620:].any()


@pytest.mark.parametrize("known", ["nothing", "ground"])
def test_of_other_images_all_but_the_background_is_kept(array_slide, known):
    pixels = picture(400, 500, (240, 240, 240))
    pixels[:, 300:] = (255, 255, 255)
    slide = array_slide(pixels, mpp=None if known == "nothing" else 2e5)
    if known == "ground":
        slide.georeference = GeoReference("", (0.2, 0, 0, 0, -0.2, 0))
    mask = tissue_mask(slide).mask
    assert mask[:, :300].all()
    assert not mask[:, 310:].any()


def test_unreadable_parts_stay_in(array_slide):
    pixels = picture(640, 640)
    slide = array_slide(pixels, mpp=8.0, background=GLASS, bad=[(320, 320, 64, 64)])
    mask = tissue_mask(slide).mask
    assert mask[320:384, 320:384].all()
    assert mask.sum() == 64 * 64


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 7)])
@pytest.mark.parametrize("mpp", [1e-6, 0.5, 40.0, None])
def test_slides_of_any_shape(array_slide, size, mpp):
    for color in (GLASS, STAINED):
        slide = array_slide(picture(*size, color), mpp=mpp)
        assert 0 <= tissue_mask(slide).share <= 1


def test_a_large_slide_has_a_small_mask(array_slide):
    slide = array_slide(
        np.broadcast_to(np.uint8(255), (40_000, 30_000, 3)),
        np.broadcast_to(np.uint8(255), (2500, 1875, 3)),
        mpp=0.25,
    )
    assert tissue_mask(slide).mask.shape == (1250, 938)


def test_mask_lies_on_the_bounds(array_slide):
    pixels = picture(600, 800)
    pixels[200:300, 300:500] = STAINED
    slide = array_slide(pixels, mpp=8.0, bounds=Bounds(250, 150, 400, 300))
    tissue = tissue_mask(slide)
    assert (tissue.frame.x_level0, tissue.frame.y_level0) == (250, 150)
    assert tissue.mask[50:150, 50:250].all()
    assert not tissue.mask[170:].any()


def cells_by_hand(grid, tissue, min_tissue):
    """The share of each patch's part on the slide, pixel by pixel of level 0."""
    frame, of = grid.frame, tissue.frame
    level0 = tissue.mask.repeat(int(of.scale_y), axis=0).repeat(int(of.scale_x), axis=1)
    kept = np.zeros((grid.rows, grid.cols), bool)
    for row in range(grid.rows):
        for col in range(grid.cols):
            y, x = row * grid.stride_px, col * grid.stride_px
            y_end = min(y + grid.patch_px, frame.height_px)
            x_end = min(x + grid.patch_px, frame.width_px)
            if y_end > y and x_end > x:
                scale = int(frame.scale_x)
                part = level0[y * scale : y_end * scale, x * scale : x_end * scale]
                kept[row, col] = part.any() and part.sum() >= min_tissue * part.size
    block = grid.block
    for row in range(0, grid.rows, block):
        for col in range(0, grid.cols, block):
            whole = kept[row : row + block, col : col + block]
            whole[:] = whole.any()
    return kept


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 9),
    st.sampled_from([1, 2]),
    st.sampled_from(["raster", "blocks(2)", "blocks(3)"]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.data(),
)
def test_cells_are_kept_by_exact_area(
    array_slide, mask_rows, mask_cols, patch, scale, order, min_tissue, data
):
    mask_scale = data.draw(st.integers(1, 7))
    stride = data.draw(st.integers(1, patch))
    height, width = mask_rows * mask_scale, mask_cols * mask_scale
    slide = array_slide(np.zeros((height, width, 3), np.uint8))
    order = ScanOrder.parse(order)
    grid = make_grid(slide, mpp=0.5 * scale, patch_px=patch, stride_px=stride, order=order)
    mask = np.random.default_rng(height * width).random((mask_rows, mask_cols)) < 0.3
    frame = MapFrame(mask_cols, mask_rows, 0, 0, mask_scale, mask_scale, 1, 1)
    tissue = TissueMask(mask, frame, "test")
    kept = kept_cells(grid, tissue, min_tissue=min_tissue)
    assert np.array_equal(kept, cells_by_hand(grid, tissue, min_tissue))


def test_no_tissue_keeps_no_cell_and_none_keeps_all(array_slide):
    slide = array_slide(picture(333, 477), mpp=0.5, bounds=Bounds(3, 5, 300, 400))
    grid = make_grid(slide, mpp=0.8, patch_px=16, stride_px=16, order=RASTER)
    assert not kept_cells(grid, tissue_mask(slide, mode="auto")).any()
    for min_tissue in (0, 0.5, 0.99):
        assert kept_cells(grid, tissue_mask(slide, mode="none"), min_tissue=min_tissue).all()


SQUARE = {"type": "Polygon", "coordinates": [[[10, 20], [60, 20], [60, 90], [10, 90], [10, 20]]]}


@pytest.mark.parametrize(
    "document",
    [
        SQUARE,
        {"type": "Feature", "geometry": SQUARE, "properties": {}},
        [{"type": "Feature", "geometry": SQUARE}, {"type": "Feature", "geometry": None}],
        {
            "type": "FeatureCollection",
            "features": [
                {"type": "Feature", "geometry": SQUARE},
                {"type": "Feature", "geometry": {"type": "Point", "coordinates": [150, 150]}},
            ],
        },
        {
            "type": "GeometryCollection",
            "geometries": [{"type": "MultiPolygon", "coordinates": [SQUARE["coordinates"]]}],
        },
    ],
)
def test_geojson_is_drawn_from_the_bounds_corner(array_slide, tmp_path, document):
    file = tmp_path / "tissue.geojson"
    file.write_text(json.dumps(document))
    slide = array_slide(picture(300, 400), bounds=Bounds(100, 50, 200, 200))
    tissue = tissue_mask(slide, mode=file)
    grid = make_grid(slide, mpp=0.5, patch_px=10, stride_px=10, order=RASTER)
    expected = np.zeros((20, 20), bool)
    expected[2:9, 1:6] = True
    assert np.array_equal(kept_cells(grid, tissue, min_tissue=0.5), expected)
    assert tissue.source == str(file)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '["Polygon"]',
        '{"type": "FeatureCollection"}',
        '{"type": "Polygon"}',
        '{"type": "Polygon", "coordinates": []}',
        '{"type": "Polygon", "coordinates": [[["a", 1], [2, 3], [3, 4]]]}',
        '{"type": "Polygon", "coordinates": [[[1, 1], [2, 3]]]}',
        '{"type": "Point", "coordinates": [1, 2]}',
        "[" * 2000 + "]" * 2000,
    ],
)
def test_bad_geojson_is_refused_by_name(array_slide, tmp_path, text):
    file = tmp_path / "tissue.geojson"
    file.write_text(text)
    with pytest.raises(SettingsError, match=r"tissue\.geojson"):
        tissue_mask(array_slide(picture(30, 40)), mode=file)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "RGBA", "LA", "I;16"])
def test_a_mask_image_is_laid_over_the_slide(array_slide, tmp_path, mode):
    drawn = np.zeros((30, 40), np.uint8)
    drawn[10:20, 5:15] = 255
    file = tmp_path / "mask.png"
    image = Image.fromarray(drawn)
    if mode == "I;16":
        image = Image.fromarray(drawn.astype(np.uint16) * 100)
    elif mode == "P":
        image = image.convert("RGB").quantize(2)
    else:
        image = image.convert(mode)
    image.save(file)
    slide = array_slide(picture(302, 399), mpp=None)
    tissue = tissue_mask(slide, mode=str(file))
    assert np.array_equal(tissue.mask, drawn > 0)
    assert tissue.frame.scale_x == 399 / 40
    assert tissue.frame.scale_y == 302 / 30
    assert math.isnan(tissue.frame.mpp_x)


def test_a_mask_of_the_whole_slide_or_of_its_bounds(array_slide, tmp_path):
    slide = array_slide(picture(300, 400), bounds=Bounds(50, 20, 100, 200))
    for size, corner in (((10, 20), (50, 20)), ((40, 30), (0, 0))):
        Image.new("L", size, 255).save(tmp_path / "mask.png")
        frame = tissue_mask(slide, mode=tmp_path / "mask.png").frame
        assert (frame.x_level0, frame.y_level0) == corner


def test_a_large_mask_is_reduced_and_loses_nothing(array_slide, tmp_path):
    drawn = np.zeros((9000, 4500), np.uint8)
    drawn[4001, 3001] = 1
    Image.fromarray(drawn).save(tmp_path / "mask.png")
    mask = tissue_mask(array_slide(picture(180, 90)), mode=tmp_path / "mask.png").mask
    assert mask.shape == (3000, 1500)
    assert np.argwhere(mask).tolist() == [[4001 // 3, 3001 // 3]]


def test_files_that_are_no_masks(array_slide, tmp_path):
    slide = array_slide(picture(300, 400))
    Image.new("L", (300, 400)).save(tmp_path / "turned.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.tif").write_bytes(b"")
    for name, reason in (
        ("turned.png", "300 x 400 px has not the aspect of .* 400 x 300"),
        ("text.png", "cannot be read as a mask image"),
        ("empty.tif", "cannot be read as a mask image"),
        ("missing.png", "No such file.*auto, none"),
        ("missing.geojson", "No such file"),
        (".", "s a directory|denied"),
    ):
        with pytest.raises(SettingsError, match=reason):
            tissue_mask(slide, mode=tmp_path / name)
