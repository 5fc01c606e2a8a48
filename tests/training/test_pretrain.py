import shutil

import pytest
import torch

from gigavim.model.encoder import read_encoder
from gigavim.model.vim import Vim
from gigavim.training.pack import read_pictures
from gigavim.training.pretrain import MaskedImages, pretrain
from gigavim.training.run import new_model

CPU = torch.device("cpu")


@pytest.fixture
def unlabelled(tmp_path, pictures_folder):
    shutil.copytree(pictures_folder / "set/images", tmp_path / "set/images")
    return tmp_path


def test_learns_without_masks_and_starts_a_model(tmp_path, unlabelled, recipe):
    schedule = recipe.schedule.model_copy(
        update={"steps": 15, "validate_every": 5, "batch_blocks": 16}
    )
    recipe = recipe.model_copy(update={"schedule": schedule})
    pictures = list(read_pictures(unlabelled, recipe, labelled=False))
    card, errors = pretrain(recipe, pictures, tmp_path / "out", CPU)
    assert card is not None
    assert errors[-1] < errors[0]
    assert "masked image modelling, 15 steps" in card.source
    encoder = read_encoder(tmp_path / "out/encoder")
    source = recipe.model.model_copy(update={"encoder_weights": str(tmp_path / "out/encoder")})
    started = new_model(recipe.model_copy(update={"model": source})).encoder
    for name, value in encoder.state_dict().items():
        assert torch.equal(started.state_dict()[name], value)
    _, again = pretrain(recipe, pictures, tmp_path / "out", CPU)  # nothing left to do
    assert again == errors[-1:]


def test_what_is_hidden_is_not_seen(recipe):
    torch.manual_seed(0)
    model = MaskedImages(Vim(recipe.model.encoder))
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    loss = model.loss(images, recipe, torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(loss, images)
    squares = gradient[0].abs().unfold(1, 32, 32).unfold(2, 32, 32)  # (3, 2, 2, 32, 32)
    # A hidden pixel counts as truth only: its gradient is one share of the mean, up to sign.
    share = gradient[0].abs().flatten()
    hidden = [
        torch.allclose(squares[:, y, x], squares[0, y, x, 0, 0], rtol=1e-4)
        for y in range(2)
        for x in range(2)
    ]
    assert 1 <= sum(hidden) <= 3
    assert share.max() >= 1 / (3 * 32 * 32 * sum(hidden)) * 0.999
