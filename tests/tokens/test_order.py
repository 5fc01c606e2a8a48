"""Scan orders: permutations of the kept cells, with the neighbourhoods that training saw."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gigavim.errors import SettingsError
from gigavim.tokens.order import ScanOrder, scan_cells

orders = st.one_of(
    st.sampled_from([ScanOrder(kind) for kind in ("raster", "serpentine", "hilbert")]),
    st.builds(
        ScanOrder,
        st.just("blocks"),
        st.integers(1, 20),
        st.sampled_from(["serpentine", "hilbert"]),
    ),
)
masks = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=40))


def steps(cells, cols):
    row, col = np.divmod(cells, cols)
    return np.abs(np.diff(row)) + np.abs(np.diff(col))


@given(orders)
def test_order_survives_being_written_and_read(order):
    assert ScanOrder.parse(str(order)) == order


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("raster", ScanOrder("raster")),
        (" Blocks( 14 ) ", ScanOrder("blocks", 14)),
        ("blocks(14, hilbert)", ScanOrder("blocks", 14, "hilbert")),
        ("blocks(14,serpentine)", ScanOrder("blocks", 14)),
    ],
)
def test_parse(text, order):
    assert ScanOrder.parse(text) == order


@pytest.mark.parametrize(
    "text",
    [
        "",
        "spiral",
        "blocks",
        "blocks()",
        "blocks(0)",
        "blocks(-1)",
        "blocks(1.5)",
        "blocks(99999999999)",
        "blocks(2000)",
        "blocks(14, raster)",
        "blocks(14) raster",
        "raster(14)",
        "hilbert(14, serpentine)",
    ],
)
def test_nonsense_is_refused_by_its_own_name(text):
    with pytest.raises(SettingsError, match="use raster, serpentine, hilbert, blocks") as caught:
        ScanOrder.parse(text)
    assert repr(text) in str(caught.value)


@given(masks, orders)
def test_every_kept_cell_comes_once(kept, order):
    cells = scan_cells(kept, order)
    assert cells.dtype == np.int64
    assert np.array_equal(np.sort(cells), np.flatnonzero(kept))


@given(masks, orders)
def test_dropping_cells_does_not_reorder_the_others(kept, order):
    everything = scan_cells(np.ones_like(kept), order)
    assert np.array_equal(scan_cells(kept, order), everything[kept.ravel()[everything]])


@given(st.integers(0, 6))
def test_hilbert_on_a_square_only_steps_to_neighbours(bits):
    side = 2**bits
    cells = scan_cells(np.ones((side, side), bool), ScanOrder("hilbert"))
    assert (steps(cells, side) == 1).all()
    assert cells[0] == 0
    assert cells[-1] == side - 1


@given(st.integers(1, 20), st.integers(1, 20))
def test_serpentine_only_steps_to_neighbours(rows, cols):
    cells = scan_cells(np.ones((rows, cols), bool), ScanOrder("serpentine"))
    assert (steps(cells, cols) == 1).all()


@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 7),
    st.sampled_from(["serpentine", "hilbert"]),
)
def test_a_block_is_walked_as_a_training_crop(block_rows, block_cols, side, across):
    shape = (block_rows * side, block_cols * side)
    cells = scan_cells(np.ones(shape, bool), ScanOrder("blocks", side, across))
    row, col = np.divmod(cells.reshape(-1, side, side), shape[1])
    crop = scan_cells(np.ones((side, side), bool), ScanOrder("raster"))
    for block_row, block_col in zip(row, col):
        inside = (block_row - block_row.min()) * side + block_col - block_col.min()
        assert np.array_equal(inside.ravel(), crop)
    at_blocks = scan_cells(np.ones((block_rows, block_cols), bool), ScanOrder(across))
    assert np.array_equal(
        row[:, 0, 0] // side * block_cols + col[:, 0, 0] // side,
        at_blocks,
    )


def test_blocks_of_five_by_seven_cells():
    cells = scan_cells(np.ones((5, 7), bool), ScanOrder("blocks", 3))
    expected = """0 1 2 7 8 9 14 15 16  3 4 5 10 11 12 17 18 19  6 13 20
                  27 34  24 25 26 31 32 33  21 22 23 28 29 30"""
    assert cells.tolist() == [int(cell) for cell in expected.split()]


def test_long_narrow_grids():
    for shape in ((1, 100_000), (100_000, 1)):
        kept = np.ones(shape, bool)
        for order in ("raster", "serpentine", "hilbert", "blocks(14)", "blocks(14, hilbert)"):
            assert len(scan_cells(kept, ScanOrder.parse(order))) == kept.size


def test_needs_numpy_only():
    code = (
        "import sys, gigavim.tokens.order\n"
        "heavy = {'torch', 'dask', 'zarr', 'scipy', 'skimage', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
