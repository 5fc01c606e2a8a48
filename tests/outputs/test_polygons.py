import numpy as np
import pytest
import shapely
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from gigavim.errors import OutputError
from gigavim.frames import ClassSpec
from gigavim.outputs.polygons import regions

FLAT = (
    ClassSpec("background", (255, 255, 255), object_type="none"),
    ClassSpec("a", (255, 0, 0)),
    ClassSpec("b", (0, 255, 0)),
    ClassSpec("c", (0, 0, 255), object_type="none"),
)
NESTED = (
    ClassSpec("background", (255, 255, 255)),
    ClassSpec("tissue", (255, 0, 0)),
    ClassSpec("gland", (0, 255, 0), parent="tissue"),
    ClassSpec("nuclei", (0, 0, 255), parent="gland"),
)
FOUR = ndimage.generate_binary_structure(2, 1)


class Array:
    """A label map in memory."""

    def __init__(self, labels):
        self.labels = labels
        self.height, self.width = labels.shape

    def read(self, y0, y1, x0, x1):
        return self.labels[y0:y1, x0:x1]


def traced(labels, classes, tile_px=2048):
    """{(label, polygon as WKB)} of the regions; every region once."""
    found = [
        (int(label), polygon)
        for batch in regions(Array(labels), classes, tile_px=tile_px)
        for label, polygon in zip(batch.labels, batch.polygons, strict=True)
    ]
    keys = {(label, shapely.to_wkb(polygon)) for label, polygon in found}
    assert len(keys) == len(found)
    return keys, found


def maps(classes):
    sides = st.tuples(st.integers(1, 14), st.integers(1, 14))
    return hnp.arrays(np.uint8, sides, elements=st.integers(0, classes - 1))


CHECKERS = np.indices((9, 9)).sum(0).astype(np.uint8) % 2
RING = np.pad(np.zeros((3, 3), np.uint8), 3, constant_values=1)
STAIRS = np.eye(9, dtype=np.uint8) | np.eye(9, k=1, dtype=np.uint8)
DIAGONAL_HOLES = np.ones((6, 6), np.uint8)
DIAGONAL_HOLES[[1, 2, 3, 4], [1, 2, 3, 4]] = 0


@settings(max_examples=120, deadline=None)
@given(labels=maps(4), tile_px=st.integers(1, 9))
@example(CHECKERS, 4)
@example(RING, 4)
@example(RING, 5)
@example(STAIRS, 3)
@example(DIAGONAL_HOLES, 2)
@example(DIAGONAL_HOLES, 3)
def test_the_tiling_changes_nothing(labels, tile_px):
    for classes in (FLAT, NESTED):
        assert traced(labels, classes, tile_px)[0] == traced(labels, classes)[0]


@settings(max_examples=80, deadline=None)
@given(labels=maps(4), tile_px=st.integers(1, 20))
@example(CHECKERS, 4)
@example(DIAGONAL_HOLES, 3)
def test_areas_are_pixel_counts_and_regions_are_4_connected(labels, tile_px):
    below = {1: [1, 2, 3], 2: [2, 3], 3: [3]}
    _, found = traced(labels, NESTED, tile_px)
    for value, members in below.items():
        polygons = [polygon for label, polygon in found if label == value]
        mask = np.isin(labels, members)
        assert sum(polygon.area for polygon in polygons) == mask.sum()
        assert len(polygons) == ndimage.label(mask, FOUR)[1]
        assert all(polygon.is_valid for polygon in polygons)
        # Every pixel's centre lies in a polygon of its class, and no other pixel's does.
        y, x = np.mgrid[: labels.shape[0], : labels.shape[1]] + 0.5
        inside = shapely.contains_xy(shapely.MultiPolygon(polygons), x, y)
        assert np.array_equal(inside, mask)


def test_a_block_of_2_by_3_pixels_is_its_edge():
    labels = np.zeros((10, 10), np.uint8)
    labels[4:6, 3:6] = 1
    _, found = traced(labels, FLAT)
    assert found[0][1].bounds == (3, 4, 6, 6)
    assert found[0][1].area == 6
    assert len(found[0][1].exterior.coords) == 5
    assert found[0][1].exterior.is_ccw


def test_holes_are_kept():
    labels = np.ones((300, 300), np.uint8)
    labels[100:200, 50:250] = 0
    _, found = traced(labels, FLAT, tile_px=64)
    assert [list(ring.coords) for ring in found[0][1].interiors] == [
        [(50, 100), (50, 200), (250, 200), (250, 100), (50, 100)]
    ]


def test_classes_of_type_none_and_background_are_not_traced():
    labels = np.array([[0, 1, 2, 3]], np.uint8)
    assert sorted(label for label, _ in traced(labels, FLAT)[1]) == [1, 2]
    assert sorted(label for label, _ in traced(labels, NESTED)[1]) == [1, 2, 3]


def test_an_empty_map_has_none():
    assert traced(np.zeros((5, 7), np.uint8), FLAT)[1] == []
    assert traced(np.zeros((0, 0), np.uint8), FLAT)[1] == []


def test_labels_and_classes_that_do_not_fit():
    with pytest.raises(OutputError, match="more than 4 classes"):
        traced(np.full((3, 3), 7, np.uint8), FLAT)
    with pytest.raises(OutputError, match="'stroma' is no class"):
        traced(np.ones((3, 3), np.uint8), (ClassSpec("x", (0, 0, 0), parent="stroma"),))
    circle = (ClassSpec("x", (0, 0, 0), parent="y"), ClassSpec("y", (0, 0, 0), parent="x"))
    with pytest.raises(OutputError, match="below it"):
        traced(np.ones((3, 3), np.uint8), circle)


def test_noise_over_many_tiles():
    labels = np.random.default_rng(3).integers(0, 4, (210, 190), dtype=np.uint8)
    labels[60:180, 30:150][labels[60:180, 30:150] == 0] = 1
    expected, _ = traced(labels, NESTED)
    for tile_px in (32, 97):
        keys, found = traced(labels, NESTED, tile_px)
        assert keys == expected
        assert all(polygon.is_valid for _, polygon in found)
