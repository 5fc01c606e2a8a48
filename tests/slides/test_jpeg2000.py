"""Aperio's JPEG 2000 of Y, Cb and Cr; OpenSlide is the judge."""

import imagecodecs
import numpy as np
import openslide
import pytest
import rasterio
import tifffile
from rasterio.enums import ColorInterp

from gigavim.errors import TileReadError
from gigavim.slides import open_slide

TILE_PX = 128
DESCRIPTION = (
    "Aperio Image Library v10.0.50\n500x400 [0,0 500x400] (128x128) J2K/YUV16 Q=70"
    "|AppMag = 20|MPP = 0.4990"
)


def whole(rgb):
    """Y, Cb and Cr at full resolution, without loss."""
    red, green, blue = np.moveaxis(rgb.astype(float), -1, 0)
    y = 0.299 * red + 0.587 * green + 0.114 * blue
    ycbcr = np.stack([y, 128 + (blue - y) / 1.772, 128 + (red - y) / 1.402], -1)
    samples = np.ascontiguousarray(np.clip(np.rint(ycbcr), 0, 255).astype(np.uint8))
    return imagecodecs.jpeg2k_encode(
        samples, codecformat="J2K", mct=False, reversible=True, level=0
    )


def halved(rgb):
    """Cb and Cr at half the resolution of Y."""
    with rasterio.MemoryFile(ext=".j2k") as file:
        with file.open(
            driver="JP2OpenJPEG", width=TILE_PX, height=TILE_PX, count=3, dtype="uint8",
            CODEC="J2K", YCBCR420="YES", QUALITY="100", REVERSIBLE="YES",
        ) as raster:  # fmt: skip
            raster.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue]
            raster.write(np.moveaxis(rgb, -1, 0))
        return file.read()


@pytest.fixture
def write(tmp_path):
    def write(encode, *, photometric="rgb"):
        y, x = np.mgrid[:400, :500]
        waves = [np.sin(x / 17), np.cos(y / 23), np.sin((x + y) / 31)]
        rgb = (128 + 100 * np.stack(waves, -1)).astype(np.uint8)
        padded = np.pad(rgb, ((0, -400 % TILE_PX), (0, -500 % TILE_PX), (0, 0)), "edge")
        tiles = [
            encode(padded[row : row + TILE_PX, column : column + TILE_PX])
            for row in range(0, len(padded), TILE_PX)
            for column in range(0, padded.shape[1], TILE_PX)
        ]
        path = tmp_path / "slide.svs"
        tifffile.imwrite(
            path, iter(tiles), shape=rgb.shape, dtype=np.uint8, tile=(TILE_PX, TILE_PX),
            photometric=photometric, compression=33003, description=DESCRIPTION, metadata=None,
        )  # fmt: skip
        return path, rgb

    return write


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
@pytest.mark.parametrize(("encode", "most", "mean"), [(whole, 1, 0.6), (halved, 14, 2.5)])
def test_colours_are_those_of_openslide(write, encode, most, mean, photometric):
    path, rgb = write(encode, photometric=photometric)
    with openslide.OpenSlide(path) as handle:
        assert handle.properties["openslide.vendor"] == "aperio"
        judged = np.asarray(handle.read_region((0, 0), 0, (500, 400)).convert("RGB")).astype(int)
    with open_slide(path) as slide:
        assert slide.reader == "tiff"
        assert slide.mpp.x == 0.499
        pixels = slide.read_level(0, 0, 0, 500, 400).astype(int)
    assert np.abs(pixels - judged).max() <= 1
    assert np.abs(pixels - rgb).max() <= most
    assert np.abs(pixels - rgb).mean() <= mean


def test_a_damaged_tile_is_known(write):
    path, rgb = write(whole)
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages.first.dataoffsets[5], tiff.pages.first.databytecounts[5]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(count))
    with open_slide(path) as slide:
        with pytest.raises(TileReadError, match=r"tile \(1, 1\) of level 0.*no JPEG 2000"):
            slide.read_level(0, 128, 128, 128, 128)
        pixels, unreadable = slide.read_level_salvage(0, 0, 0, 500, 400)
    expected = np.zeros((400, 500), bool)
    expected[128:256, 128:256] = True
    np.testing.assert_array_equal(unreadable, expected)
    assert np.abs(pixels.astype(int) - rgb)[~unreadable].max() <= 1
