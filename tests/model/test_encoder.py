"""Encoders from elsewhere: imported, and as the start of a training."""

import argparse
import json

import pytest
import torch

from gigavim.errors import ModelError, OutputError
from gigavim.model.config import VimConfig
from gigavim.model.encoder import import_encoder, read_encoder, start_from
from gigavim.model.registry import REGISTRY
from gigavim.model.vim import Vim

SETTINGS = {"d_model": 32, "depth": 2, "num_classes": 10}


@pytest.fixture(scope="module")
def vim():
    torch.manual_seed(5)
    return Vim(VimConfig(**SETTINGS)).eval()


@pytest.fixture
def published(tmp_path, vim):
    path = tmp_path / "vim_t.pth"
    state = vim.state_dict()
    averaged = {name: value * 0.5 for name, value in state.items()}
    args = argparse.Namespace(model="vim_tiny", betas=[0.9, 0.999])
    torch.save({"model": state, "model_ema": averaged, "epoch": 299, "args": args}, path)
    return path


@pytest.mark.parametrize("ema", [False, True])
def test_import_and_read(tmp_path, published, vim, ema):
    card = import_encoder(published, tmp_path / "out", ema=ema)
    found = read_encoder(tmp_path / "out")
    assert found.config == vim.config == card.config
    factor = 0.5 if ema else 1.0
    for name, value in vim.state_dict().items():
        assert torch.equal(found.state_dict()[name], value * factor)
    written = json.loads((tmp_path / "out/card.json").read_text())
    assert ("model_ema" in written["source"]) == ema
    with pytest.raises(OutputError, match="exists already"):
        import_encoder(published, tmp_path / "out")


def test_changed_weights_are_noticed(tmp_path, published):
    import_encoder(published, tmp_path / "out")
    weights = tmp_path / "out/weights.safetensors"
    blob = bytearray(weights.read_bytes())
    blob[-1] ^= 1
    weights.write_bytes(blob)
    with pytest.raises(ModelError, match="not the weights that the card names"):
        read_encoder(tmp_path / "out")
    with pytest.raises(ModelError, match=r"card\.json: not found"):
        read_encoder(tmp_path)


def test_a_published_tiny_starts_a_segmentation_encoder():
    torch.manual_seed(0)
    source = Vim(REGISTRY["vim-tiny"])
    config = VimConfig(
        d_model=192, depth=24, class_token="none", pooling="mean", position="block",
        grid_hw=(14, 14),
    )  # fmt: skip
    found = start_from(source, config)
    table = source.pos_embed[0]
    assert torch.equal(found.pos_embed[0], torch.cat((table[:98], table[99:])))
    for name, value in found.state_dict().items():
        if name != "pos_embed":
            assert torch.equal(value, source.state_dict()[name])


def test_a_resized_table_keeps_ground_and_sign(vim):
    config = VimConfig(d_model=32, depth=2, stride_px=8, grid_hw=(28, 28))
    table = start_from(vim, config).pos_embed[0]
    patches = torch.cat((table[:392], table[393:])).view(28, 28, 32)
    coarse = torch.nn.functional.avg_pool2d(patches.permute(2, 0, 1)[None], 2)[0]
    source = vim.pos_embed[0]
    original = torch.cat((source[:98], source[99:])).view(14, 14, 32).permute(2, 0, 1)
    assert torch.corrcoef(torch.stack((coarse.flatten(), original.flatten())))[0, 1] > 0.9


def test_other_sizes_are_refused(vim):
    with pytest.raises(ModelError, match="depth 2 cannot start one with 3"):
        start_from(vim, VimConfig(d_model=32, depth=3))
