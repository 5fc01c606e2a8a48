import numpy as np
import pytest
import tifffile

from gigavim.errors import UnsupportedSlideError
from gigavim.slides import open_slide


def save(path, pixels, **options):
    tifffile.imwrite(path, pixels, metadata=None, **options)
    return path


def whole(path, **options):
    with open_slide(path, **options) as slide:
        level = slide.levels[0]
        return slide.read_level(0, 0, 0, level.width, level.height), slide.description["pixels"]


def test_grey_goes_to_all_colours(tmp_path):
    grey = np.arange(100, dtype=np.uint8).reshape(10, 10)
    pixels, rule = whole(save(tmp_path / "g.tif", grey, photometric="minisblack"))
    np.testing.assert_array_equal(pixels, np.repeat(grey[..., None], 3, axis=2))
    assert "grey" in rule
    pixels, rule = whole(save(tmp_path / "i.tif", grey, photometric="miniswhite"))
    np.testing.assert_array_equal(pixels[..., 0], 255 - grey)
    assert "inverted" in rule


def test_bilevel(tmp_path):
    ink = np.indices((16, 16)).sum(0) % 2 == 0
    pixels, _ = whole(save(tmp_path / "b.tif", ink, photometric="minisblack"))
    np.testing.assert_array_equal(pixels[..., 1], ink * 255)


def test_alpha_is_composited(tmp_path):
    rgba = np.zeros((20, 20, 4), np.uint8)
    rgba[..., 0] = 100
    rgba[:, 10:, 3] = 255
    rgba[:, 10, 3] = 51
    path = save(tmp_path / "a.tif", rgba, photometric="rgb", extrasamples=["unassalpha"])
    pixels, rule = whole(path)
    assert "alpha" in rule
    assert (pixels[:, :10] == 255).all()
    assert (pixels[:, 11:] == (100, 0, 0)).all()
    assert (pixels[:, 10] == (224, 204, 204)).all()
    rgba[..., 0] = np.where(rgba[..., 3] == 51, 20, rgba[..., 0])
    path = save(tmp_path / "p.tif", rgba, photometric="rgb", extrasamples=["assocalpha"])
    assert (whole(path)[0][:, 10] == (224, 204, 204)).all()


def test_near_infrared_is_no_alpha(tmp_path, picture):
    bands = np.dstack([picture(64, 64), picture(64, 64)[..., :1] // 2 + 60])
    for extra in ("unspecified", "unassalpha"):
        path = save(tmp_path / "nir.tif", bands, photometric="rgb", extrasamples=[extra])
        pixels, rule = whole(path)
        np.testing.assert_array_equal(pixels, bands[..., :3])
        assert "near infrared" in rule
    pixels, _ = whole(path, channels=(3, 0, 1))
    np.testing.assert_array_equal(pixels, bands[..., [3, 0, 1]])


@pytest.mark.parametrize(("white", "bits"), [(255, 8), (1000, 10), (4095, 12), (60000, 16)])
def test_sixteen_bits_use_the_depth_that_is_filled(tmp_path, white, bits):
    ramp = np.linspace(0, white, 64 * 64 * 3).astype(np.uint16).reshape(64, 64, 3)
    pixels, rule = whole(save(tmp_path / "d.tif", ramp, photometric="rgb", tile=(16, 16)))
    expected = np.rint(ramp * (255 / (2**bits - 1)))
    np.testing.assert_array_equal(pixels, expected)
    assert f"0..{2**bits - 1} " in rule


def test_sixteen_bit_scale_is_one_for_the_whole_slide(tmp_path):
    """A dark tile stays dark: its own range plays no part."""
    grey = np.zeros((128, 128), np.uint16)
    grey[:64], grey[64:] = 40, 4000
    pixels, _ = whole(save(tmp_path / "two.tif", grey, photometric="minisblack", tile=(64, 64)))
    assert set(pixels[:64].ravel()) == {2}
    assert set(pixels[64:].ravel()) == {249}


def test_palette_is_expanded(tmp_path):
    table = np.zeros((3, 256), np.uint16)
    table[:, 1], table[:, 2] = (65535, 0, 0), (0, 257 * 50, 257 * 100)
    index = np.indices((16, 16)).sum(0).astype(np.uint8) % 3
    path = save(tmp_path / "p.tif", index, photometric="palette", colormap=table)
    pixels, rule = whole(path)
    colours = np.array([(0, 0, 0), (255, 0, 0), (0, 50, 100)])
    np.testing.assert_array_equal(pixels, colours[index])
    assert "palette" in rule


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (np.float32, "32-bit float"),
        (np.int16, "16-bit signed"),
        (np.uint32, "32-bit integer"),
    ],
)
def test_measurements_are_refused_by_name(tmp_path, dtype, words):
    path = save(tmp_path / "m.tif", np.ones((32, 32), dtype), photometric="minisblack")
    with pytest.raises(UnsupportedSlideError, match=f"m.tif: one band of {words}.*elevation"):
        open_slide(path)


def test_channels_without_colours_must_be_chosen(tmp_path):
    stack = np.stack([np.full((40, 50), 10 * (c + 1), np.uint8) for c in range(5)])
    path = tmp_path / "m.ome.tif"
    names = ["DAPI", "CD3", "CD8", "PD1", "Ki67"]
    metadata = {"axes": "CYX", "Channel": {"Name": names}}
    tifffile.imwrite(path, stack, photometric="minisblack", metadata=metadata)
    with pytest.raises(UnsupportedSlideError, match=r"5 channels \(DAPI, .*--channels 0,1,2"):
        open_slide(path)
    pixels, rule = whole(path, channels=(4, 2, 0))
    assert (pixels == (50, 30, 10)).all()
    assert "channels 4, 2, 0" in rule
    with pytest.raises(UnsupportedSlideError, match="has no channel 7"):
        open_slide(path, channels=(0, 1, 7))


def test_channels_named_as_colours_are_a_picture(tmp_path):
    stack = np.stack([np.full((40, 50), value, np.uint8) for value in (3, 2, 1)])
    path = tmp_path / "rgb.ome.tif"
    metadata = {"axes": "CYX", "Channel": {"Name": ["Blue", "Green", "Red"]}}
    tifffile.imwrite(path, stack, photometric="minisblack", metadata=metadata)
    assert (whole(path)[0] == (1, 2, 3)).all()
