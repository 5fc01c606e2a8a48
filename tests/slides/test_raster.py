import pickle

import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp, Resampling
from rasterio.transform import from_origin

from gigavim.slides import open_slide

UTM = {"crs": "EPSG:32633", "transform": from_origin(500_000, 5_000_000, 0.25, 0.25)}


def write(path, pixels, *, overviews=(), mask=None, colours=None, **options):
    """Write (height, width, bands) as a tiled GeoTIFF."""
    height, width, bands = pixels.shape
    profile = {"width": width, "height": height, "count": bands, "dtype": pixels.dtype}
    tiling = {"tiled": True, "blockxsize": 128, "blockysize": 128, "compress": "deflate"}
    environment = rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True)
    with environment, rasterio.open(path, "w", "GTiff", **profile, **tiling, **options) as raster:
        raster.write(np.moveaxis(pixels, -1, 0))
        if colours:
            raster.colorinterp = colours
        if mask is not None:
            raster.write_mask(mask)
        if overviews:
            raster.build_overviews(overviews, Resampling.average)
    return path


def test_georeference_levels_and_pixels(tmp_path, picture):
    pixels = picture(515, 701)
    path = write(tmp_path / "ortho.tif", pixels, overviews=[2, 4], photometric="rgb", **UTM)
    with open_slide(path) as slide:
        assert slide.reader == "rasterio"
        assert [(level.width, level.height) for level in slide.levels] == [
            (701, 515),
            (351, 258),
            (176, 129),
        ]
        assert slide.levels[1].downsample_x == pytest.approx(701 / 351)
        assert (slide.mpp.x, slide.mpp.y, slide.mpp.source) == (250_000, 250_000, "crs")
        assert slide.georeference.transform == (0.25, 0.0, 500_000, 0.0, -0.25, 5_000_000)
        assert "UTM zone 33N" in slide.georeference.crs_wkt
        np.testing.assert_array_equal(
            slide.read_level(0, 100, 50, 300, 200), pixels[50:250, 100:400]
        )
        with rasterio.open(path, overview_level=0) as half:
            expected = np.moveaxis(half.read(), 0, -1)
        np.testing.assert_array_equal(slide.read_level(1, 0, 0, 351, 258), expected)
        np.testing.assert_array_equal(
            pickle.loads(pickle.dumps(slide)).read(5, 6, 7, 8), pixels[6:14, 5:12]
        )
        np.testing.assert_array_equal(slide.to_dask(0, chunk_px=256).compute(), pixels)


@pytest.mark.parametrize(
    ("crs", "x", "y", "size", "expected_m"),
    [
        # A degree along the equator, and at 60 degrees north.
        ("EPSG:4326", 10, 0, 1e-5, (1.1132, 1.1057)),
        ("EPSG:4326", 10, 60, 1e-5, (0.5580, 1.1141)),
        # Web Mercator's metres are twice the ground's at 60 degrees north.
        ("EPSG:3857", 1_113_195, 8_399_738, 1.0, (0.5009, 0.5001)),
        ("EPSG:2263", 987_000, 192_000, 1.0, (0.3048, 0.3048)),
    ],
)
def test_ground_size_of_a_pixel(tmp_path, picture, crs, x, y, size, expected_m):
    path = tmp_path / "m.tif"
    write(path, picture(20, 20), crs=crs, transform=from_origin(x, y, size, size))
    with open_slide(path) as slide:
        found_m = (slide.mpp.x / 1e6, slide.mpp.y / 1e6)
    assert found_m == pytest.approx(expected_m, rel=2e-3)


def test_rotation_is_kept(tmp_path, picture):
    turned = rasterio.Affine.translation(500_000, 5_000_000) * rasterio.Affine.rotation(30)
    turned = turned * rasterio.Affine.scale(0.5, -0.4)
    path = write(tmp_path / "r.tif", picture(20, 20), crs="EPSG:32633", transform=turned)
    with open_slide(path) as slide:
        assert slide.georeference.transform == pytest.approx(tuple(turned)[:6])
        assert (slide.mpp.x, slide.mpp.y) == pytest.approx((500_000, 400_000))


def test_no_data_is_background(tmp_path, picture):
    pixels = np.maximum(picture(100, 100), 1)
    pixels[:30] = 0
    pixels[50, 50] = (0, 77, 0)
    path = write(tmp_path / "n.tif", pixels, nodata=0, photometric="rgb", **UTM)
    with open_slide(path) as slide:
        read = slide.read_level(0, 0, 0, 100, 100)
    assert (read[:30] == 255).all()
    # A pixel is empty only where all its bands are.
    np.testing.assert_array_equal(read[30:], pixels[30:])


def test_internal_mask_is_background(tmp_path, picture):
    pixels = picture(300, 300)
    mask = np.full((300, 300), 255, np.uint8)
    mask[:, :100] = 0
    path = write(tmp_path / "m.tif", pixels, mask=mask, overviews=[2], photometric="rgb", **UTM)
    with open_slide(path) as slide:
        read = slide.read_level(0, 0, 0, 300, 300)
        assert (slide.read_level(1, 0, 0, 50, 150) == 255).all()
        assert "masked" in slide.description["pixels"]
    assert (read[:, :100] == 255).all()
    np.testing.assert_array_equal(read[:, 100:], pixels[:, 100:])


def test_bands_are_taken_by_their_colours(tmp_path, picture):
    bands = np.dstack([picture(64, 64)[..., ::-1], np.full((64, 64), 99, np.uint8)])
    colours = [ColorInterp.blue, ColorInterp.green, ColorInterp.red, ColorInterp.undefined]
    path = write(tmp_path / "bgrn.tif", bands, colours=colours, **UTM)
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read_level(0, 0, 0, 64, 64), picture(64, 64))


def test_image_with_a_world_file_is_a_raster(tmp_path, picture):
    from PIL import Image

    Image.fromarray(picture(50, 60)).save(tmp_path / "tile.png")
    (tmp_path / "tile.pgw").write_text("0.5\n0\n0\n-0.5\n1000.25\n1999.75\n")
    with open_slide(tmp_path / "tile.png") as slide:
        assert slide.reader == "rasterio"
        assert slide.georeference.transform == (0.5, 0.0, 1000.0, 0.0, -0.5, 2000.0)
        assert slide.mpp is None
        np.testing.assert_array_equal(slide.read_level(0, 0, 0, 60, 50), picture(50, 60))


def test_jpeg_2000(tmp_path, picture):
    pixels = picture(200, 300)
    path = tmp_path / "x.jp2"
    profile = {"width": 300, "height": 200, "count": 3, "dtype": np.uint8, **UTM}
    with rasterio.open(path, "w", "JP2OpenJPEG", REVERSIBLE="YES", QUALITY="100", **profile) as out:
        out.write(np.moveaxis(pixels, -1, 0))
    with open_slide(path) as slide:
        assert slide.reader == "rasterio"
        np.testing.assert_array_equal(slide.read_level(0, 0, 0, 300, 200), pixels)


def test_coordinates_off_the_earth_do_not_hang(tmp_path, picture):
    path = write(
        tmp_path / "far.tif",
        picture(20, 20),
        crs="EPSG:3857",
        transform=from_origin(1e7, 4e6, 1e70, 1e-9),
    )
    with open_slide(path) as slide:
        assert slide.read_level(0, 0, 0, 20, 20).shape == (20, 20, 3)
