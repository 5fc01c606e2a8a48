from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gigavim.frames import Bounds, MapFrame, Mpp
from gigavim.outputs.legend import scale_bar
from gigavim.outputs.overlay import UNREADABLE_RGB, write_overlay
from gigavim.slides.base import Level, OpenOptions, Slide, level_downsample


class ArraySlide(Slide):
    """A slide in memory with bounds inside level 0 and a second level of an odd size."""

    reader = "array"

    def __init__(self, pixels: np.ndarray, bounds: Bounds) -> None:
        self.path, self.options = Path("array"), OpenOptions()
        height, width = pixels.shape[:2]
        self._pixels = [pixels, pixels[1::3, 1::3]] if pixels.size > 99 else [pixels]
        self.levels = tuple(
            Level(
                level.shape[1], level.shape[0],
                level_downsample(width, level.shape[1]), level_downsample(height, level.shape[0]),
                256, 256,
            )
            for level in self._pixels
        )  # fmt: skip
        self.mpp, self.bounds = Mpp(0.25, 0.25, "test"), bounds
        self.background_rgb, self.georeference, self.description = (255, 255, 255), None, {}

    def _read_inside(self, level, x, y, width, height):
        return self._pixels[level][y : y + height, x : x + width]

    def close(self):
        pass


BOUNDS = Bounds(101, 67, 1777, 1301)
BLACK = (400, 900, 300, 1200)  # y0, y1, x0, x1 at level 0


def slide_with_a_rectangle():
    pixels = np.full((1500, 2000, 3), 240, np.uint8)
    y0, y1, x0, x1 = BLACK
    pixels[y0:y1, x0:x1] = 0
    return ArraySlide(pixels, BOUNDS)


def map_of(slide, scale):
    """The labels that a perfect model gives, on the canvas the tokens lie on."""
    width = int(np.ceil(BOUNDS.width_level0 / scale))
    height = int(np.ceil(BOUNDS.height_level0 / scale))
    frame = MapFrame(width, height, 101.0, 67.0, scale, scale, 0.25 * scale, 0.25 * scale)
    x = 101 + (np.arange(width) + 0.5) * scale
    y = 67 + (np.arange(height) + 0.5) * scale
    y0, y1, x0, x1 = BLACK
    inside = ((y >= y0) & (y < y1))[:, None] & ((x >= x0) & (x < x1))
    return inside.astype(np.uint8) * 2, frame


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.004, 3.7])
@pytest.mark.parametrize("max_px", [200, 777, 2048])
def test_the_map_lies_on_the_slide_to_the_pixel(tmp_path, store, classes, scale, max_px):
    slide = slide_with_a_rectangle()
    labels, frame = map_of(slide, scale)
    path = tmp_path / "a.png"
    write_overlay(slide, store(labels), frame, classes, path, max_px=max_px)
    picture = slide.thumbnail(max_px)
    height, width = picture.shape[:2]
    with Image.open(path) as image:
        shown = np.asarray(image)[:height, :width].astype(int)
    # Blue over black and over grey: how much of a pixel's area is the class.
    tinted = shown[..., 2] - shown[..., 0] > 50
    black = picture[..., 0] < 120
    ys, xs = np.nonzero(black)
    inner = np.zeros_like(black)
    # Half a map pixel, and one of the picture where the edge lies within it.
    slack = 1 + int(np.ceil(0.5 * scale * width / BOUNDS.width_level0))
    inner[ys.min() + slack : ys.max() + 1 - slack, xs.min() + slack : xs.max() + 1 - slack] = True
    outer = np.zeros_like(black)
    outer[ys.min() - slack : ys.max() + 1 + slack, xs.min() - slack : xs.max() + 1 + slack] = True
    assert tinted[inner].all()
    assert not tinted[~outer].any()


def test_the_legend_is_below_and_the_slide_is_untouched_elsewhere(tmp_path, store, classes):
    slide = slide_with_a_rectangle()
    labels, frame = map_of(slide, 2.0)
    labels[:] = 0
    path = tmp_path / "a.png"
    write_overlay(slide, store(labels), frame, classes, path, max_px=800)
    picture = slide.thumbnail(800)
    with Image.open(path) as image:
        shown = np.asarray(image)
    assert np.array_equal(shown[: len(picture)], picture)
    strip = shown[len(picture) + 1 :].reshape(-1, 3)
    for spec in classes[1:]:
        assert (strip == spec.color_rgb).all(1).any()


def test_what_was_unreadable_is_hatched(tmp_path, store, classes):
    slide = slide_with_a_rectangle()
    labels, frame = map_of(slide, 2.0)
    cells = np.ones((-(-labels.shape[0] // 16), -(-labels.shape[1] // 16)), np.uint8)
    cells[2:10, 3:12] = 2
    path = tmp_path / "a.png"
    write_overlay(slide, store(labels, cells), frame, classes, path, max_px=1777)
    with Image.open(path) as image:
        hatched = (np.asarray(image)[:1301, :1777] == UNREADABLE_RGB).all(-1)
    ys, xs = np.nonzero(hatched)
    assert np.allclose([ys.min(), ys.max() + 1], [64, 320], atol=4)
    assert np.allclose([xs.min(), xs.max() + 1], [96, 384], atol=4)


def test_one_pixel(tmp_path, store, classes):
    slide = ArraySlide(np.zeros((1, 1, 3), np.uint8), Bounds(0, 0, 1, 1))
    labels = np.ones((1, 1), np.uint8)
    frame = MapFrame(1, 1, 0.0, 0.0, 2.0, 2.0, float("nan"), float("nan"))
    path = tmp_path / "a.png"
    write_overlay(slide, store(labels), frame, classes, path)
    with Image.open(path) as image:
        assert image.getpixel((0, 0)) != (0, 0, 0)


@pytest.mark.parametrize(
    ("um_per_px", "longest", "metric", "expected"),
    [
        (0.5, 400, False, (400, "0.2 mm")),
        (0.25, 100, False, (80, "20 um")),
        (10, 399, False, (200, "2 mm")),
        (0.6e6, 400, True, (333, "200 m")),
        (100e6, 400, True, (200, "20 km")),
        (float("nan"), 400, False, None),
    ],
)
def test_scale_bars_are_round(um_per_px, longest, metric, expected):
    assert scale_bar(um_per_px, longest_px=longest, metric=metric) == expected
