import pickle
import shutil

import numpy as np
import pytest
import zarr

from gigavim.errors import GigavimError, UnsupportedSlideError
from gigavim.slides import open_slide

UNITS = {"t": "second", "z": "micrometer", "y": "micrometer", "x": "micrometer"}
KINDS = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}


def write(path, planes_yxc, axes, *, version="0.5", omero=None, unit="micrometer", mpp=0.5):
    """Write (y, x, c) with two levels and any axes; t and z have size 2, the second all zero."""
    group = zarr.open_group(path, mode="w", zarr_format=2 if version == "0.4" else 3)
    for level in range(2):
        pixels = planes_yxc[:: 2**level, :: 2**level]
        block = np.moveaxis(pixels, -1, 0) if "c" in axes else pixels[..., 0]
        for place, axis in enumerate(axes):
            if axis in "tz":
                block = np.stack([block, np.zeros_like(block)], axis=place)
        chunks = [64 if axis in "yx" else 1 for axis in axes]
        array = group.create_array(str(level), shape=block.shape, dtype=block.dtype, chunks=chunks)
        array[:] = block
    units = {**UNITS, "y": unit, "x": unit}
    datasets = [
        {
            "path": str(level),
            "coordinateTransformations": [
                {"type": "scale", "scale": [mpp * 2**level if a in "yx" else 1.0 for a in axes]}
            ],
        }
        for level in range(2)
    ]
    shown = [
        {"name": a, "type": KINDS[a], **({"unit": units[a]} if a != "c" else {})} for a in axes
    ]
    metadata = {"multiscales": [{"axes": shown, "datasets": datasets, "version": version}]}
    if omero:
        metadata["omero"] = omero
    group.attrs.update({"ome": {"version": "0.5", **metadata}} if version == "0.5" else metadata)
    return path


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("axes", ["cyx", "czyx", "tczyx", "tcyx"])
def test_axes_and_versions(tmp_path, picture, version, axes):
    pixels = picture(150, 201)
    path = write(tmp_path / "image.zarr", pixels, axes, version=version)
    with open_slide(path) as slide:
        assert slide.reader == "zarr"
        assert slide.description["format"] == f"OME-Zarr {version}"
        assert (slide.mpp.x, slide.mpp.source) == (0.5, "OME-Zarr scale")
        assert [level.downsample_x for level in slide.levels] == [1.0, 2.0]
        np.testing.assert_array_equal(slide.read_level(0, 0, 0, 201, 150), pixels)
        np.testing.assert_array_equal(slide.read(20, 40, 30, 20, mpp=1.0), pixels[40:80:2, 20:80:2])
        np.testing.assert_array_equal(
            pickle.loads(pickle.dumps(slide)).read_level(1, 3, 4, 5, 6), pixels[::2, ::2][4:10, 3:8]
        )
        np.testing.assert_array_equal(slide.to_dask(0, chunk_px=64).compute(), pixels)
        assert len(slide.fingerprint()) == 64


def test_one_plane_is_grey(tmp_path, picture):
    path = write(tmp_path / "image.zarr", picture(70, 80), "yx")
    with open_slide(path) as slide:
        read = slide.read_level(0, 0, 0, 80, 70)
    np.testing.assert_array_equal(read, np.repeat(picture(70, 80)[..., :1], 3, axis=2))


def test_fluorescence_needs_a_choice(tmp_path, picture):
    omero = {"channels": [{"label": f"stain {c}", "color": "00FFFF"} for c in range(3)]}
    path = write(tmp_path / "image.zarr", picture(70, 80), "cyx", omero=omero)
    with pytest.raises(UnsupportedSlideError, match=r"3 channels \(stain 0.*--channels 0,1,2"):
        open_slide(path)
    with open_slide(path, channels=(2, 0, 2)) as slide:
        np.testing.assert_array_equal(
            slide.read_level(0, 0, 0, 80, 70), picture(70, 80)[..., [2, 0, 2]]
        )


def test_channels_shown_as_red_green_blue(tmp_path, picture):
    colours = ("FF0000", "00FF00", "0000FF")
    omero = {"channels": [{"label": f"Channel {c}", "color": colours[c]} for c in range(3)]}
    path = write(tmp_path / "image.zarr", picture(70, 80), "cyx", omero=omero)
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read_level(0, 0, 0, 80, 70), picture(70, 80))


def test_scale_without_a_unit_of_length_is_no_mpp(tmp_path, picture):
    path = write(tmp_path / "image.zarr", picture(70, 80), "cyx", unit="pixel")
    with open_slide(path) as slide:
        assert slide.mpp is None


def test_damaged_chunk_is_salvaged(tmp_path, picture):
    pixels = picture(150, 201)
    path = write(tmp_path / "image.zarr", pixels, "cyx")
    (path / "0" / "c" / "1" / "0" / "1").write_bytes(b"garbage")
    with open_slide(path) as slide:
        read, unreadable = slide.read_level_salvage(0, 0, 0, 201, 150)
    expected = np.zeros((150, 201), bool)
    expected[:64, 64:128] = True
    np.testing.assert_array_equal(unreadable, expected)
    np.testing.assert_array_equal(read[~expected], pixels[~expected])


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"zarr_format": 3, "node_type": "group", "attributes": {"ome": 3}}']
)
def test_damaged_metadata(tmp_path, picture, text):
    path = write(tmp_path / "image.zarr", picture(70, 80), "cyx")
    (path / "zarr.json").write_text(text)
    with pytest.raises(GigavimError, match=r"image\.zarr: "):
        open_slide(path)


def test_missing_level(tmp_path, picture):
    path = write(tmp_path / "image.zarr", picture(70, 80), "cyx")
    shutil.rmtree(path / "1")
    with pytest.raises(GigavimError, match=r"image\.zarr: "):
        open_slide(path)
