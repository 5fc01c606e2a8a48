"""Real files of many makers; set GIGAVIM_TEST_DATA to run these."""

import numpy as np
import openslide
import pytest
import rasterio

from gigavim.errors import UnsupportedSlideError
from gigavim.slides import open_slide
from gigavim.slides.base import OpenOptions
from gigavim.slides.openslide_reader import OpenSlideSlide
from gigavim.slides.tiff import TiffSlide


@pytest.fixture
def aperio(data):
    return data / "wsi" / "CMU-1-Small-Region.svs"


def test_direct_reader_agrees_with_openslide(aperio):
    with open_slide(aperio) as direct, OpenSlideSlide(aperio) as reference:
        assert direct.reader == "tiff"
        assert direct.levels == reference.levels
        assert direct.mpp.x == reference.mpp.x == 0.499
        assert direct.bounds == reference.bounds
        assert direct.description["objective power"] == "20"
        ours = direct.read_level(0, 0, 0, 2220, 2967).astype(int)
        theirs = reference.read_level(0, 0, 0, 2220, 2967)
    # Two builds of one JPEG decoder differ by rounding.
    assert abs(ours - theirs).max() <= 1


def test_thumbnail_agrees_with_openslide(aperio):
    with open_slide(aperio) as slide, openslide.OpenSlide(aperio) as reference:
        ours = slide.thumbnail(300).astype(int)
        theirs = np.asarray(reference.get_thumbnail((300, 300)).convert("RGB"))
    height, width = min(ours.shape[0], theirs.shape[0]), min(ours.shape[1], theirs.shape[1])
    assert ours.shape == (300, 224, 3)
    assert abs(ours[:height, :width] - theirs[:height, :width]).mean() < 4


def test_hamamatsu_and_its_fallback(data):
    path = data / "wsi" / "test3-DAPI-2-(387).ndpi"
    with open_slide(path) as slide, TiffSlide(path, OpenOptions()) as fallback:
        assert slide.reader == "openslide"
        assert len(slide.levels) == 7
        assert slide.mpp.x == pytest.approx(0.2282, abs=1e-4)
        ours = slide.read_level(2, 100, 200, 300, 250).astype(int)
        level = [one.width for one in fallback.levels].index(slide.levels[2].width)
        assert abs(ours - fallback.read_level(level, 100, 200, 300, 250)).max() <= 2


def test_dicom_file_and_folder(data):
    folder = data / "wsi" / "openslide_fixtures"
    with open_slide(folder / "boxes_0.dcm") as one, open_slide(folder) as whole:
        assert one.levels == whole.levels
        np.testing.assert_array_equal(one.thumbnail(16), whole.thumbnail(16))
    with open_slide(data / "wsi" / "multi_frame_jpeg_camelyon_challenge_image.dcm") as slide:
        assert (slide.levels[0].width, slide.levels[0].height) == (1152, 700)
        assert slide.mpp.x == pytest.approx(28.97, abs=0.01)
    with pytest.raises(UnsupportedSlideError, match="no whole-slide image"):
        open_slide(data / "wsi" / "highdicom" / "seg_image_sm_dots.dcm")


@pytest.mark.parametrize(
    ("name", "reader", "size", "mpp_um"),
    [
        ("wsi/OS-1-detail.ome.tif", "tiff", (1101, 1101), 0.2271),
        ("wsi/openslide_fixtures/boxes.tiff", "tiff", (300, 250), 0),
        ("wsi/openslide_fixtures/😐.svs", "tiff", (16, 16), 0.499),
        ("wsi/highdicom/sm_image.dcm", "openslide", (50, 50), 0.499),
        ("wsi/ome_zarr/v05_test_image_yx.zarr", "zarr", (64, 64), 0.5),
        ("wsi/qupath_cells/cells.ome.tif", "tiff", (93, 131), 0.25),
        ("wsi/qupath_cells/cells-2z.ome.tif", "tiff", (93, 131), 0.25),
        ("wsi/qupath_cells/cells-gray16.tif", "tiff", (93, 131), 0.25),
        ("aerial/geotiff_unlabelled/m_4709963_se_14_1_20200831.tif", "rasterio", (934, 723), 5e6),
        ("aerial/geotiff_unlabelled/cogeo.tif", "rasterio", (1024, 1024), 473_282),
        ("aerial/geotiff_unlabelled/RGBA.uint16.tif", "rasterio", (634, 411), 1_379_984),
        ("aerial/geotiff_unlabelled/rotated.tif", "rasterio", (10, 15), 0),
        ("aerial/banepa/oam/OAM-386690-220241-19.tif", "rasterio", (512, 512), 132_357),
    ],
)
def test_formats(data, name, reader, size, mpp_um):
    with open_slide(data / name) as slide:
        assert slide.reader == reader
        assert (slide.levels[0].width, slide.levels[0].height) == size
        assert (slide.mpp.x if slide.mpp else 0) == pytest.approx(mpp_um, rel=1e-4)
        assert slide.thumbnail(64).shape[2] == 3
        assert slide.description["pixels"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("aerial/geotiff_unlabelled/dsm.tif", "32-bit float.*elevation"),
        ("wsi/qupath_cells/cells-gray32.tif", "32-bit float"),
        ("wsi/qupath_cells/cells-2c.ome.tif", "2 channels.*--channels 0,1,1"),
        ("wsi/small_vectra.qptiff", "3 channels.*--channels 0,1,2"),
        ("wsi/ome_zarr/v05_test_image_tczyx.zarr", r"2 channels \(channel_0.*--channels"),
    ],
)
def test_no_pictures(data, name, words):
    with pytest.raises(UnsupportedSlideError, match=words):
        open_slide(data / name)


def test_multiplex_with_channels(data):
    with open_slide(data / "wsi" / "small_vectra.qptiff", channels=(2, 1, 0)) as slide:
        assert slide.mpp.x == pytest.approx(0.4966, abs=1e-3)
        read = slide.read_level(0, 0, 0, 1920, 1440)
    import tifffile

    with tifffile.TiffFile(data / "wsi" / "small_vectra.qptiff") as tiff:
        np.testing.assert_array_equal(read, np.moveaxis(tiff.series[0].asarray(), 0, -1)[..., ::-1])


def test_truncated_cog_is_salvaged_and_sound_tiles_stay_readable(data):
    path = data / "corrupt" / "rasterio" / "corrupt.tif"
    with OpenSlideSlide(path) as slide:
        read, unreadable = slide.read_level_salvage(0, 0, 0, 1024, 1024)
        # The handle is dead after an error and was opened anew.
        again = slide.read_level(0, 0, 0, 512, 512)
        np.testing.assert_array_equal(read[:512, :512], again)
    assert 0 < unreadable.mean() < 1


def test_near_gigapixel_thumbnail(data):
    path = data / "aerial" / "geotiff_unlabelled" / "cog_world.tif"
    with open_slide(path) as slide, rasterio.open(path) as raster:
        assert len(slide.levels) == 7
        block = slide.read_level(0, 20_000, 5_000, 512, 512)
        window = rasterio.windows.Window(20_000, 5_000, 512, 512)
        land = raster.read(1, window=window)
        np.testing.assert_array_equal(block[..., 0], np.where(land == 0, 255, land))
        assert slide.thumbnail(500).shape == (250, 500, 3)
