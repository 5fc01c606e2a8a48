"""Masks and streams of real slides, where their files are at hand."""

import os
from pathlib import Path

import numpy as np
import pytest

from gigavim.slides import open_slide
from gigavim.tokens.grid import make_grid
from gigavim.tokens.order import ScanOrder
from gigavim.tokens.stream import stream_blocks
from gigavim.tokens.tissue import kept_cells, tissue_mask

DATA = os.environ.get("GIGAVIM_TEST_DATA")
pytestmark = pytest.mark.skipif(not DATA, reason="GIGAVIM_TEST_DATA is not set")


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("wsi/CMU-1-Small-Region.svs", 0.45, 0.8),
        ("wsi/OS-1-detail.ome.tif", 1.0, 1.0),
        ("wsi/multi_frame_jpeg_camelyon_challenge_image.dcm", 0.25, 0.5),
        ("wsi/test3-DAPI-2-(387).ndpi", 0.7, 0.99),
    ],
)
def test_masks_keep_what_is_stained(name, least, most):
    with open_slide(Path(DATA, name)) as slide:
        tissue = tissue_mask(slide)
        shown = slide.thumbnail(max(tissue.mask.shape))
        assert shown.shape[:2] == tissue.mask.shape
        colored = np.ptp(shown.astype(int), axis=2) > 40
        assert tissue.mask[colored].mean() > 0.999
        assert least <= tissue.share <= most


def test_crops_without_glass_are_kept_whole():
    images = sorted(Path(DATA, "histo/nuinsseg/images").iterdir())[::10]
    assert images
    for path in images:
        with open_slide(path, mpp=0.25) as slide:
            assert tissue_mask(slide).share == 1.0, path.name


@pytest.mark.parametrize("mpp", [0.5, 1.1])
def test_stream_is_the_slide(mpp):
    with open_slide(Path(DATA, "wsi/CMU-1-Small-Region.svs")) as slide:
        order = ScanOrder("blocks", 14)
        grid = make_grid(slide, mpp=mpp, patch_px=16, stride_px=16, order=order)
        kept = kept_cells(grid, tissue_mask(slide))
        assert 0.4 < kept.mean() < 1
        seen = np.zeros_like(kept)
        for block in stream_blocks(slide, grid, kept, block_px=1024):
            y, x = block.row * 16, block.col * 16
            height = min(block.rows * 16, grid.frame.height_px - y)
            width = min(block.cols * 16, grid.frame.width_px - x)
            scale = grid.scale_xy[0]
            direct = slide.read(x * scale, y * scale, width, height, scale_xy=grid.scale_xy)
            difference = np.abs(block.pixels[:height, :width].astype(int) - direct)
            assert difference.max() <= (0 if mpp == 0.5 else 1)  # a resampled pixel may round
            block.rect.of(seen)[:] = True
        assert seen[kept].all()
