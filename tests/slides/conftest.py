import os
from pathlib import Path

import numpy as np
import pytest
import tifffile


@pytest.fixture(scope="session")
def data() -> Path:
    folder = os.environ.get("GIGAVIM_TEST_DATA")
    if not folder:
        pytest.skip("GIGAVIM_TEST_DATA is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def picture():
    """A smooth picture with texture of any size: (height, width, 3) uint8, the same every time."""

    def make(height: int, width: int) -> np.ndarray:
        y, x = np.mgrid[0:height, 0:width].astype(np.float32)
        waves = [np.sin(x / 17 + k) * 60 + np.cos(y / 23 - k) * 50 + 128 for k in range(3)]
        noise = np.random.default_rng(7).integers(-10, 11, (height, width, 3))
        return np.clip(np.stack(waves, axis=-1) + noise, 0, 255).astype(np.uint8)

    return make


@pytest.fixture
def pyramid(tmp_path, picture):
    """A lossless tiled TIFF of two levels, 700 x 500 px at 0.5 um, and its pixels."""
    pixels = picture(500, 700)
    path = tmp_path / "pyramid.tif"
    options = {"tile": (64, 64), "photometric": "rgb", "compression": "deflate"}
    with tifffile.TiffWriter(path) as writer:
        resolution = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
        writer.write(pixels, subifds=1, metadata=None, **options, **resolution)
        half = pixels.reshape(250, 2, 350, 2, 3).mean((1, 3)).round().astype(np.uint8)
        writer.write(half, subfiletype=1, metadata=None, **options)
    return path, pixels, half
