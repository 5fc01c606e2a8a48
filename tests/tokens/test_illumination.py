import numpy as np
import pytest

from gigavim.frames import Bounds
from gigavim.tokens.illumination import has_dark_background


def cells(size, colour, background, noise=4, seed=0):
    """Blobs of a colour on a background: (size, size, 3) uint8."""
    random = np.random.default_rng(seed)
    pixels = np.full((size, size, 3), background, np.float32)
    y, x = np.mgrid[:size, :size]
    for row, column in random.integers(0, size, (size // 10, 2)):
        near = np.exp(-((y - row) ** 2 + (x - column) ** 2) / 60)[..., None]
        pixels += near * (np.asarray(colour, np.float32) - pixels)
    return np.clip(pixels + random.normal(0, noise, pixels.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("colour", "background"),
    [
        ((0, 0, 255), (0, 0, 12)),
        ((0, 0, 200), (0, 0, 0)),
        ((180, 180, 180), (10, 10, 10)),
        ((250, 30, 90), (4, 6, 20)),
    ],
)
def test_fluorescence_is_dark_where_it_is_empty(array_slide, colour, background):
    assert has_dark_background(array_slide(cells(300, colour, background)))


@pytest.mark.parametrize(
    ("colour", "background"),
    [
        ((90, 50, 130), (243, 243, 243)),
        ((70, 40, 100), (190, 120, 170)),
        ((60, 30, 90), (120, 60, 130)),
    ],
)
@pytest.mark.parametrize("padding", [0, 200])
def test_stained_tissue_is_not_dark_with_or_without_black_around_it(
    array_slide, colour, background, padding
):
    pixels = cells(300, colour, background)
    padded = np.pad(pixels, ((0, 0), (padding, padding), (0, 0)))
    assert not has_dark_background(array_slide(padded))


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("size", [(1, 1), (40, 50)])
def test_an_image_of_nothing_is_not_dark(array_slide, value, size):
    assert not has_dark_background(array_slide(np.full((*size, 3), value, np.uint8)))


def test_only_the_bounds_and_what_can_be_read_count(array_slide):
    glow, tissue = cells(256, (0, 0, 255), (0, 0, 12)), cells(256, (90, 50, 130), (243, 243, 243))
    both = np.hstack([glow, tissue])
    assert has_dark_background(array_slide(both, bounds=Bounds(0, 0, 256, 256)))
    assert not has_dark_background(array_slide(both, bounds=Bounds(256, 0, 256, 256)))
    assert not has_dark_background(array_slide(both, bad=[(0, 0, 256, 256)]))
    assert not has_dark_background(array_slide(glow, bad=[(0, 0, 256, 256)]))


def test_a_large_level_is_sampled(array_slide):
    large = np.tile(cells(256, (0, 0, 255), (0, 0, 12)), (8, 10, 1))
    slide, read = array_slide(large), []
    inside = slide._read_inside

    def counted(level, x, y, width, height):
        read.append(width * height)
        return inside(level, x, y, width, height)

    slide._read_inside = counted
    assert has_dark_background(slide)
    assert sum(read) < large[..., 0].size / 10
