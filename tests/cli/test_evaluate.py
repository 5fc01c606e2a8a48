"""`gigavim evaluate` on a folder of another laboratory, without a recipe."""

import json

import numpy as np
import pytest
import tifffile
from PIL import Image


def field(seed, side=(96, 120)):
    """Bright ground with dark squares, and the squares numbered from 1 on."""
    random = np.random.default_rng(seed)
    pixels = np.full((*side, 3), 220, np.uint8)
    ids = np.zeros(side, np.uint16)
    for number, (y, x) in enumerate(random.integers(0, 80, (5, 2)), 1):
        pixels[y : y + 12, x : x + 12] = 60
        ids[y : y + 12, x : x + 12] = number * 300
    return pixels, ids


@pytest.fixture
def lab(tmp_path):
    """TIFFs at 0.25 µm with 16-bit masks in a layout of its own."""
    root = tmp_path / "lab"
    (root / "tissue images").mkdir(parents=True)
    (root / "labels").mkdir()
    for seed in range(3):
        pixels, ids = field(seed)
        tifffile.imwrite(
            root / f"tissue images/case [{seed}].tif", pixels, photometric="rgb",
            resolution=(4e4, 4e4), resolutionunit="CENTIMETER",
        )  # fmt: skip
        tifffile.imwrite(root / f"labels/case [{seed}]_inst.tif", ids, compression="zlib")
    return root


LAYOUT = ["--images", "tissue images/*.tif", "--masks", "../labels/{stem}_inst.tif"]


def test_numbered_objects_are_scored_against_the_class(run, lab, make_exact_model, tmp_path):
    model = make_exact_model(8, 8)  # dark is tissue
    result = run("evaluate", model, lab, "--class", "tissue=1-", *LAYOUT, "-o", "out")
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert report["pictures"] == 3
    assert report["confusion"]["classes"] == ["other", "tissue"]
    truth = sum(int((field(seed)[1] > 0).sum()) for seed in range(3))
    assert sum(report["confusion"]["pixels"][1]) == truth
    assert report["scores"]["tissue_dice"] > 0.9  # seen at half the resolution
    assert set(report["by_picture"]) == {f"tissue images/case [{seed}].tif" for seed in range(3)}
    sheet = np.asarray(Image.open(tmp_path / "out/evaluation.png"))
    assert (sheet == (255, 0, 0)).all(-1).any()


def test_usual_names_ignored_values_and_classes_told_apart_by_the_model(run, tiny_model, tmp_path):
    root = tmp_path / "plain"
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    pixels, ids = field(1)
    mask = np.where(ids > 0, 7, 0).astype(np.uint8)
    mask[:10] = 200
    Image.fromarray(pixels).save(root / "images/a.png")
    Image.fromarray(mask).save(root / "masks/a.png")
    common = ["evaluate", tiny_model, root, "--class", "nuclei=7", "--class", "ignored=200"]
    result = run(*common, "--mpp", "0.5", "-o", "out", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert sum(map(sum, report["confusion"]["pixels"])) == 86 * 120
    assert sum(report["confusion"]["pixels"][1]) == int((mask == 7).sum())
    refused = run(*common)
    assert refused.code == 1
    assert "--mpp" in refused.err


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--class", "tissue=1-"], 1, ["images/*", "tissue images", "--images"]),
        (["--class", "tissue=1-", *LAYOUT[:2]], 1, ["3 of 3", "--masks", "case [0].tif"]),
        (["--class", "cells=1-", *LAYOUT], 1, ["cells", "background, tissue"]),
        (["--class", "tissue=5", *LAYOUT], 1, ["tissue", "300"]),
        (["--class", "tissue=many", *LAYOUT], 1, ["many", "NAME=1-"]),
        (["--class", "ignored=0", *LAYOUT], 1, ["at least one class"]),
        (["--class", "tissue=1-", "--mpp", "2", *LAYOUT], 1, ["trained for", "--mpp"]),
        (["--class", "tissue=1-", "--recipe", "histo-nuclei"], 2, ["--class"]),
        (["--mpp", "0.5"], 2, ["--class"]),
    ],
)
def test_common_mistakes_are_told(run, lab, make_exact_model, tmp_path, flags, code, words):
    result = run("evaluate", make_exact_model(8, 8), lab, *flags)
    assert result.code == code
    for word in words:
        assert word in result.err
    assert not (tmp_path / "gigavim_evaluation").exists()


def test_masks_of_another_size_or_in_colours_are_named(run, lab, make_exact_model):
    model, mask = make_exact_model(8, 8), lab / "labels/case [1]_inst.tif"
    tifffile.imwrite(mask, np.ones((90, 120), np.uint8))
    result = run("evaluate", model, lab, "--class", "tissue=1-", *LAYOUT)
    assert result.code == 1
    assert "120 x 90 px" in result.err
    assert "120 x 96" in result.err
    tifffile.imwrite(mask, field(1)[0] * np.uint8([1, 2, 3]), photometric="rgb")
    result = run("evaluate", model, lab, "--class", "tissue=1-", *LAYOUT)
    assert result.code == 1
    assert "colours" in result.err
    mask.write_bytes(b"II*\0nothing")
    assert run("evaluate", model, lab, "--class", "tissue=1-", *LAYOUT).code == 1
