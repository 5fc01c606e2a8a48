"""The model that the package ships, used as a caller would."""

import hashlib
import os
from pathlib import Path

import pytest
import torch

from gigavim.model.checkpoint import load_model
from gigavim.training import evaluate
from gigavim.training.data import NUCLEI, Fields, _read_field
from gigavim.training.nuclei import MEAN, NAME, STD

MODELS = Path(evaluate.__file__).parent.parent / "models"


@pytest.fixture(scope="module")
def shipped():
    return load_model(NAME)


def segment(model, card, image):
    """Label (3, h, w) in [0, 1] through the model's own forward pass, padded to whole blocks."""
    height, width = image.shape[1:]
    padded = torch.nn.functional.pad(image, (0, -width % 128, 0, -height % 128), value=0.58)
    mean, std = (torch.tensor(v)[:, None, None] for v in (card.mean, card.std))
    with torch.no_grad():
        logits = model(((padded - mean) / std)[None], card.scan_order)
    return logits[0].argmax(0)[:height, :width]


def test_card_and_weights_belong_together(shipped):
    _, card = shipped
    blob = (MODELS / NAME / "weights.safetensors").read_bytes()
    assert hashlib.sha256(blob).hexdigest() == card.sha256
    assert [spec.name for spec in card.classes] == ["background", "tissue", "nuclei"]
    assert (card.mean, card.std, card.mpp) == (MEAN, STD, 0.5)
    assert card.metrics["nuclei_dice_per_image"] > 0.6


def test_dark_round_nuclei_on_pink_tissue(shipped):
    model, card = shipped
    generator = torch.Generator().manual_seed(5)
    rows, cols = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    image = torch.tensor([0.88, 0.66, 0.78])[:, None, None].repeat(1, 256, 256)
    truth = torch.ones(256, 256, dtype=torch.int64)
    for y, x in torch.randint(12, 244, (45, 2), generator=generator).tolist():
        nucleus = (rows - y) ** 2 + (cols - x) ** 2 <= 7**2
        image[:, nucleus] = torch.tensor([0.40, 0.28, 0.55])[:, None]
        truth[nucleus] = NUCLEI
    image += 0.02 * torch.randn(image.shape, generator=generator)
    found = segment(model, card, image.clamp(0, 1))
    assert evaluate.dice(found, truth) > 0.7


@pytest.mark.parametrize("grey", [0.58, 0.8, 0.95])
def test_empty_glass_is_background(shipped, grey):
    model, card = shipped
    noise = 0.004 * torch.randn(3, 256, 256, generator=torch.Generator().manual_seed(1))
    found = segment(model, card, (grey + noise).clamp(0, 1))
    assert (found == 0).float().mean() > 0.95
    assert not (found == NUCLEI).any()


@pytest.mark.skipif("GIGAVIM_TEST_DATA" not in os.environ, reason="GIGAVIM_TEST_DATA is not set")
def test_held_out_field(shipped):
    model, card = shipped
    root = Path(os.environ["GIGAVIM_TEST_DATA"]) / "histo/nuinsseg"
    scores = []
    for number in (310, 314, 656, 660, 62, 64):  # slides g17, g31 and g05, never trained on
        images = sorted((root / "images").glob(f"{number}.*"))
        if not images:
            continue
        image, label = _read_field(images[0], next((root / "masks").glob(f"{number}.*")))
        fields = Fields(
            torch.tensor(image)[None], torch.tensor(label)[None], (number,), ("held out",)
        )
        crop = evaluate.crops(fields)[0]
        scores.append(evaluate.dice(segment(model, card, crop.image), crop.labels))
    if not scores:
        pytest.skip("none of the fields is there")
    assert sum(scores) / len(scores) > 0.7
