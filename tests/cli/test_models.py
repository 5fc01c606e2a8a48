"""`gigavim models`: listing, showing, importing."""

import argparse
import json

import torch
from PIL import Image

from gigavim.model.config import VimConfig
from gigavim.model.vim import Vim


def test_listing_and_showing(run):
    assert "histo-nuclei-nano" in run("models").out
    assert "histo-nuclei-nano" in json.loads(run("models", "--json").out)
    assert "sha256: " in run("models", "histo-nuclei-nano").out
    missing = run("models", "histo")
    assert missing.code == 1
    assert "no model is called 'histo'" in missing.err


def test_importing_a_published_file(run, tmp_path):
    sample = tmp_path / "slide.png"
    Image.new("RGB", (64, 64)).save(sample)
    vim = Vim(VimConfig(d_model=32, depth=2, num_classes=10))
    content = {"model": vim.state_dict(), "args": argparse.Namespace(lr=1e-3)}
    torch.save(content, tmp_path / "vim_t.pth")
    out = run("models", "import", "vim_t.pth")
    assert out.code == 0, out.err
    assert "2 layers x 32" in out.out
    assert (tmp_path / "vim_t/weights.safetensors").exists()
    assert "source: vim_t.pth (model)" in run("models", "vim_t").out
    assert json.loads(run("models", "vim_t", "--json").out)["config"]["depth"] == 2
    alone = run("segment", sample, "--model", "vim_t")
    assert alone.code == 1
    assert "gigavim train RECIPE --data DATA --weights vim_t" in alone.err
    assert run("models", "import", "vim_t.pth").code == 1
    wrong = run("models", "import", "vim_t.pth", "--ema", "-o", "other")
    assert wrong.code == 1
    assert "holds no 'model_ema'" in wrong.err
    assert not (tmp_path / "other").exists()
