"""Every table of `benchmarks.quality` in miniature, from the packed data to the JSON."""

import json
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from gigavim.training.pack import read_pictures, write_pack
from gigavim.training.recipe import Recipe
from gigavim.training.run import new_model

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import quality


@pytest.fixture(scope="module")
def packed(tmp_path_factory, pictures_folder, recipe_text):
    folder = tmp_path_factory.mktemp("packed")
    text = recipe_text.replace("steps = 6", "steps = 2")
    (folder / "tiny.toml").write_text(text)
    recipe = Recipe.model_validate(tomllib.loads(text))
    write_pack(folder / "tiny.npz", read_pictures(pictures_folder, recipe), recipe)
    return folder


ROWS = {
    "orders": 5,
    "strides": 4,
    "heads": len(quality.get_args(quality.HeadKind)),
    "directions": 4,
    "class_tokens": 5,
}


@pytest.mark.parametrize("table", ROWS)
def test_a_table_has_all_its_rows(table, packed, tmp_path):
    out = tmp_path / "out.json"
    quality.main([
        table, "--recipe", str(packed / "tiny.toml"), "--data", str(packed / "tiny.npz"),
        "--steps", "2", "--device", "cpu", "--json", str(out),
    ])  # fmt: skip
    found = json.loads(out.read_text())
    assert found["table"] == table
    assert len(found["rows"]) == ROWS[table]
    score = "accuracy" if table == "class_tokens" else "dice:nuclei"
    for row in found["rows"].values():
        assert 0 <= row[score] <= 1
        assert row["steps"] == 2
    if table == "orders":
        assert any("_block_border_" in key for key in found["rows"]["raster"])


def test_a_row_brings_the_one_it_goes_on_from(recipe):
    rows = quality.rows_of("strides", recipe, "then stride 8")
    assert [row.name for row in rows] == [
        "patch 16 stride 16",
        "patch 16 stride 16, then stride 8",
    ]


def test_peers_that_are_not_installed_are_left_out(packed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "monai", None)
    monkeypatch.setitem(sys.modules, "monai.networks", None)
    monkeypatch.setitem(sys.modules, "monai.networks.nets", None)
    out = tmp_path / "out.json"
    quality.main([
        "peers", "--recipe", str(packed / "tiny.toml"), "--data", str(packed / "tiny.npz"),
        "--steps", "1", "--device", "cpu", "--only", "U-Net", "--json", str(out),
    ])  # fmt: skip
    (row,) = json.loads(out.read_text())["rows"].values()
    assert "monai" in row["left out"]


def test_another_stride_goes_on_from_the_encoder(recipe):
    head = quality.with_parts(recipe, model={"head": "fpn", "head_width": 8})
    coarse, fine = (new_model(row.recipe) for row in quality.strides(head)[1:3])
    quality.take_over(fine, coarse)
    given = coarse.encoder.state_dict()
    assert all(torch.equal(w, given[name]) for name, w in fine.encoder.state_dict().items())
