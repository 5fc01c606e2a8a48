"""`gigavim train` from pictures to a model that `gigavim segment` takes."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from gigavim.model.checkpoint import load_model
from gigavim.training.recipe import shipped_recipes

SMALL = {
    "d_model = 96": "d_model = 16",
    "depth = 9": "depth = 2",
    "head_width = 64": "head_width = 16",
    "grid_hw = [16, 16]": "grid_hw = [2, 2]",
    "blocks(16)": "blocks(2)",
    "max_minutes = 6.0": "steps = 4",
    "batch_blocks = 64": "batch_blocks = 2",
    "largest_blocks = 256": "largest_blocks = 2",
    "validate_every = 750": "validate_every = 2",
    '["g05", "g13", "g17", "g22", "g31"]': '["g02"]',
}


@pytest.fixture
def data(tmp_path):
    generator = np.random.default_rng(0)
    for number in (1, 2, 23):
        for kind in ("images", "masks"):
            (tmp_path / "data/nuinsseg" / kind).mkdir(parents=True, exist_ok=True)
        image = generator.integers(40, 148, (96, 96, 3)).astype(np.uint8)
        mask = np.where(image[..., 0] < 70, 255, 0).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / f"data/nuinsseg/images/{number}.png")
        Image.fromarray(mask).save(tmp_path / f"data/nuinsseg/masks/{number}.png")
    return tmp_path / "data"


@pytest.fixture
def recipe(tmp_path):
    text = shipped_recipes()["histo-nuclei-nano"].read_text()
    for old, new in SMALL.items():
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "small.toml"
    path.write_text(text)
    return path


def test_pack_train_resume_and_segment(run, tmp_path, data, recipe):
    packed = run("-q", "train", recipe, "--data", data, "--pack", "packed.npz")
    assert packed.code == 0
    out = run("train", recipe, "--data", "packed.npz", "-o", "runs")
    assert out.code == 0, out.err
    assert "dice:nuclei" in out.out
    rows = [json.loads(line) for line in (tmp_path / "runs/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val_miou" in row] == [2, 4]
    card = json.loads((tmp_path / "runs/model/card.json").read_text())
    assert card["tied_rates"]
    rates = load_model(tmp_path / "runs/model")[0].encoder.layers[1].mixer.A_log.double().exp()
    ratio = torch.arange(1.0, 17).repeat(32, 1).double()
    torch.testing.assert_close(rates / rates[:, :1], ratio, rtol=1e-6, atol=0)
    assert "held out g02" in card["training"]["split"]
    assert card["metrics"]["nuclei_dice_per_image"] >= 0
    # No picture shows empty glass: a class that is not there has no score.
    assert "no picture for training shows 'background'" in out.err
    assert not [key for key in card["metrics"] if key.startswith("background")]
    with safe_open(tmp_path / "runs/model/weights.safetensors", "np") as weights:
        dtypes = {weights.get_tensor(name).dtype for name in weights.keys()}  # noqa: SIM118
    assert dtypes == {np.dtype("float16")}

    longer = run("train", recipe, "--data", "packed.npz", "-o", "runs", "--steps", "6")
    assert longer.code == 0
    log = (tmp_path / "runs/log.jsonl").read_text().splitlines()
    assert max(json.loads(line)["step"] for line in log) == 6
    again = run("train", recipe, "--data", "packed.npz", "-o", "runs", "--steps", "6")
    assert "trained to its end" in again.err
    slide = tmp_path / "slide.png"
    Image.fromarray(np.full((120, 150, 3), 120, np.uint8)).save(slide)
    segmented = run(
        "segment", slide, "--model", "runs/model", "--slide-mpp", "0.5", "--tissue", "none",
        "-o", "maps",
    )  # fmt: skip
    assert segmented.code == 0, segmented.err
    assert (tmp_path / "maps/slide.labels.ome.tif").exists()

    scored = run("evaluate", "runs/model", "packed.npz", "--recipe", recipe, "-o", "scores")
    assert scored.code == 0, scored.err
    assert "1 pictures of g02" in scored.out
    report = json.loads((tmp_path / "scores/evaluation.json").read_text())
    assert sum(map(sum, report["confusion"]["pixels"])) == 96 * 96
    assert report["scores"]["background_dice"] is None
    assert report["boundary_f1"]["background"] is None
    assert set("".join(re.findall("(?m)^background(.*)$", scored.out))) == {" ", "-"}
    assert Image.open(tmp_path / "scores/evaluation.png").width > 4 * 96
    cut = run(
        "evaluate", "runs/model", "packed.npz", "--recipe", recipe, "-o", "cut", "--context",
        "window", "--window-px", 32, "--json",
    )  # fmt: skip
    assert json.loads(cut.out)["context"] == "windows of 32 px"
    wrong = run("evaluate", "runs/model", "packed.npz", "--recipe", recipe, "--groups", "g09")
    assert wrong.code == 1
    assert "no pictures are of g09" in wrong.err
    other = run("evaluate", "runs/model", "packed.npz", "--recipe", "aerial-landcover")
    assert other.code == 1
    assert "give the right --recipe" in other.err


def test_mistakes_are_one_line(run, data, recipe):
    wrong = recipe.with_name("wrong.toml")
    wrong.write_text(recipe.read_text().replace("warmup_steps", "warmup_step"))
    out = run("train", wrong, "--data", data)
    assert out.code == 1
    assert "unknown key `schedule.warmup_step`; did you mean `warmup_steps`" in out.err
    assert "Traceback" not in out.err
    assert run("train", "histo-nuclei").code == 2


@pytest.mark.parametrize("command", ["train", "pretrain"])
def test_without_kornia_it_says_what_to_install(run, data, recipe, tmp_path, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "kornia", None)
    out = run(command, recipe, "--data", data, "-o", tmp_path / "none")
    assert out.code == 1
    assert "kornia is not installed, and this needs it: pip install 'gigavim[train]'" in out.err
    assert not (tmp_path / "none").exists()


def test_scoring_needs_no_kornia():
    modules = "gigavim.cli.train, gigavim.training.evaluate, gigavim.training.run"
    code = f"import sys; sys.modules['kornia'] = None; import {modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
