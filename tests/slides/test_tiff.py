import pickle
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import tifffile

from gigavim.errors import CorruptSlideError, TileReadError
from gigavim.slides import open_slide


def test_levels_mpp_and_pixels(pyramid):
    path, pixels, half = pyramid
    with open_slide(path) as slide:
        assert slide.reader == "tiff"
        sizes = [(level.width, level.height, level.downsample_x) for level in slide.levels]
        assert sizes == [(700, 500, 1.0), (350, 250, 2.0)]
        assert (slide.mpp.x, slide.mpp.y, slide.mpp.source) == (0.5, 0.5, "TIFF resolution")
        np.testing.assert_array_equal(slide.read_level(0, 0, 0, 700, 500), pixels)
        np.testing.assert_array_equal(slide.read_level(1, 13, 27, 200, 111), half[27:138, 13:213])


def test_outside_is_background(pyramid):
    path, pixels, _ = pyramid
    with open_slide(path) as slide:
        region = slide.read_level(0, -10, 490, 30, 20)
        np.testing.assert_array_equal(region[:10, 10:], pixels[490:, :20])
        assert (region[10:] == 255).all()
        assert (region[:, :10] == 255).all()
        assert (slide.read_level(0, 10**9, -(10**9), 3, 2) == 255).all()
        assert slide.read(1e9, 1e9, 5, 4, mpp=3.3).shape == (4, 5, 3)


@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "zstd", "packbits"])
@pytest.mark.parametrize("rows", [1, 7, 500])
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_strips(tmp_path, picture, compression, rows, byteorder):
    pixels = picture(97, 61)
    path = tmp_path / "strips.tif"
    with tifffile.TiffWriter(path, byteorder=byteorder) as writer:
        writer.write(
            pixels, photometric="rgb", compression=compression, rowsperstrip=rows, metadata=None
        )
    with open_slide(path) as slide:
        assert slide.reader == "tiff"
        np.testing.assert_array_equal(slide.read_level(0, 0, 0, 61, 97), pixels)
        np.testing.assert_array_equal(slide.read_level(0, 5, 90, 20, 7), pixels[90:, 5:25])


def test_uncompressed_in_one_strip_is_read_in_pieces(tmp_path, picture):
    pixels = np.tile(picture(500, 700), (4, 3, 1))
    path = tmp_path / "flat.tif"
    tifffile.imwrite(path, pixels, photometric="rgb", rowsperstrip=len(pixels), metadata=None)
    with open_slide(path) as slide:
        assert slide.levels[0].tile_height < 400
        np.testing.assert_array_equal(slide.read_level(0, 0, 0, 2100, 2000), pixels)


@pytest.mark.parametrize("bigtiff", [False, True])
def test_planes_stored_apart(tmp_path, picture, bigtiff):
    pixels = picture(150, 130)
    path = tmp_path / "planar.tif"
    planes = np.moveaxis(pixels, -1, 0)
    tifffile.imwrite(
        path,
        planes,
        photometric="rgb",
        planarconfig="separate",
        tile=(64, 64),
        bigtiff=bigtiff,
        compression="deflate",
    )
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read_level(0, 0, 0, 130, 150), pixels)


def test_ome_tiff_with_sub_ifds(tmp_path, picture):
    pixels = picture(400, 600)
    path = tmp_path / "image.ome.tif"
    metadata = {"PhysicalSizeX": 250, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.25}
    with tifffile.TiffWriter(path, ome=True) as writer:
        options = {"photometric": "rgb", "tile": (128, 128)}
        writer.write(pixels, subifds=2, metadata=metadata, **options)
        writer.write(pixels[::2, ::2], subfiletype=1, **options)
        writer.write(pixels[::4, ::4], subfiletype=1, **options)
    with open_slide(path) as slide:
        assert slide.description["format"] == "TIFF (ome)"
        assert [level.downsample_x for level in slide.levels] == [1.0, 2.0, 4.0]
        assert (slide.mpp.x, slide.mpp.y, slide.mpp.source) == (0.25, 0.25, "OME-XML")
        np.testing.assert_array_equal(slide.read_level(2, 0, 0, 150, 100), pixels[::4, ::4])


@pytest.mark.parametrize("subsampling", [(1, 1), (2, 2)])
def test_jpeg_colours_come_from_the_photometric_tag(tmp_path, subsampling):
    flat = np.full((256, 256, 3), (200, 40, 90), np.uint8)
    path = tmp_path / "jpeg.tif"
    tifffile.imwrite(
        path,
        flat,
        photometric="rgb",
        tile=(128, 128),
        compression="jpeg",
        compressionargs={"level": 95},
        subsampling=subsampling,
    )
    with open_slide(path) as slide:
        pixels = slide.read_level(0, 0, 0, 256, 256).astype(int)
    assert abs(pixels - flat).max() <= 3


def test_blocks_in_raster_order_decode_each_tile_once(pyramid):
    path, pixels, _ = pyramid
    with open_slide(path) as slide:
        before = slide.tiles_decoded
        out = np.empty_like(pixels)
        for y, x in product(range(0, 500, 100), range(0, 700, 100)):
            out[y : y + 100, x : x + 100] = slide.read(x, y, 100, 100)
        np.testing.assert_array_equal(out, pixels)
        tiles = 8 * 11
        # The tile that proved the slide readable on opening was of the coarsest level.
        assert slide.tiles_decoded - before == tiles


def test_threads_share_tiles_and_agree(pyramid):
    path, pixels, _ = pyramid
    with open_slide(path) as slide, ThreadPoolExecutor(8) as pool:
        before = slide.tiles_decoded
        places = list(product(range(0, 500, 100), range(0, 700, 100)))
        parts = pool.map(lambda place: slide.read(place[1], place[0], 100, 100), places)
        for (y, x), part in zip(places, parts):
            np.testing.assert_array_equal(part, pixels[y : y + 100, x : x + 100])
        assert slide.tiles_decoded - before == 8 * 11


def test_earlier_results_are_not_overwritten(tmp_path, picture):
    pixels = picture(1200, 1200)
    path = tmp_path / "large.tif"
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(256, 256))
    with open_slide(path) as slide:
        first = slide.read_level(0, 0, 0, 1000, 1000)[100:200, 100:200]
        second = slide.read_level(0, 200, 200, 1000, 1000)
        np.testing.assert_array_equal(first, pixels[100:200, 100:200])
        np.testing.assert_array_equal(second, pixels[200:, 200:])


def test_pickles_with_its_options(pyramid):
    path, pixels, _ = pyramid
    with open_slide(path, mpp=0.25) as slide:
        copy = pickle.loads(pickle.dumps(slide))
    with copy:
        assert copy.mpp.x == 0.25
        np.testing.assert_array_equal(copy.read(0, 0, 50, 60), pixels[:60, :50])


def test_dask_equals_read_level(pyramid):
    path, pixels, half = pyramid
    with open_slide(path) as slide:
        lazy = slide.to_dask(0, chunk_px=150)
        assert lazy.shape == (500, 700, 3)
        assert lazy.dtype == np.uint8
        np.testing.assert_array_equal(lazy.compute(scheduler="threads"), pixels)
        part = slide.to_dask(1, chunk_px=64)[30:99, 10:222]
        np.testing.assert_array_equal(part.compute(), half[30:99, 10:222])


def damage(path, share=0.5):
    """Overwrite every second tile of the finest level; return where they are."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        offsets, counts = page.dataoffsets, page.databytecounts
        columns = -(-page.imagewidth // page.tilewidth)
    damaged = [index for index in range(len(offsets)) if index % round(1 / share) == 0]
    with path.open("r+b") as file:
        for index in damaged:
            file.seek(offsets[index])
            file.write(b"\xaa" * counts[index])
    return {divmod(index, columns) for index in damaged}


def test_salvage_marks_exactly_the_damaged_tiles(pyramid):
    path, pixels, _ = pyramid
    damaged = damage(path)
    expected = np.zeros((500, 700), bool)
    for row, column in damaged:
        expected[row * 64 : row * 64 + 64, column * 64 : column * 64 + 64] = True
    with open_slide(path) as slide:
        with pytest.raises(TileReadError, match=r"tile \(0, 0\) of level 0 cannot be decoded"):
            slide.read_level(0, 0, 0, 100, 100)
        read, unreadable = slide.read_level_salvage(0, 0, 0, 700, 500)
        np.testing.assert_array_equal(unreadable, expected)
        np.testing.assert_array_equal(read[~expected], pixels[~expected])
        assert (read[expected] == 255).all()
        read, unreadable = slide.read_level_salvage(0, -20, 30, 200, 200)
        np.testing.assert_array_equal(unreadable[:, 20:], expected[30:230, :180])
        assert not unreadable[:, :20].any()
        # Where the tiles are sound, nothing is marked.
        sound = slide.read_level_salvage(0, 64, 0, 64, 64)
        assert sound[1] is None
        scaled, unreadable = slide.read_salvage(0, 0, 200, 150, scale_xy=(1.5, 1.5))
        assert scaled.shape == (150, 200, 3)
        assert 0.3 < unreadable.mean() < 0.7


def test_cut_off_file_is_read_as_far_as_it_goes(pyramid, caplog):
    path, pixels, _ = pyramid
    with tifffile.TiffFile(path) as tiff:
        offsets = tiff.pages.first.dataoffsets
        directory = tiff.pages.first.offset
    assert directory < offsets[0]
    with path.open("r+b") as file:
        file.truncate(offsets[40])
    with open_slide(path) as slide:
        assert len(slide.levels) == 1
        read, unreadable = slide.read_level_salvage(0, 0, 0, 700, 500)
    assert not unreadable[:192].any()
    assert unreadable[256:].all()
    np.testing.assert_array_equal(read[:192], pixels[:192])


def test_all_tiles_lost_is_an_error(pyramid):
    path, _, _ = pyramid
    damage(path, share=1)
    with tifffile.TiffFile(path) as tiff:
        half = tiff.pages.first.pages[0]
        places = list(zip(half.dataoffsets, half.databytecounts))
    with path.open("r+b") as file:
        for offset, count in places:
            file.seek(offset)
            file.write(b"\xaa" * count)
    with pytest.raises(CorruptSlideError, match="cannot be decoded"):
        open_slide(path)


def test_the_largest_image_is_the_picture(tmp_path, picture):
    path = tmp_path / "thumbnail_first.tif"
    with tifffile.TiffWriter(path) as writer:
        writer.write(picture(40, 60), photometric="rgb", metadata=None)
        writer.write(picture(400, 600), photometric="rgb", metadata=None)
    with open_slide(path) as slide:
        assert (slide.levels[0].width, slide.levels[0].height) == (600, 400)


def test_fingerprint_tells_files_apart(pyramid, tmp_path):
    path, _, _ = pyramid
    copy = tmp_path / "copy.tif"
    copy.write_bytes(path.read_bytes())
    other = tmp_path / "other.tif"
    other.write_bytes(path.read_bytes() + b"\0")
    with open_slide(path) as a, open_slide(copy) as b, open_slide(other) as c:
        assert a.fingerprint() == b.fingerprint() != c.fingerprint()
