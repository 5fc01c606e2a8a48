"""A slide held in memory: a reader over an array, like any other reader."""

import threading
from pathlib import Path

import numpy as np
import pytest

from gigavim.errors import TileReadError
from gigavim.frames import Bounds, Mpp
from gigavim.slides.base import Level, Slide


class ArraySlide(Slide):
    """Levels are arrays; `bad` holds (x, y, width, height) of level 0 that cannot be decoded."""

    reader = "array"

    def __init__(self, *arrays, mpp=0.5, bounds=None, background=(255, 255, 255), tile=64, bad=()):
        self.path = Path("array.svs")
        self.arrays = arrays
        height, width = arrays[0].shape[:2]
        self.levels = tuple(
            Level(a.shape[1], a.shape[0], width / a.shape[1], height / a.shape[0], tile, tile)
            for a in arrays
        )
        mpp_x, mpp_y = mpp if isinstance(mpp, tuple) else (mpp, mpp)
        self.mpp = None if mpp is None else Mpp(mpp_x, mpp_y, "test")
        self.bounds = bounds or Bounds(0, 0, width, height)
        self.background_rgb = background
        self.georeference = None
        self.description = {}
        self.bad = bad
        self.reads = 0
        self.lock = threading.Lock()

    def _read_inside(self, level, x, y, width, height):
        with self.lock:
            self.reads += 1
        for bad_x, bad_y, bad_width, bad_height in self.bad:
            across = bad_x < x + width and x < bad_x + bad_width
            if level == 0 and across and bad_y < y + height and y < bad_y + bad_height:
                raise TileReadError(f"{self.path}: a tile at ({x}, {y}) cannot be decoded")
        return self.arrays[level][y : y + height, x : x + width].copy()

    def close(self):
        pass


@pytest.fixture
def array_slide():
    return ArraySlide


@pytest.fixture
def noise_slide():
    def make(height, width, **settings):
        seed = np.random.default_rng(height * 10_007 + width)
        return ArraySlide(seed.integers(0, 256, (height, width, 3), np.uint8), **settings)

    return make
