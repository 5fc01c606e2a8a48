import math
from pathlib import Path

import pytest
import tifffile

from gigavim.errors import SettingsError
from gigavim.frames import Mpp
from gigavim.slides import open_slide
from gigavim.slides.mpp import (
    choose_mpp,
    from_description,
    from_ome,
    from_properties,
    from_resolution,
)
from gigavim.slides.openslide_reader import _background, _bounds

PATH = Path("slide.svs")


def test_print_resolutions_are_no_pixel_size():
    for dpi in (72, 96, 300):
        assert from_resolution(dpi, dpi, "inch") is None
    assert from_resolution(72 / 2.54, 72 / 2.54, "cm") is None
    assert from_resolution(50_000, 50_000, "inch").x == pytest.approx(0.508)
    assert from_resolution(0, 1, "cm") is None
    assert from_resolution(1, 1, "furlong") is None


@pytest.mark.parametrize("um", [352.8, 0.0, 1e-9, -1, math.inf, math.nan])
def test_nonsense_is_refused_aloud(um, caplog):
    assert choose_mpp(PATH, [Mpp(um, um, "somewhere")]) is None
    assert "slide.svs: somewhere says" in caplog.text


def test_the_first_sensible_source_wins():
    claims = [None, Mpp(352, 352, "a"), Mpp(0.5, 0.5, "b"), Mpp(0.505, 0.5, "c")]
    assert choose_mpp(PATH, claims).source == "b"


def test_contradictions_are_warned_of_with_both_values(caplog):
    choose_mpp(PATH, [Mpp(0.25, 0.25, "OME-XML"), Mpp(0.26, 0.25, "TIFF resolution")])
    assert not caplog.records
    choose_mpp(PATH, [Mpp(0.2125, 0.2125, "OME-XML"), Mpp(0.1369, 0.1369, "TIFF resolution")])
    for word in ("OME-XML", "0.2125", "TIFF resolution", "0.1369"):
        assert word in caplog.text


def test_the_user_wins_and_is_named(caplog):
    chosen = choose_mpp(PATH, [Mpp(0.5, 0.5, "OME-XML")], user=0.25)
    assert (chosen.x, chosen.y, chosen.source) == (0.25, 0.25, "user")
    assert "0.25 given is used" in caplog.text
    assert choose_mpp(PATH, [], user=500).x == 500
    for wrong in (0, -1, math.nan, math.inf):
        with pytest.raises(SettingsError, match="positive"):
            choose_mpp(PATH, [], user=wrong)


def test_aperio_and_ome_texts():
    text = "Aperio Image Library v11\r\n2220x2967|AppMag = 20|MPP = 0.4990|Left = 1"
    assert from_description(text).x == 0.499
    assert from_description("MPP = ...") is None
    assert from_ome("250", "0.25", "nm", None) == Mpp(0.25, 0.25, "OME-XML")
    assert from_ome("1", "1", "pixel", "pixel") is None
    assert from_ome(None, "1") is None


def test_openslide_properties():
    properties = {"openslide.mpp-x": "0.5", "openslide.mpp-y": "0.51", "aperio.MPP": "0.5"}
    assert [claim.source for claim in from_properties(properties)] == [
        "openslide.mpp-x",
        "aperio.MPP",
    ]
    plain = {
        "openslide.vendor": "generic-tiff",
        "openslide.mpp-x": "84.67",
        "openslide.mpp-y": "84.67",
        "tiff.XResolution": "300",
        "tiff.YResolution": "300",
        "tiff.ResolutionUnit": "inch",
    }
    assert from_properties(plain) == []


def test_openslide_bounds_and_background():
    properties = {
        "openslide.bounds-x": "1000",
        "openslide.bounds-y": "20",
        "openslide.bounds-width": "300",
        "openslide.bounds-height": "400",
        "openslide.background-color": "F0E1D2",
    }
    bounds = _bounds(properties, (2000, 2000))
    assert (bounds.x_level0, bounds.y_level0) == (1000, 20)
    assert (bounds.width_level0, bounds.height_level0) == (300, 400)
    assert _background(properties) == (0xF0, 0xE1, 0xD2)
    # Bounds that do not fit, or are no numbers, leave the whole slide.
    assert _bounds(properties, (1200, 2000)).width_level0 == 1200
    assert _bounds({"openslide.bounds-x": "?"}, (7, 8)).height_level0 == 8
    assert _background({"openslide.background-color": "nope"}) == (255, 255, 255)


def test_a_tiff_that_contradicts_itself(tmp_path, picture, caplog):
    path = tmp_path / "two.ome.tif"
    tifffile.imwrite(
        path,
        picture(30, 30),
        photometric="rgb",
        resolution=(20_000, 20_000),
        resolutionunit="CENTIMETER",
        metadata={"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25},
    )
    with open_slide(path) as slide:
        assert (slide.mpp.x, slide.mpp.source) == (0.25, "OME-XML")
    assert "two.ome.tif: OME-XML says 0.25" in caplog.text
    assert "TIFF resolution says 0.5" in caplog.text
