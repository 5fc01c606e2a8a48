from pathlib import Path

import pytest

from gigavim.errors import SettingsError
from gigavim.model.segmentation import SegmentationModel
from gigavim.model.vim import Vim
from gigavim.training.recipe import load_recipe, shipped_recipes

LARGEST_SHIPPED_BYTES = {"histo-nuclei-nano": 2e6}


def written(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_the_first_recipe_of_the_documents_is_one():
    examples = Path(__file__).parents[2] / "docs/examples"
    recipe = load_recipe(examples / "first-training.toml")
    assert recipe.split.validation_groups == ("3",)
    assert "first-training.toml" in (examples.parent / "training.md").read_text()


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_make_models_small_enough_to_ship(name):
    recipe = load_recipe(name)
    assert recipe.model.name == name
    model = SegmentationModel(Vim(recipe.model.encoder), len(recipe.classes))
    stored = 2 * sum(p.numel() for p in model.parameters())
    assert stored < LARGEST_SHIPPED_BYTES.get(name, 16e6)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("peak_rate", "peek_rate", "unknown key `schedule.peek_rate`; did you mean `peak_rate`"),
        ("depth = 2", "dept = 2", "unknown key `model.encoder.dept`"),
        ('validation_groups = ["b"]', "", "split.validation_groups"),
        ('["b"]', "[]", "split.validation_groups"),
        ("[1.0, 0.8, 1.5]", "[1.0]", "needs 3 values"),
        ("dice:nuclei", "dice:nucleus", "loss.monitor is 'dice:nucleus'"),
        ('order = "blocks(4)"', 'order = "spiral"', "no scan order is called 'spiral'"),
        ("glass = 148.0", "", "data.glass must give"),
        ("depth = 2", "depth = 0", "depth"),
        ("steps = 6", "steps = ", "not valid TOML"),
        ('b = ["3", "4"]', 'b = ["3", "6"]', "5-9 of c is also in b (6)"),
        ('b = ["3", "4"]', 'b = ["3", "8-12"]', "5-9 of c is also in b (8-12)"),
        ("'(\\d+)\\.\\w+$'", "'\\d+'", "needs a bracket"),
        ("'(\\d+)\\.\\w+$'", "'(\\d+'", "not a regular expression"),
        ("grid_hw = [4, 4]", "grid_hw = [8, 8]", "but the order is blocks(4)"),
        ("mpp = 0.5\n", "mpp = 0.7\n", "mpp lies outside mpp_range"),
        ("mean = [0.7, 0.6, 0.7]", "mean = [0.7, 0.6]", "need one value for each of 3 channels"),
        ("[72, 40, 148]", "[72, 40, 300]", "color_rgb of 'nuclei' is not within 0..255"),
        ('licence = "CC0"', "", "`data.licence` is missing"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, recipe_text, old, new, complaint):
    assert old in recipe_text
    path = written(tmp_path, recipe_text.replace(old, new))
    with pytest.raises(SettingsError) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    assert complaint in str(caught.value)


def test_flags_win(tmp_path, recipe_text):
    path = written(tmp_path, recipe_text.replace("steps = 6", "max_minutes = 3.0"))
    assert load_recipe(path).schedule.max_minutes == 3.0
    found = load_recipe(path, steps=5, seed=3).schedule
    assert (found.steps, found.seed, found.max_minutes) == (5, 3, None)


def test_an_unknown_name_lists_the_shipped():
    with pytest.raises(SettingsError, match="histo-nuclei"):
        load_recipe("histo")
