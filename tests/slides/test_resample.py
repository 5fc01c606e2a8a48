import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from gigavim.errors import MissingMppError
from gigavim.slides import base, open_slide


@pytest.fixture(scope="module")
def slide(tmp_path_factory, picture):
    path = tmp_path_factory.mktemp("slides") / "single.tif"
    tifffile.imwrite(path, picture(301, 403), photometric="rgb", tile=(64, 64))
    with open_slide(path, mpp=0.5) as slide:
        yield slide


scales = st.one_of(st.floats(0.3, 9), st.sampled_from([1.0, 2.0, 2.5, 3.0, 4.004]))


@settings(max_examples=60, deadline=None)
@given(
    st.floats(-50, 300),
    st.floats(-50, 200),
    scales,
    scales,
    st.integers(0, 20),
    st.integers(0, 20),
    st.integers(1, 15),
    st.integers(1, 15),
)
def test_a_pixel_does_not_depend_on_the_region(slide, x, y, sx, sy, left, top, width, height):
    whole = slide.read(x, y, 36, 35, scale_xy=(sx, sy)).astype(int)
    part = slide.read(x + left * sx, y + top * sy, width, height, scale_xy=(sx, sy))
    assert abs(whole[top : top + height, left : left + width] - part).max() <= 1


@settings(max_examples=30, deadline=None)
@given(st.integers(-30, 420), st.integers(-30, 320), st.integers(1, 90), st.integers(1, 90))
def test_at_full_resolution_it_is_the_level(slide, x, y, width, height):
    np.testing.assert_array_equal(
        slide.read(x, y, width, height), slide.read_level(0, x, y, width, height)
    )
    np.testing.assert_array_equal(
        slide.read(x, y, width, height, mpp=0.5), slide.read_level(0, x, y, width, height)
    )


@pytest.mark.parametrize("scale", [1.5, 2.0, 3.3, 7.0])
def test_pixels_cover_what_they_should(tmp_path, scale):
    """An edge at a known place shows as a pixel of the right brightness."""
    pixels = np.zeros((64, 400, 3), np.uint8)
    pixels[:, 200:] = 255
    path = tmp_path / "edge.tif"
    tifffile.imwrite(path, pixels, photometric="rgb")
    with open_slide(path) as slide:
        # The edge lies in the middle of output pixel 10.
        start = 200 - 10.5 * scale
        row = slide.read(start, 20, 21, 1, scale_xy=(scale, scale))[0, :, 0].astype(int)
    assert abs(row[10] - 127.5) <= 13
    assert (row[:9] == 0).all()
    assert (row[12:] == 255).all()


def test_each_axis_has_its_own_scale(tmp_path):
    y, x = np.mgrid[0:200, 0:250]
    pixels = np.stack([x, y, np.full_like(x, 9)], axis=-1).astype(np.uint8)
    path = tmp_path / "ramp.tif"
    tifffile.imwrite(path, pixels, photometric="rgb")
    with open_slide(path) as slide:
        out = slide.read(20, 40, 30, 100, scale_xy=(4.0, 0.5)).astype(float)
    np.testing.assert_allclose(out[50, :, 0], 20 + 4 * (np.arange(30) + 0.5) - 0.5, atol=1)
    np.testing.assert_allclose(out[:, 15, 1], 40 + 0.5 * (np.arange(100) + 0.5) - 0.5, atol=1)
    assert (out[..., 2] == 9).all()


def test_the_level_read_is_the_coarsest_that_is_fine_enough(pyramid):
    path, _, half = pyramid
    with open_slide(path) as slide:
        levels = [slide.level_for_scale((s, s)) for s in (0.3, 1.0, 1.9, 1.99, 2.0, 5.0, 1e9)]
        assert levels == [0, 0, 0, 1, 1, 1, 1]
        assert slide.level_for_scale((2.0, 1.0)) == 0
        np.testing.assert_array_equal(slide.read(20, 40, 100, 50, mpp=1.0), half[20:70, 10:110])


def test_large_regions_are_read_in_pieces(slide, monkeypatch):
    whole = slide.read(3.3, 4.4, 150, 100, scale_xy=(2.2, 2.6)).astype(int)
    monkeypatch.setattr(base, "SOURCE_BLOCK_PX", 3000)
    pieces = slide.read(3.3, 4.4, 150, 100, scale_xy=(2.2, 2.6))
    assert abs(whole - pieces).max() <= 1


@pytest.mark.parametrize("max_px", [1, 17, 100, 5000])
def test_thumbnail(slide, max_px):
    thumbnail = slide.thumbnail(max_px)
    assert max(thumbnail.shape[:2]) == min(max_px, 403)
    assert thumbnail.shape[0] == pytest.approx(301 * min(max_px / 403, 1), abs=0.5)
    if max_px > 16:
        assert abs(thumbnail.mean() - slide.read_level(0, 0, 0, 403, 301).mean()) < 12


def test_unknown_mpp_names_the_remedies(tmp_path, picture):
    path = tmp_path / "plain.png"
    from PIL import Image

    Image.fromarray(picture(20, 30)).save(path)
    with (
        open_slide(path) as slide,
        pytest.raises(MissingMppError, match=r"plain.png: .*--mpp.*settings.*open_slide"),
    ):
        slide.read(0, 0, 5, 5, mpp=0.5)


def test_level_downsample_is_whole_where_the_rest_was_cut():
    assert base.level_downsample(250, 62) == 4.0
    assert base.level_downsample(32914, 2057) == 16.0
    assert base.level_downsample(250, 63) == 4.0
    assert base.level_downsample(1000, 300) == pytest.approx(10 / 3)
    assert base.level_downsample(10, 10) == 1.0
