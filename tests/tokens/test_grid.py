"""Grids cover every pixel, wherever the slide's edge falls."""

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gigavim.errors import MissingMppError, ResourceError, SettingsError
from gigavim.frames import Bounds
from gigavim.tokens.grid import make_grid, select_tokens
from gigavim.tokens.order import ScanOrder, scan_cells

RASTER = ScanOrder("raster")
sizes = st.integers(1, 300)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes, sizes, st.integers(1, 33), st.data())
def test_every_pixel_lies_in_a_patch(array_slide, height, width, patch, data):
    stride = data.draw(st.integers(1, patch))
    block = data.draw(st.integers(1, 5))
    mpp = data.draw(st.sampled_from([0.5, 0.25, 0.37, 1.0, 1.9]))
    slide = array_slide(np.zeros((height, width, 3), np.uint8))
    grid = make_grid(
        slide, mpp=mpp, patch_px=patch, stride_px=stride, order=ScanOrder("blocks", block)
    )
    assert grid.rows % block == grid.cols % block == 0
    for cells, length_px, length_level0, scale in (
        (grid.rows, grid.frame.height_px, height, grid.frame.scale_y),
        (grid.cols, grid.frame.width_px, width, grid.frame.scale_x),
    ):
        assert length_px * scale >= length_level0 - 1e-3
        assert (length_px - 1) * scale < length_level0
        assert grid.span_px(cells) >= length_px
        fewer = cells - block
        assert fewer < 1 or grid.span_px(fewer) < length_px


def test_one_pixel(array_slide):
    slide = array_slide(np.zeros((1, 1, 3), np.uint8))
    grid = make_grid(slide, mpp=8.0, patch_px=16, stride_px=8, order=RASTER)
    assert (grid.rows, grid.cols) == (1, 1)
    assert (grid.frame.height_px, grid.frame.width_px) == (1, 1)


def test_the_map_starts_at_the_bounds_and_tells_its_mpp(array_slide):
    bounds = Bounds(13, 7, 101, 203)
    slide = array_slide(np.zeros((400, 300, 3), np.uint8), mpp=(0.25, 0.3), bounds=bounds)
    frame = make_grid(slide, mpp=0.4, patch_px=16, stride_px=16, order=RASTER).frame
    assert (frame.x_level0, frame.y_level0) == (13, 7)
    assert frame.scale_x == pytest.approx(1.6)
    assert frame.scale_y == pytest.approx(4 / 3)
    assert (frame.mpp_x, frame.mpp_y) == (pytest.approx(0.4), pytest.approx(0.4))
    assert (frame.width_px, frame.height_px) == (math.ceil(101 / 1.6), math.ceil(203 * 3 / 4))


def test_a_nearly_whole_scale_is_whole_and_the_true_mpp_is_kept(array_slide):
    slide = array_slide(np.zeros((2967, 2220, 3), np.uint8), mpp=0.499)
    frame = make_grid(slide, mpp=0.5, patch_px=16, stride_px=16, order=RASTER).frame
    assert (frame.scale_x, frame.mpp_x, frame.width_px) == (1.0, 0.499, 2220)
    frame = make_grid(slide, mpp=1.0, patch_px=16, stride_px=16, order=RASTER).frame
    assert (frame.scale_y, frame.mpp_y, frame.height_px) == (2.0, 0.998, 1484)
    frame = make_grid(slide, mpp=0.51, patch_px=16, stride_px=16, order=RASTER).frame
    assert frame.scale_x == 0.51 / 0.499


def test_without_mpp_the_ways_out_are_named(array_slide):
    slide = array_slide(np.zeros((5, 5, 3), np.uint8), mpp=None)
    with pytest.raises(MissingMppError, match=r"array\.svs.*--slide-mpp.*gigavim\.toml.*metadata"):
        make_grid(slide, mpp=0.5, patch_px=16, stride_px=16, order=RASTER)
    frame = make_grid(slide, mpp=None, patch_px=16, stride_px=16, order=RASTER).frame
    assert (frame.scale_x, frame.scale_y) == (1.0, 1.0)
    assert math.isnan(frame.mpp_x)


@pytest.mark.parametrize(
    ("mpp", "patch_px", "stride_px"),
    [(0.5, 0, 1), (0.5, 16, 0), (0.5, 16, 17), (0.0, 16, 16), (math.nan, 16, 16), (-1, 16, 16)],
)
def test_senseless_sizes_are_refused(array_slide, mpp, patch_px, stride_px):
    slide = array_slide(np.zeros((5, 5, 3), np.uint8))
    with pytest.raises(SettingsError):
        make_grid(slide, mpp=mpp, patch_px=patch_px, stride_px=stride_px, order=RASTER)


def test_a_grid_beyond_any_machine_is_refused(array_slide):
    slide = array_slide(np.zeros((5000, 5000, 3), np.uint8), mpp=1000.0)
    with pytest.raises(ResourceError, match="resolution"):
        make_grid(slide, mpp=0.25, patch_px=16, stride_px=16, order=RASTER)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 99), st.integers(1, 99), st.sampled_from(["hilbert", "blocks(3)"]))
def test_selection_knows_each_token_both_ways(array_slide, height, width, order):
    slide = array_slide(np.zeros((height, width, 3), np.uint8))
    order = ScanOrder.parse(order)
    grid = make_grid(slide, mpp=0.5, patch_px=7, stride_px=3, order=order)
    kept = np.random.default_rng(width).random((grid.rows, grid.cols)) < 0.5
    chosen = select_tokens(grid, kept)
    assert np.array_equal(chosen.cells, scan_cells(kept, order))
    assert len(chosen) == kept.sum()
    assert np.array_equal(chosen.index >= 0, kept)
    assert np.array_equal(chosen.index.ravel()[chosen.cells], np.arange(len(chosen)))
    assert chosen.index.dtype == np.int32
