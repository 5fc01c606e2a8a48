"""Weights files of other origin, laid out as the published ones; and hostile ones."""

import argparse
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from gigavim.errors import ModelError
from gigavim.model.checkpoint import save_model
from gigavim.model.config import VimConfig
from gigavim.model.published import infer_config, load_encoder_weights
from gigavim.model.registry import REGISTRY
from gigavim.model.vim import Vim

SETTINGS = {"d_model": 32, "depth": 2, "num_classes": 10}


@pytest.fixture(scope="module")
def vim():
    torch.manual_seed(5)
    return Vim(VimConfig(**SETTINGS)).eval()


@pytest.fixture
def published_file(tmp_path, vim):
    """A .pth with all that the published training code puts into one."""
    model = vim.state_dict()
    optimizer = torch.optim.AdamW(vim.parameters(), lr=1e-3)
    vim(torch.randn(1, 3, 224, 224)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    path = tmp_path / "vim_t_midclstok.pth"
    content = {
        "model": model,
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "epoch": 299,
        "model_ema": {name: value * 0.5 for name, value in model.items()},
        "scaler": None,
        "args": argparse.Namespace(
            model="vim_tiny", lr=1e-3, data_path="/data", betas=[0.9, 0.999]
        ),
    }
    torch.save(content, path)
    return path


def test_a_published_file_loads(published_file, vim):
    encoder = load_encoder_weights(published_file)
    assert encoder.config == vim.config
    assert not encoder.training
    for name, value in vim.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], value)


def test_averaged_weights_can_be_asked_for(published_file, vim):
    encoder = load_encoder_weights(published_file, ema=True)
    assert torch.equal(encoder.norm_f.weight, vim.norm_f.weight * 0.5)


def test_the_old_torch_layout_and_parallel_prefixes_load(tmp_path, vim):
    state = {f"module.{name}": value for name, value in vim.state_dict().items()}
    path = tmp_path / "plain.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert torch.equal(load_encoder_weights(path).pos_embed, vim.pos_embed)


def test_safetensors_load_and_a_segmentation_model_gives_its_encoder(
    tmp_path, vim, small_model, make_card, small_config
):
    path = tmp_path / "vim.safetensors"
    save_file(vim.state_dict(), path)
    assert load_encoder_weights(path).config == vim.config
    save_model(tmp_path, small_model, make_card())
    encoder = load_encoder_weights(tmp_path / "weights.safetensors", config=small_config)
    assert torch.equal(encoder.pos_embed, small_model.encoder.pos_embed)


@pytest.mark.parametrize("name", [name for name in REGISTRY if name != "vim-nano"])
def test_published_sizes_are_told_by_their_shapes(name):
    with torch.device("meta"):
        state = Vim(REGISTRY[name]).state_dict()
    assert infer_config(state) == REGISTRY[name]


@pytest.mark.parametrize(
    "changes",
    [
        {"class_token": "double"},
        {"class_token": "none", "pooling": "mean", "num_classes": 0},
        {"bidirectional": "v1"},
        {"bidirectional": "none"},
        {"d_state": 8, "d_conv": 3, "expand": 3, "dt_rank": 5, "in_channels": 4},
        {"position": "none"},
        {"patch_px": 32, "stride_px": 32, "grid_hw": (7, 7)},
    ],
)
def test_switches_are_told_by_names_and_shapes(changes):
    config = VimConfig(**(SETTINGS | changes))
    with torch.device("meta"):
        assert infer_config(Vim(config).state_dict()) == config


class _Bomb:
    """Creates a folder when unpickled."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path, vim, zipped):
    path, target = tmp_path / "evil.pth", tmp_path / "owned"
    content = {"model": vim.state_dict(), "args": _Bomb(target)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match="run code"):
        load_encoder_weights(path)
    assert not target.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_plain_pickle_with_code_is_refused(tmp_path):
    path, target = tmp_path / "evil.pth", tmp_path / "owned"
    path.write_bytes(pickle.dumps(_Bomb(target)))
    with pytest.raises(ModelError):
        load_encoder_weights(path)
    assert not target.exists()


def _expanded(vim):
    state = dict(vim.state_dict())
    state["norm_f.weight"] = torch.ones(1).expand(1 << 40)
    return state


NONSENSE = {
    "list": lambda vim: [1, 2],
    "empty": lambda vim: {},
    "numbers": lambda vim: {"a": 1},
    "other-network": lambda vim: {"conv1.weight": torch.zeros(3)},
    "wrong-rank": lambda vim: vim.state_dict() | {"pos_embed": torch.zeros(5)},
    "gap": lambda vim: vim.state_dict() | {"layers.9.norm.weight": torch.zeros(32)},
    "rope": lambda vim: vim.state_dict() | {"rope.freqs_cos": torch.zeros(196, 32)},
    "ragged": lambda vim: vim.state_dict() | {"pos_embed": torch.zeros(1, 190, 32)},
    "huge": _expanded,
}


@pytest.mark.parametrize("make", NONSENSE.values(), ids=NONSENSE.keys())
def test_files_that_hold_no_vim_are_refused_with_their_name(tmp_path, vim, make):
    path = tmp_path / "other.pth"
    torch.save(make(vim), path)
    with pytest.raises(ModelError, match=r"other\.pth"):
        load_encoder_weights(path)


@pytest.mark.parametrize("keep", [0, 1, 100, 20_000])
def test_truncated_files_are_refused(published_file, keep):
    published_file.write_bytes(published_file.read_bytes()[:keep])
    with pytest.raises(ModelError, match="vim_t_midclstok"):
        load_encoder_weights(published_file)


def test_absent_files_and_folders_are_refused(tmp_path):
    for path in (tmp_path / "no.pth", tmp_path / "no.safetensors", tmp_path):
        with pytest.raises(ModelError, match=str(path)):
            load_encoder_weights(path)


def test_a_config_that_does_not_fit_is_refused(published_file):
    other = VimConfig(**(SETTINGS | {"d_model": 48}))
    with pytest.raises(ModelError, match=r"cls_token has shape|has shape"):
        load_encoder_weights(published_file, config=other)
