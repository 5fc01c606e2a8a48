import json

import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy import ndimage

from gigavim.config import Settings
from gigavim.errors import SlideError
from gigavim_pipelines.qc import BLURRED_BELOW, check_quality, fine_detail


def texture(height, width, seed=0):
    """Something like tissue in focus: structure at all scales."""
    random = np.random.default_rng(seed)
    layers = [
        ndimage.zoom(random.normal(0, 1, (height // step + 2, width // step + 2)), step, order=1)
        for step in (1, 2, 4, 8, 16)
    ]
    grey = sum(layer[:height, :width] * step for layer, step in zip(layers, (4, 6, 8, 10, 12)))
    return np.clip(np.stack([180 + grey, 110 + grey, 170 + grey], -1), 0, 255).astype(np.uint8)


def write(path, pixels, mpp=0.5):
    resolution = {} if mpp is None else {
        "resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER",
    }  # fmt: skip
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(64, 64), **resolution)
    return path


def on_glass(pixels, height=900, width=1200):
    slide = np.full((height, width, 3), 244, np.uint8)
    slide[100 : 100 + len(pixels), 200 : 200 + pixels.shape[1]] = pixels
    return slide


def check(path, tmp_path):
    settings = Settings().with_flags(output={"directory": str(tmp_path / "out")})
    return check_quality(path, settings=settings)


def test_a_good_slide_has_no_warnings(tmp_path):
    result = check(write(tmp_path / "good.tif", on_glass(texture(600, 700))), tmp_path)
    assert result.summary["warnings"] == []
    assert result.summary["mpp"] == pytest.approx(0.5)
    assert 0.38 < result.summary["tissue_fraction"] < 0.7
    assert json.loads(result.outputs["qc"].read_text()) == result.summary
    picture = np.asarray(Image.open(result.outputs["overlay"]))
    assert picture.shape == (768, 1024, 3)
    assert (picture == (0, 160, 0)).all(-1).any()


@pytest.mark.parametrize(
    ("make", "warning"),
    [
        (lambda: ndimage.gaussian_filter(on_glass(texture(600, 700)), (2, 2, 0)), "out of focus"),
        (lambda: np.full((600, 800, 3), 244, np.uint8), "no tissue"),
        (lambda: on_glass(np.repeat(texture(600, 700)[..., :1], 3, -1)), "pale or unstained"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, make, warning):
    result = check(write(tmp_path / "slide.tif", make()), tmp_path)
    assert warning in result.summary["warnings"]


def test_a_slide_without_mpp_is_no_error_here(tmp_path):
    result = check(write(tmp_path / "slide.tif", on_glass(texture(600, 700)), mpp=None), tmp_path)
    assert result.summary["warnings"] == ["no mpp"]
    assert result.summary["tissue_mm2"] is None


def test_what_is_no_slide_is(tmp_path):
    (tmp_path / "slide.svs").write_text("words")
    with pytest.raises(SlideError):
        check(tmp_path / "slide.svs", tmp_path)
    assert list(tmp_path.glob("out/*")) == []


@pytest.mark.parametrize("contrast", [1.0, 0.3])
def test_fine_detail_tells_focus_whatever_the_contrast(contrast):
    sharp = texture(256, 256) * contrast
    assert fine_detail(sharp.astype(np.uint8)) > 1.5 * BLURRED_BELOW
    blurred = ndimage.gaussian_filter(sharp, (1.5, 1.5, 0))
    assert fine_detail(blurred.astype(np.float32)) < BLURRED_BELOW
