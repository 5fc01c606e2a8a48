"""Whole slides with QuPath's annotations or a label image."""

import json
import tomllib

import numpy as np
import pytest
import tifffile
from PIL import Image

from gigavim.errors import SettingsError
from gigavim.training.pack import read_pictures
from gigavim.training.recipe import IGNORED, Recipe


def feature(name, *rings):
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [[*ring, ring[0]] for ring in rings]},
        "properties": {"classification": {"name": name}},
    }


def box(x0, y0, x1, y1):
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]


@pytest.fixture
def slide_recipe(recipe_text):
    text = recipe_text.replace("*/images/*.png", "*.ome.tif").replace("mpp = 0.25", "mpp = 1.0")
    text = text.replace("../masks/{stem}.*", "{stem}.*json").replace("'(\\d+)\\.\\w+$'", "'(\\d+)'")
    text = text.replace("is_empty_glass = true", "").replace("glass = 148.0", "")
    return Recipe.model_validate(tomllib.loads(text))


@pytest.fixture
def slide(tmp_path):
    """400 x 300 px of 0.25 um: read at the model's 0.5."""
    pixels = np.full((300, 400, 3), 120, np.uint8)
    pixels[:100] = 30
    path = tmp_path / "3.ome.tif"
    meta = {"axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
    tifffile.imwrite(path, pixels, ome=True, metadata=meta, photometric="rgb", tile=(128, 128))
    return path


def test_annotations_become_labels(tmp_path, slide, slide_recipe):
    areas = [
        feature("Nuclei", box(40, 40, 120, 120), box(60, 60, 80, 80)),
        feature("background", box(0, 200, 400, 300)),
        feature("Region*", box(0, 0, 400, 280)),
        {"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 1]}, "properties": {}},
    ]
    (tmp_path / "3.ome.geojson").write_text(json.dumps({"features": areas}))
    (picture,) = read_pictures(tmp_path, slide_recipe)
    assert picture.mpp == 0.5
    assert picture.image.shape == (150, 200, 3)
    assert picture.image[10, 10, 0] == 30
    expected = np.ones((150, 200), np.uint8)
    expected[20:60, 20:60] = 2
    expected[30:40, 30:40] = 1  # a hole
    expected[100:] = 0
    expected[140:] = IGNORED
    assert np.array_equal(picture.labels, expected)


def test_a_label_image_of_other_size_fits(tmp_path, slide, recipe_text):
    text = recipe_text.replace("*/images/*.png", "*.ome.tif").replace(
        "'(\\d+)\\.\\w+$'", "'(\\d+)'"
    )
    text = text.replace("../masks/{stem}.*", "{stem}_labels.png").replace("mpp = 0.25", "mpp = 1.0")
    mask = np.zeros((75, 100), np.uint8)
    mask[:25] = 255
    Image.fromarray(mask).save(tmp_path / "3.ome_labels.png")
    (picture,) = read_pictures(tmp_path, Recipe.model_validate(tomllib.loads(text)))
    assert (picture.labels[:50] == 2).all()
    assert not (picture.labels[50:] == 2).any()
    Image.fromarray(mask.T).save(tmp_path / "3.ome_labels.png")
    with pytest.raises(SettingsError, match="has not the aspect"):
        list(read_pictures(tmp_path, Recipe.model_validate(tomllib.loads(text))))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("[]", "no area is classified as background, tissue, nuclei"),
        (json.dumps([feature("Tumor", box(0, 0, 9, 9))]), "its classifications are tumor"),
        ("{", "cannot be read as QuPath"),
        ('{"a": 1}', "cannot be read as QuPath"),
    ],
)
def test_other_geojson_is_explained(tmp_path, slide, slide_recipe, content, complaint):
    (tmp_path / "3.ome.geojson").write_text(content)
    with pytest.raises(SettingsError, match=complaint):
        list(read_pictures(tmp_path, slide_recipe))
