import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from gigavim.errors import ModelError, OutputError
from gigavim.model import checkpoint
from gigavim.model.card import CARD_NAME, WEIGHTS_NAME
from gigavim.model.checkpoint import list_models, load_card, load_model, save_model
from gigavim.model.weights import read_safetensors


@pytest.fixture
def folder(tmp_path, small_model, make_card):
    save_model(tmp_path / "deep" / "small", small_model, make_card())
    return tmp_path / "deep" / "small"


@pytest.fixture
def shipped(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "_shipped_folders", lambda: [folder])


@pytest.mark.parametrize("part", ["", CARD_NAME, WEIGHTS_NAME])
def test_a_saved_model_comes_back(folder, small_model, make_card, part):
    model, card = load_model(folder / part if part else str(folder))
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(model(images), small_model(images))
    assert not model.training
    assert card == make_card(sha256=card.sha256)
    assert sorted(path.name for path in folder.iterdir()) == [CARD_NAME, WEIGHTS_NAME]


def test_saving_again_replaces_the_model(folder, small_model, make_card):
    with torch.no_grad():
        small_model.head.linear.bias.fill_(3.0)
    save_model(folder, small_model, make_card(description="newer"))
    model, card = load_model(folder)
    assert card.description == "newer"
    assert (model.head.linear.bias == 3).all()


def test_a_save_that_fails_leaves_the_old_model(folder, small_model, make_card, monkeypatch):
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    before = load_card(folder)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="No space left"):
        save_model(folder, small_model, make_card(description="newer"))
    assert load_model(folder)[1] == before
    assert len(list(folder.iterdir())) == 2


def test_a_card_of_another_model_is_refused(tmp_path, small_model, make_card):
    with pytest.raises(ModelError, match="classes"):
        save_model(tmp_path, small_model, make_card(classes=make_card().classes[:2]))
    with pytest.raises(ModelError, match="config"):
        save_model(tmp_path, small_model, make_card(config=make_card().config.__class__(16, 2)))


def test_exchanged_weights_are_noticed(folder):
    state = load_file(folder / WEIGHTS_NAME)
    state["head.linear.bias"] += 1
    save_file(state, folder / WEIGHTS_NAME)
    with pytest.raises(ModelError, match="SHA-256"):
        load_model(folder)


def _rewrite(folder, change):
    """Change the weights and let the card vouch for them."""
    state = load_file(folder / WEIGHTS_NAME)
    change(state)
    save_file(state, folder / WEIGHTS_NAME)
    card = json.loads((folder / CARD_NAME).read_text())
    card["sha256"] = hashlib.sha256((folder / WEIGHTS_NAME).read_bytes()).hexdigest()
    (folder / CARD_NAME).write_text(json.dumps(card))


MISFITS = {
    "shape": (
        lambda s: s.update({"encoder.norm_f.weight": torch.ones(17)}),
        r"encoder\.norm_f\.weight has shape \(17,\), but the model's is \(16,\)",
    ),
    "missing": (lambda s: s.pop("encoder.norm_f.weight"), r"missing: encoder\.norm_f\.weight"),
    "unknown": (lambda s: s.update(extra=torch.ones(1)), "extra"),
    "not-finite": (
        lambda s: s.update({"encoder.norm_f.weight": torch.full((16,), torch.nan)}),
        "finite",
    ),
    "integers": (
        lambda s: s.update({"encoder.norm_f.weight": torch.ones(16, dtype=torch.int32)}),
        "norm_f",
    ),
}


@pytest.mark.parametrize(("change", "named"), MISFITS.values(), ids=MISFITS.keys())
def test_weights_that_do_not_fit_are_named(folder, change, named):
    _rewrite(folder, change)
    with pytest.raises(ModelError, match=named):
        load_model(folder)


def test_damaged_and_absent_weights(folder):
    blob = (folder / WEIGHTS_NAME).read_bytes()
    card = json.loads((folder / CARD_NAME).read_text())
    (folder / WEIGHTS_NAME).write_bytes(blob[: len(blob) // 2])
    with pytest.raises(ModelError, match="SHA-256"):
        load_model(folder)
    card["sha256"] = hashlib.sha256(blob[: len(blob) // 2]).hexdigest()
    (folder / CARD_NAME).write_text(json.dumps(card))
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        load_model(folder)
    (folder / WEIGHTS_NAME).unlink()
    with pytest.raises(ModelError, match=r"weights\.safetensors"):
        load_model(folder)


def test_a_shipped_name_loads_and_a_near_one_is_suggested(shipped, small_model):
    assert load_model("small")[1].name == "small"
    assert list(list_models()) == ["small"]
    with pytest.raises(ModelError, match=r"did you mean 'small'.*shipped models: small"):
        load_model("smal")
    with pytest.raises(ModelError, match="shipped models: small") as caught:
        load_model("vitelotte")
    assert "did you mean" not in str(caught.value)


def test_other_files_and_empty_folders_are_refused(tmp_path):
    other = tmp_path / "model.pt"
    other.write_bytes(b"")
    with pytest.raises(ModelError, match=r"card\.json"):
        load_model(other)
    with pytest.raises(ModelError, match=r"card\.json: not found"):
        load_model(tmp_path)


def test_shipped_models_load():
    for name, card in list_models().items():
        assert load_model(name)[1] == card


def test_cards_are_listed_without_torch():
    code = (
        "import sys; from gigavim.model.checkpoint import list_models; list_models(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_model_needs_no_image_libraries():
    code = (
        "import sys; import gigavim.model.heads, gigavim.model.published, gigavim.model.registry; "
        "heavy = {'zarr', 'dask', 'openslide', 'rasterio', 'tifffile', 'skimage', 'numba'}; "
        "sys.exit(', '.join(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.stderr.strip() == ""


def test_a_folder_in_place_of_weights(folder):
    with pytest.raises(ModelError, match="--model"):
        read_safetensors(folder)
