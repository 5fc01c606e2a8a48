"""Whole JPEG tiles go a shorter way: it must end where the careful one does."""

import struct

import imagecodecs
import numpy as np
import pytest
import tifffile

from gigavim.errors import TileReadError
from gigavim.slides import open_slide

TILE_PX, COLUMNS, ROWS = 64, 11, 8
HEIGHT, WIDTH = 500, 700


def encoded(pixels):
    return imagecodecs.jpeg8_encode(np.ascontiguousarray(pixels), level=95)


@pytest.fixture
def write(tmp_path, picture):
    """Write a JPEG slide, some tiles replaced by other bytes; return it and its true pixels."""

    def write(replaced=None):
        height, width = ROWS * TILE_PX, COLUMNS * TILE_PX
        pixels = picture(height, width)
        tiles = [
            encoded(pixels[y : y + TILE_PX, x : x + TILE_PX])
            for y in range(0, height, TILE_PX)
            for x in range(0, width, TILE_PX)
        ]
        rows = [
            np.hstack([imagecodecs.jpeg8_decode(tile) for tile in tiles[at : at + COLUMNS]])
            for at in range(0, len(tiles), COLUMNS)
        ]
        for index, data in (replaced or {}).items():
            tiles[index] = data
        path = tmp_path / "slide.tif"
        tifffile.imwrite(
            path, iter(tiles), shape=(HEIGHT, WIDTH, 3), dtype=np.uint8, tile=(TILE_PX, TILE_PX),
            photometric="ycbcr", compression="jpeg", subsampling=(2, 2), metadata=None,
        )  # fmt: skip
        return path, np.vstack(rows)[:HEIGHT, :WIDTH]

    return write


def patch(path, tag, index, value):
    """Change an entry of a table of 32-bit numbers in the file."""
    with tifffile.TiffFile(path) as tiff:
        found = tiff.pages.first.tags[tag]
        assert found.dtype == 4
        place = found.valueoffset + 4 * index
    with path.open("r+b") as file:
        file.seek(place)
        file.write(struct.pack("<I", value))


def marked(*indices):
    unreadable = np.zeros((ROWS * TILE_PX, COLUMNS * TILE_PX), bool)
    for index in indices:
        row, column = divmod(index, COLUMNS)
        unreadable[row * TILE_PX :, column * TILE_PX :][:TILE_PX, :TILE_PX] = True
    return unreadable[:HEIGHT, :WIDTH]


def test_any_region_is_that_of_the_whole(write):
    path, pixels = write()
    random = np.random.default_rng(2)
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read_level(0, 0, 0, WIDTH, HEIGHT), pixels)
        for _ in range(60):
            x, y = int(random.integers(0, WIDTH)), int(random.integers(0, HEIGHT))
            width, height = random.integers(1, (WIDTH - x + 1, HEIGHT - y + 1)).tolist()
            np.testing.assert_array_equal(
                slide.read_level(0, x, y, width, height), pixels[y : y + height, x : x + width]
            )


@pytest.mark.parametrize("scale", [1.0, 1.7])
@pytest.mark.parametrize("replaced", [{}, {14: b"\xaa" * 500}], ids=["sound", "damaged"])
def test_strips_are_the_region_cut_up(write, replaced, scale):
    path, _ = write(replaced)
    random = np.random.default_rng(3)
    with open_slide(path) as slide:
        for _ in range(40):
            # Whole tile columns as often as not, within the slide and beyond its edge.
            unit = int(random.choice([TILE_PX, TILE_PX, 16]))
            x, y = int(random.integers(-1, 9)) * unit, int(random.integers(0, 4)) * 32
            count, height = int(random.integers(1, 7)), int(random.integers(1, 400))
            place = (x * scale, y * scale, count * TILE_PX, height)
            expected, missing = slide.read_salvage(*place, scale_xy=(scale, scale))
            strips, unreadable = slide.read_strips(*place, TILE_PX, scale_xy=(scale, scale))
            assert strips.shape == (count, height, TILE_PX, 3)
            np.testing.assert_array_equal(np.hstack(list(strips)), expected)
            np.testing.assert_array_equal(unreadable, missing)


@pytest.mark.parametrize("block_px", [64, 100, 192, 256])
def test_blocks_decode_each_tile_once(write, block_px):
    path, pixels = write()
    with open_slide(path) as slide:
        before = slide.tiles_decoded
        for y in range(0, HEIGHT, block_px):
            for x in range(0, WIDTH, block_px):
                width, height = min(block_px, WIDTH - x), min(block_px, HEIGHT - y)
                np.testing.assert_array_equal(
                    slide.read_level(0, x, y, width, height), pixels[y : y + height, x : x + width]
                )
        assert slide.tiles_decoded - before <= ROWS * COLUMNS


@pytest.mark.parametrize(
    "data",
    [
        b"\xaa" * 500,
        b"\xff\xd8\xff",
        encoded(np.zeros((64, 63, 3), np.uint8)),
        encoded(np.zeros((8, 8, 3), np.uint8)),
    ],
    ids=["noise", "cut off", "too narrow", "tiny"],
)
def test_a_tile_that_is_not_what_it_should_be_is_marked_alone(write, data):
    path, pixels = write({14: data, 30: data})
    with open_slide(path) as slide:
        with pytest.raises(TileReadError, match=r"tile \(3, 1\) of level 0"):
            slide.read_level(0, 0, 0, WIDTH, HEIGHT)
        read, unreadable = slide.read_level_salvage(0, 0, 0, WIDTH, HEIGHT)
        np.testing.assert_array_equal(unreadable, marked(14, 30))
        np.testing.assert_array_equal(read[~unreadable], pixels[~unreadable])


def test_a_tile_larger_than_it_should_be_is_cut(write):
    path, pixels = write({14: encoded(np.full((80, 96, 3), 77, np.uint8))})
    with open_slide(path) as slide:
        read = slide.read_level(0, 0, 0, WIDTH, HEIGHT)
    assert (read[64:128, 192:256] == 77).all()
    np.testing.assert_array_equal(read[~marked(14)], pixels[~marked(14)])


@pytest.mark.parametrize(
    ("tag", "value"),
    [
        ("TileOffsets", 0),
        ("TileOffsets", 2**32 - 2),
        ("TileByteCounts", 0),
        ("TileByteCounts", 2**31),
        ("TileByteCounts", 3),
    ],
)
def test_lies_about_where_a_tile_is(write, tag, value):
    path, pixels = write()
    patch(path, tag, 27, value)
    with open_slide(path) as slide:
        read, unreadable = slide.read_level_salvage(0, 0, 0, WIDTH, HEIGHT)
    missing = unreadable if unreadable is not None else marked()
    sound = ~marked(27)
    np.testing.assert_array_equal(read[sound], pixels[sound])
    # A segment left out on purpose is background; what cannot be there is unreadable.
    assert missing[marked(27)].all() or (value == 0 and (read[marked(27)] == 255).all())
    assert not missing[sound].any()
