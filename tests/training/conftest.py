"""Small pictures with masks, a recipe for them, and a tiny model."""

import tomllib

import numpy as np
import pytest
from PIL import Image

from gigavim.training.recipe import Recipe

RECIPE = """
format = "gigavim-recipe/1"

[model]
name = "tiny"
description = "A test."
licence = "Apache-2.0"
order = "blocks(4)"
mpp = 0.5
mpp_range = [0.1, 0.65]
mean = [0.7, 0.6, 0.7]
std = [0.2, 0.2, 0.2]

[model.encoder]
d_model = 16
depth = 2
patch_px = 8
stride_px = 8
class_token = "none"
pooling = "mean"
position = "block"
grid_hw = [4, 4]

[[classes]]
name = "background"
color_rgb = [235, 235, 240]
object_type = "none"
is_empty_glass = true

[[classes]]
name = "tissue"
color_rgb = [236, 155, 186]
is_default = true

[[classes]]
name = "nuclei"
color_rgb = [72, 40, 148]
mask_values = [255]

[data]
images = ["*/images/*.png"]
masks = "../masks/{stem}.*"
group_pattern = '(\\\\d+)\\\\.\\\\w+$'
mpp = 0.25
glass = 148.0
source = "drawn"
licence = "CC0"

[data.groups]
a = ["1-2"]
b = ["3", "4"]
c = ["5-9"]

[split]
validation_groups = ["b"]

[schedule]
steps = 6
batch_blocks = 4
largest_blocks = 4
warmup_steps = 2
peak_rate = 5e-3
average = 0.5
validate_every = 3

[loss]
class_weights = [1.0, 0.8, 1.5]
dice_classes = ["background", "nuclei"]
monitor = "dice:nuclei"

[augment]
kind = "stain"
glass_class = "background"
object_class = "nuclei"
ground_class = "tissue"
""".replace("\\\\", "\\")


@pytest.fixture(scope="session")
def recipe_text() -> str:
    return RECIPE


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return Recipe.model_validate(tomllib.loads(RECIPE))


def field(generator: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Pink tissue with dark round nuclei."""
    rows, cols = np.mgrid[:side, :side]
    image = np.empty((side, side, 3), np.uint8)
    image[:] = (128, 80, 110)
    mask = np.zeros((side, side), np.uint8)
    for y, x in generator.integers(10, side - 10, (side * side // 2500, 2)):
        nucleus = (rows - y) ** 2 + (cols - x) ** 2 < 100
        image[nucleus] = (50, 30, 90)
        mask[nucleus] = 255
    return image, mask


@pytest.fixture(scope="session")
def pictures_folder(tmp_path_factory):
    """Six fields of three slides in folders as data sets come."""
    root, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(7)
    for kind in ("images", "masks"):
        (root / "set" / kind).mkdir(parents=True)
    for number in range(1, 7):
        image, mask = field(generator, 160 + number)
        Image.fromarray(image).save(root / f"set/images/{number}.png")
        Image.fromarray(mask).save(root / f"set/masks/{number}.png")
    return root
