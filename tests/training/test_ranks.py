"""Training in two processes, as torchrun starts them."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from gigavim.model.encoder import read_encoder

pytestmark = pytest.mark.slow


def torchrun(*arguments):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "gigavim", *arguments,
    ]  # fmt: skip
    done = subprocess.run(
        [str(a) for a in command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode()


def test_two_processes_write_one_model(tmp_path, pictures_folder, recipe_text):
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_text.replace("steps = 6", "max_minutes = 0.1"))
    torchrun(
        "train", path, "--data", pictures_folder, "-o", tmp_path / "out", "--device", "cpu"
    )  # fmt: skip
    card = json.loads((tmp_path / "out/model/card.json").read_text())
    assert card["training"]["hardware"].endswith("CPU cores")
    rows = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == sorted(steps)


def test_two_processes_are_two_workers_of_one(run, tmp_path, pictures_folder, recipe_text):
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_text)
    common = ("train", path, "--data", pictures_folder, "--device", "cpu")
    for steps in (3, 6):  # the second goes on from the checkpoint of the first, in every process
        torchrun(*common, "-o", tmp_path / "two", "--steps", steps)
        one = run(*common, "-o", tmp_path / "one", "--workers", "2", "--steps", steps)
        assert one.code == 0, one.err
    expected = load_file(tmp_path / "one/model/weights.safetensors")
    for name, value in load_file(tmp_path / "two/model/weights.safetensors").items():
        assert torch.equal(value, expected[name]), name


def test_two_processes_pretrain_one_encoder(tmp_path, pictures_folder, recipe_text):
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_text)
    for _ in range(2):  # nothing is left to do for the second
        torchrun(
            "pretrain", path, "--data", pictures_folder, "-o", tmp_path / "out", "--device", "cpu"
        )
    assert read_encoder(tmp_path / "out/encoder").config.depth == 2
    rows = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6]
