"""Training in two processes, as torchrun starts them."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_two_processes_write_one_model(tmp_path, pictures_folder, recipe_text):
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_text.replace("steps = 6", "max_minutes = 0.1"))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "gigavim", "train", str(path), "--data", str(pictures_folder), "-o",
        str(tmp_path / "out"), "--device", "cpu",
    ]  # fmt: skip
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()
    card = json.loads((tmp_path / "out/model/card.json").read_text())
    assert card["training"]["hardware"].endswith("CPU cores")
    rows = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == sorted(steps)
