"""The models that the package ships, used as a caller would."""

import hashlib
import os
from pathlib import Path

import pytest
import torch

from gigavim.model import checkpoint
from gigavim.model.checkpoint import list_models, load_model
from gigavim.training import score
from gigavim.training.pack import read_pictures
from gigavim.training.recipe import load_recipe

MODELS = Path(checkpoint.__file__).parent.parent / "models"
NUCLEI = 2


@pytest.fixture(scope="module")
def nano():
    model, card = load_model("histo-nuclei-nano")
    return score.Predictor(model, card.scan_order, card.mean, card.std)


@pytest.mark.parametrize("name", sorted(list_models()))
def test_card_weights_and_recipe_belong_together(name):
    model, card = load_model(name)
    blob = (MODELS / name / "weights.safetensors").read_bytes()
    assert hashlib.sha256(blob).hexdigest() == card.sha256
    assert len(blob) <= (2e6 if name.endswith("nano") else 16e6)
    recipe = load_recipe(name)
    assert card.config == recipe.model.encoder == model.encoder.config
    assert (card.mean, card.std, card.mpp) == (
        recipe.model.mean, recipe.model.std, recipe.model.mpp,
    )  # fmt: skip
    assert card.classes == tuple(c.spec for c in recipe.classes)
    assert card.training.data_licence.startswith("CC")
    assert ", ".join(recipe.split.validation_groups) in card.training.split
    assert score.monitored(card.metrics, recipe.loss.monitor) >= 0.5


def test_dark_round_nuclei_on_pink_tissue(nano):
    generator = torch.Generator().manual_seed(5)
    rows, cols = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    image = torch.tensor([0.88, 0.66, 0.78])[:, None, None].repeat(1, 256, 256)
    truth = torch.ones(256, 256, dtype=torch.uint8)
    for y, x in torch.randint(12, 244, (45, 2), generator=generator).tolist():
        nucleus = (rows - y) ** 2 + (cols - x) ** 2 <= 7**2
        image[:, nucleus] = torch.tensor([0.40, 0.28, 0.55])[:, None]
        truth[nucleus] = NUCLEI
    image += 0.02 * torch.randn(image.shape, generator=generator)
    found = nano.labels(image.clamp(0, 1)[None])[0]
    assert score.dice(score.confusion(found, truth, 3), NUCLEI) > 0.7


@pytest.mark.parametrize("grey", [0.58, 0.8, 0.95])
def test_empty_glass_is_background(nano, grey):
    noise = 0.004 * torch.randn(3, 256, 256, generator=torch.Generator().manual_seed(1))
    found = nano.labels((grey + noise).clamp(0, 1)[None])[0]
    assert (found == 0).float().mean() > 0.95
    assert not (found == NUCLEI).any()


def test_no_data_is_never_predicted():
    model, card = load_model("aerial-landcover")
    predictor = score.Predictor(model, card.scan_order, card.mean, card.std)
    for seed in range(2):
        image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
        assert (predictor.labels(image) > 0).all()


@pytest.mark.skipif("GIGAVIM_TEST_DATA" not in os.environ, reason="GIGAVIM_TEST_DATA is not set")
def test_held_out_fields(nano):
    recipe = load_recipe("histo-nuclei-nano")
    few = tuple(f"nuinsseg/images/{n}.*" for n in (310, 314, 656, 660, 62, 64))  # never trained on
    data = recipe.data.model_copy(update={"images": few})
    root = Path(os.environ["GIGAVIM_TEST_DATA"]) / "histo"
    pictures = list(read_pictures(root, recipe.model_copy(update={"data": data})))
    assert {p.group for p in pictures} <= set(recipe.split.validation_groups)
    shown = [score.show(p, 0.5, torch.device("cpu")) for p in pictures]
    found = score.predict_all(nano, shown)
    counts = [score.confusion(f, item.labels, 3) for f, item in zip(found, shown, strict=True)]
    assert sum(score.dice(c, NUCLEI) for c in counts) / len(counts) > 0.7
