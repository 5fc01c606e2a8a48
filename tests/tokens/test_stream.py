"""The stream gives the pixels of a whole-image cut, block by block, within its memory."""

import gc
import threading
import time
import weakref
from itertools import islice

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gigavim.errors import SettingsError, TileReadError
from gigavim.frames import Bounds
from gigavim.tokens.grid import make_grid
from gigavim.tokens.order import ScanOrder
from gigavim.tokens.stream import block_patches, delayed_blocks, read_block, stream_blocks

ORDERS = ["raster", "hilbert", "blocks(3)", "blocks(2, hilbert)"]


def whole_cut(slide, grid):
    """All patches of a grid, (rows, cols, patch * patch * 3), by the plainest way."""
    frame, patch, stride = grid.frame, grid.patch_px, grid.stride_px
    pixels = slide.read(
        frame.x_level0, frame.y_level0, frame.width_px, frame.height_px, scale_xy=grid.scale_xy
    )
    sides = (grid.span_px(grid.rows), frame.height_px), (grid.span_px(grid.cols), frame.width_px)
    more = [(0, max(0, span - size)) for span, size in sides]
    canvas = np.pad(pixels, (*more, (0, 0)), mode="symmetric")
    return np.array(
        [
            [
                canvas[r * stride : r * stride + patch, c * stride : c * stride + patch].ravel()
                for c in range(grid.cols)
            ]
            for r in range(grid.rows)
        ]
    )


def gather(grid, kept, blocks):
    """The streamed patches of a grid, and how often each cell came."""
    patches = np.zeros((grid.rows, grid.cols, grid.patch_px**2 * 3), np.uint8)
    times = np.zeros((grid.rows, grid.cols), int)
    for block in blocks:
        here = block.rect.of(kept)
        block.rect.of(patches)[here] = block_patches(block, here)
        block.rect.of(times)[here] += 1
    return patches, times


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.integers(1, 120),
    st.integers(1, 120),
    st.integers(3, 20),
    st.sampled_from([0.5, 1.0, 0.8, 0.3]),
    st.sampled_from(ORDERS),
    st.integers(30, 130),
    st.data(),
)
def test_stream_equals_a_whole_cut(noise_slide, height, width, patch, mpp, order, block_px, data):
    stride = data.draw(st.integers(max(1, patch // 3), patch) | st.just(patch))
    x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    slide = noise_slide(
        height,
        width,
        bounds=Bounds(x, y, width - x, height - y),
        background=(240, 241, 242),
        tile=data.draw(st.integers(8, 64) | st.sampled_from([stride, 2 * stride, 3 * stride])),
    )
    order = ScanOrder.parse(order)
    grid = make_grid(slide, mpp=mpp, patch_px=patch, stride_px=stride, order=order)
    share = data.draw(st.sampled_from([0.02, 0.5, 1.0]))
    kept = np.random.default_rng(patch).random((grid.rows, grid.cols)) < share
    blocks = stream_blocks(slide, grid, kept, block_px=block_px, workers=2, prefetch=3)
    patches, times = gather(grid, kept, blocks)
    assert np.array_equal(times, kept.astype(int))
    difference = np.abs(patches[kept].astype(int) - whole_cut(slide, grid)[kept])
    assert difference.max(initial=0) <= (0 if mpp == 0.5 else 1)  # a resampled pixel may round


def test_blocks_are_whole_scan_blocks_and_whole_tiles(noise_slide):
    slide = noise_slide(1100, 1300, tile=96)
    order = ScanOrder("blocks", 4)
    grid = make_grid(slide, mpp=0.5, patch_px=16, stride_px=16, order=order)
    kept = np.ones((grid.rows, grid.cols), bool)
    for block in stream_blocks(slide, grid, kept, block_px=500):
        assert block.row % 12 == block.col % 12 == 0  # lcm(4 * 16, 96) = 192 px are 12 cells
        assert block.rows * 16 <= 500
        assert block.cols * 16 <= 500


def test_an_empty_grid_reads_nothing(noise_slide):
    slide = noise_slide(100, 100)
    grid = make_grid(slide, mpp=0.5, patch_px=16, stride_px=16, order=ScanOrder("raster"))
    assert list(stream_blocks(slide, grid, np.zeros((grid.rows, grid.cols), bool))) == []
    assert slide.reads == 0


def test_only_blocks_with_kept_cells_are_read(noise_slide):
    slide = noise_slide(640, 640)
    grid = make_grid(slide, mpp=0.5, patch_px=16, stride_px=16, order=ScanOrder("raster"))
    kept = np.zeros((40, 40), bool)
    kept[3, 5] = kept[39, 39] = True
    blocks = list(stream_blocks(slide, grid, kept, block_px=160))
    assert [(b.row, b.col, b.rows, b.cols) for b in blocks] == [(3, 5, 1, 1), (39, 39, 1, 1)]
    assert slide.reads == 2


@pytest.mark.parametrize("size", [1, 7, 20, 40])
def test_cells_beyond_the_map_see_it_mirrored(noise_slide, size):
    slide = noise_slide(size, size)
    grid = make_grid(slide, mpp=0.5, patch_px=16, stride_px=16, order=ScanOrder("blocks", 4))
    own = slide.read(0, 0, size, size, scale_xy=grid.scale_xy)
    whole = np.pad(own, ((0, 64 - size), (0, 64 - size), (0, 0)), mode="symmetric")
    for row, col, rows, cols in [(2, 2, 2, 2), (3, 0, 1, 4), (0, 3, 1, 1), (1, 1, 2, 3)]:
        block = read_block(slide, grid, row, col, rows, cols)
        here = whole[16 * row : 16 * (row + rows), 16 * col : 16 * (col + cols)]
        np.testing.assert_array_equal(block.pixels, here)


def test_unreadable_pixels_are_mirrored_with_the_map(noise_slide):
    slide = noise_slide(40, 40, tile=8, bad=[(32, 32, 8, 8)])
    grid = make_grid(slide, mpp=0.5, patch_px=16, stride_px=16, order=ScanOrder("raster"))
    block = read_block(slide, grid, 2, 2, 1, 1)
    assert block.unreadable is not None
    assert block.unreadable.all()


def test_unreadable_pixels_are_marked(noise_slide):
    slide = noise_slide(200, 200, bad=[(64, 128, 64, 64)], background=(250, 250, 250))
    grid = make_grid(slide, mpp=0.5, patch_px=16, stride_px=16, order=ScanOrder("raster"))
    (block,) = stream_blocks(slide, grid, np.ones((grid.rows, grid.cols), bool))
    expected = np.zeros((208, 208), bool)
    expected[128:192, 64:128] = True
    assert np.array_equal(block.unreadable, expected)
    assert (block.pixels[expected] == 250).all()


def test_blocks_alive_are_bounded(noise_slide, monkeypatch):
    slide = noise_slide(1600, 1600, tile=160)
    grid = make_grid(slide, mpp=0.5, patch_px=16, stride_px=16, order=ScanOrder("raster"))
    kept = np.ones((grid.rows, grid.cols), bool)
    alive, most, lock = weakref.WeakSet(), 0, threading.Lock()
    read = type(slide).read_salvage

    class Pixels(np.ndarray):
        __hash__ = object.__hash__
        __eq__ = object.__eq__

    def counted(self, *place, **settings):
        nonlocal most
        pixels, unreadable = read(self, *place, **settings)
        pixels = pixels.view(Pixels)
        with lock:
            alive.add(pixels)
            most = max(most, len(alive))
        return pixels, unreadable

    monkeypatch.setattr(type(slide), "read_salvage", counted)
    gc.collect()
    count = 0
    for block in stream_blocks(slide, grid, kept, block_px=160, workers=2, prefetch=3):
        time.sleep(0.002)  # a slow consumer, so that the readers run as far ahead as they may
        count += 1
        del block
    assert count == 100
    assert most <= 4


def test_an_error_comes_out_and_stops_the_readers(noise_slide, monkeypatch):
    slide = noise_slide(1600, 1600, tile=160)
    grid = make_grid(slide, mpp=0.5, patch_px=16, stride_px=16, order=ScanOrder("raster"))
    reads = 0

    def fail_late(*place, **settings):
        nonlocal reads
        reads += 1
        if reads >= 5:
            raise TileReadError("array.svs: disk gone")
        return np.zeros((place[3], place[2], 3), np.uint8), None

    monkeypatch.setattr(slide, "read_salvage", fail_late)
    kept = np.ones((grid.rows, grid.cols), bool)
    blocks = stream_blocks(slide, grid, kept, block_px=160, workers=1, prefetch=2)
    assert len(list(islice(blocks, 4))) == 4
    with pytest.raises(TileReadError, match="disk gone"):
        next(blocks)
    assert reads <= 4 + 2
    assert not [t for t in threading.enumerate() if t.name.startswith("gigavim-read")]


def test_closing_early_stops_the_readers(noise_slide):
    slide = noise_slide(1600, 1600, tile=160)
    grid = make_grid(slide, mpp=0.5, patch_px=16, stride_px=16, order=ScanOrder("hilbert"))
    blocks = stream_blocks(
        slide, grid, np.ones((100, 100), bool), block_px=160, workers=2, prefetch=3
    )
    next(blocks)
    blocks.close()
    assert slide.reads <= 4
    assert not [t for t in threading.enumerate() if t.name.startswith("gigavim-read")]


def test_delayed_blocks_can_run_under_any_dask_scheduler(noise_slide):
    slide = noise_slide(100, 130)
    grid = make_grid(slide, mpp=0.5, patch_px=16, stride_px=8, order=ScanOrder("raster"))
    kept = np.ones((grid.rows, grid.cols), bool)
    tasks = delayed_blocks(slide, grid, kept, block_px=40)
    blocks = (task.compute(scheduler="threads") for task in tasks)
    assert np.array_equal(gather(grid, kept, blocks)[0], whole_cut(slide, grid))


@pytest.mark.parametrize("setting", ["block_px", "workers", "prefetch"])
def test_senseless_settings_are_refused_before_reading(noise_slide, setting):
    slide = noise_slide(10, 10)
    grid = make_grid(slide, mpp=0.5, patch_px=16, stride_px=16, order=ScanOrder("raster"))
    with pytest.raises(SettingsError, match=setting):
        stream_blocks(slide, grid, np.ones((1, 1), bool), **{setting: 0})
