"""MIRAX slides, made by hand so that OpenSlide itself reads them."""

import numpy as np
import pytest
from PIL import Image

from gigavim.errors import CorruptSlideError, UnsupportedSlideError
from gigavim.slides import open_slide

IN_THE_GRID = {(2, 1): (256, 128), (3, 1): (384, 128), (2, 2): (256, 256)}
ASTRAY = {(2, 1): (235, 115), (3, 1): (348, 111), (2, 2): (231, 230)}


@pytest.fixture
def world():
    cells = np.random.default_rng(0).integers(0, 256, (80, 90, 3), np.uint8)
    return np.kron(cells, np.ones((8, 8, 1), np.uint8))


@pytest.fixture(params=["in the grid", "astray"])
def mirax(request, tmp_path, mrxs_writer, world):
    """A slide's path, and its whole level 0."""
    path = tmp_path / "slide.mrxs"
    if request.param == "astray":
        photos, options, size = ASTRAY, {"overlap_px": 14}, (698, 584)
    else:
        photos, options, size = IN_THE_GRID, {"with_positions": False}, (768, 640)
    mrxs_writer(path, world, photos, grid_wh=(6, 5), **options)
    expected = np.full((size[1], size[0], 3), 255, np.uint8)
    for x, y in photos.values():
        expected[y : y + 128, x : x + 128] = world[y : y + 128, x : x + 128]
    return path, expected, photos


def test_pixels_bounds_and_levels(mirax):
    path, expected, photos = mirax
    with open_slide(path) as slide:
        assert slide.reader == "openslide"
        assert slide.description["vendor"] == "mirax"
        assert [level.downsample_x for level in slide.levels] == [1.0, 2.0]
        assert (slide.mpp.x, slide.mpp.y) == (0.5, 0.5)
        height, width = expected.shape[:2]
        np.testing.assert_array_equal(slide.read_level(0, 0, 0, width, height), expected)
        x, y = (min(corner) for corner in zip(*photos.values()))
        right, lower = (max(corner) + 128 for corner in zip(*photos.values()))
        bounds = slide.bounds
        assert (bounds.x_level0, bounds.y_level0) == (x, y)
        assert (bounds.width_level0, bounds.height_level0) == (right - x, lower - y)
        np.testing.assert_array_equal(
            slide.read(x, y, right - x, lower - y, mpp=0.5), expected[y:lower, x:right]
        )


def test_the_folder_is_part_of_the_slide(mirax, tmp_path):
    path, _, _ = mirax
    with open_slide(path) as slide:
        before = slide.fingerprint()
    settings = path.with_suffix("") / "Slidedat.ini"
    settings.write_text(settings.read_text().replace("= 20\n", "= 40\n"))
    with open_slide(path) as slide:
        assert slide.fingerprint() != before
    with pytest.raises(UnsupportedSlideError, match=r"give slide\.mrxs beside it"):
        open_slide(path.with_suffix(""))
    settings.unlink()
    with pytest.raises(CorruptSlideError, match=r"the folder slide beside it.*copy both"):
        open_slide(path)


def test_the_picture_of_the_label_is_not_taken_for_the_slide(tmp_path):
    path = tmp_path / "alone.mrxs"
    Image.new("RGB", (40, 30)).save(path, "JPEG")
    with pytest.raises(CorruptSlideError, match="copy both"):
        open_slide(path)


def test_ending_in_capitals(mirax):
    path, _, _ = mirax
    capital = path.rename(path.with_suffix(".MRXS"))
    with pytest.raises(UnsupportedSlideError, match="small letters"):
        open_slide(capital)


def test_damaged_data_is_salvaged_by_photo(mirax):
    path, expected, _ = mirax
    data = path.with_suffix("") / "Data0000.dat"
    content = bytearray(data.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 200] = bytes(200)
    data.write_bytes(content)
    with open_slide(path) as slide:
        height, width = expected.shape[:2]
        pixels, unreadable = slide.read_level_salvage(0, 0, 0, width, height)
    assert 0 < unreadable.mean() < 0.5
    np.testing.assert_array_equal(pixels[~unreadable], expected[~unreadable])
