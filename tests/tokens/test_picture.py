"""The picture made of streamed blocks against one read from the slide."""

import numpy as np
import pytest

from gigavim.tokens.grid import make_grid
from gigavim.tokens.order import ScanOrder
from gigavim.tokens.picture import streamed_picture
from gigavim.tokens.stream import stream_blocks


def smooth(height, width):
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(y / 37 + k) * np.cos(x / 53 - k) for k in range(3)]
    return np.stack(waves, 2).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(400, 700), (701, 333), (65, 900)])
@pytest.mark.parametrize(
    ("patch_px", "stride_px", "mpp"), [(16, 16, 0.5), (16, 8, 0.5), (8, 8, 0.7)]
)
@pytest.mark.parametrize("kept_share", [1.0, 0.3, 0.0])
def test_it_is_the_slides_thumbnail(
    array_slide, height, width, patch_px, stride_px, mpp, kept_share
):
    slide = array_slide(smooth(height, width))
    order = ScanOrder("blocks", 4)
    grid = make_grid(slide, mpp=mpp, patch_px=patch_px, stride_px=stride_px, order=order)
    kept = np.random.default_rng(0).random((grid.rows, grid.cols)) < kept_share
    picture = streamed_picture(slide, grid, 97)
    assert picture is not None
    for _ in picture.watch(stream_blocks(slide, grid, kept, block_px=128)):
        pass
    found, expected = picture.finish(), slide.thumbnail(97)
    assert found.shape == expected.shape
    # Along the border a thumbnail mixes in what lies beyond the slide; means of areas do not.
    difference = np.abs(found.astype(int) - expected)
    assert difference[1:-1, 1:-1].max() <= 4
    assert difference.max() <= 40


def test_it_is_none_where_its_pixels_would_be_finer_than_the_grids(array_slide):
    slide = array_slide(smooth(50, 60))
    grid = make_grid(slide, mpp=2.0, patch_px=4, stride_px=4, order=ScanOrder("raster"))
    assert streamed_picture(slide, grid, 60) is None
