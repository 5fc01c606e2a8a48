import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gigavim.errors import OutputError
from gigavim.outputs.labels import CHUNK_HW, Coverage, LabelStore, halve


@settings(max_examples=15, deadline=None)
@given(
    heights=st.lists(st.integers(1, 400), min_size=1, max_size=6),
    width=st.sampled_from([1, 3, 2048, 2500]),
    seed=st.integers(0, 99),
)
def test_strips_of_any_height_come_back(tmp_path_factory, heights, width, seed):
    labels = np.random.default_rng(seed).integers(0, 5, (sum(heights), width), dtype=np.uint8)
    store = LabelStore.create(
        tmp_path_factory.mktemp("labels"), height=len(labels), width=width, cell_px=8,
        cells_hw=(1, 1),
    )  # fmt: skip
    y = 0
    for height in heights:
        store.write_rows(y, labels[y : y + height])
        y += height
    assert np.array_equal(store.read(0, len(labels), 0, width), labels)
    y0, y1 = len(labels) // 3, len(labels) // 2
    assert np.array_equal(store.read(y0, y1, width // 2, width), labels[y0:y1, width // 2 :])


def test_rows_may_be_read_before_all_are_written(store):
    made = store(np.zeros((700, 50), np.uint8))
    made.write_rows(0, np.full((100, 50), 1, np.uint8))
    made.write_rows(300, np.full((10, 50), 2, np.uint8))
    assert made.read(0, 700, 0, 1).sum() == 100 + 20


def test_a_finished_store_can_be_opened_again(store):
    labels = np.arange(1000 * 40, dtype=np.uint32).reshape(1000, 40).astype(np.uint8)
    made = store(labels, cell_px=8)
    again = LabelStore(made.folder)
    assert (again.height, again.width, again.cell_px) == (1000, 40, 8)
    assert np.array_equal(again.read(0, 1000, 0, 40), labels)


def test_coverage_reaches_pixels_and_its_last_cell_the_rest(store):
    coverage = np.array([[1, 0], [2, 1]], np.uint8)
    made = store(np.zeros((20, 32), np.uint8), coverage)
    assert np.array_equal(made.read_coverage(), coverage)
    pixels = made.coverage_at(15, 20, 14, 32)
    assert pixels.shape == (5, 18)
    assert pixels[0, 0] == Coverage.PREDICTED
    assert pixels[0, 17] == Coverage.SKIPPED
    assert pixels[1, 0] == Coverage.UNREADABLE


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (CHUNK_HW[0] * 2 + 1, 333)])
@pytest.mark.parametrize("offset", [0, 1])
def test_halving_takes_every_second_label(store, tmp_path, shape, offset):
    labels = np.random.default_rng(0).integers(0, 9, shape, dtype=np.uint8)
    half = halve(store(labels), tmp_path / "half", offset=offset)
    rows = np.minimum(np.arange(0, shape[0], 2) + offset, shape[0] - 1)
    cols = np.minimum(np.arange(0, shape[1], 2) + offset, shape[1] - 1)
    assert np.array_equal(half.read(0, half.height, 0, half.width), labels[np.ix_(rows, cols)])


def test_wrong_windows_and_types_are_refused(store):
    made = store(np.zeros((20, 32), np.uint8))
    with pytest.raises(ValueError, match="outside"):
        made.read(0, 21, 0, 32)
    with pytest.raises(ValueError, match="uint8"):
        made.write(0, 0, np.zeros((2, 2), np.int64))


def test_a_store_where_no_folder_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        LabelStore.create(
            tmp_path / "file" / "labels", height=1, width=1, cell_px=1, cells_hw=(1, 1)
        )
