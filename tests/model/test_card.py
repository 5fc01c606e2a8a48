import json

import pytest
from pydantic import ValidationError

from gigavim.errors import ModelError
from gigavim.frames import ClassSpec
from gigavim.model.card import read_card
from gigavim.model.config import VimConfig


@pytest.fixture
def card_file(tmp_path, make_card):
    """Write a card's JSON after a change of its plain data."""

    def write(change=lambda fields: None):
        fields = json.loads(make_card().model_dump_json())
        change(fields)
        path = tmp_path / "card.json"
        path.write_text(json.dumps(fields))
        return path

    return write


def test_a_card_comes_back_as_written(card_file, make_card):
    assert read_card(card_file()) == make_card()
    assert read_card(card_file()).scan_order.block == 4


CHANGES = {
    "unknown": (lambda f: f.update(colour="red"), "colour: unknown field"),
    "unknown-nested": (lambda f: f["config"].update(width=3), "config.width: unknown field"),
    "unknown-class": (lambda f: f["classes"][1].update(colour=3), "classes.1.colour: unknown"),
    "missing": (lambda f: f.pop("mpp"), "mpp: Field required"),
    "text-number": (lambda f: f.update(mpp="0.5"), "mpp"),
    "negative": (lambda f: f.update(mpp=-1.0), "mpp"),
    "range": (lambda f: f.update(mpp_range=[0.6, 1.0]), "outside mpp_range"),
    "order": (lambda f: f.update(order="spiral"), "spiral"),
    "order-not-block": (lambda f: f.update(order="raster"), "per block"),
    "parent": (lambda f: f["classes"][2].update(parent="organ"), "organ"),
    "colour": (lambda f: f["classes"][2].update(color_rgb=[0, 300, 0]), "0..255"),
    "object-type": (lambda f: f["classes"][2].update(object_type="cell"), "cell"),
    "twice": (lambda f: f["classes"][2].update(name="tissue"), "same name"),
    "no-class": (lambda f: f.update(classes=[]), "classes"),
    "mean": (lambda f: f.update(mean=[0.5]), "mean and std"),
    "config": (lambda f: f["config"].update(d_model=0), "d_model"),
    "format": (lambda f: f.update(format="gigavim-model/9"), "format"),
}


@pytest.mark.parametrize(("change", "named"), CHANGES.values(), ids=CHANGES.keys())
def test_a_wrong_field_is_named_with_the_file(card_file, change, named):
    path = card_file(change)
    with pytest.raises(ModelError) as caught:
        read_card(path)
    assert named in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00\xff"])
def test_what_is_no_card_is_refused(tmp_path, text):
    path = tmp_path / "card.json"
    path.write_text(text)
    with pytest.raises(ModelError, match="not a valid model card"):
        read_card(path)


def test_a_huge_card_is_not_read(tmp_path):
    path = tmp_path / "card.json"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(ModelError, match="too large"):
        read_card(path)


def test_a_card_made_in_code_is_checked_too(make_card):
    with pytest.raises(ValidationError, match="parent"):
        make_card(classes=(ClassSpec("a", (0, 0, 0), parent="a"),))


def test_a_learned_grid_goes_with_any_order(make_card):
    config = VimConfig(d_model=16, depth=1)
    assert make_card(config=config, order="hilbert").scan_order.kind == "hilbert"
