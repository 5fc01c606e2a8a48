"""`--context window`: what a user finds in the outputs, against each window segmented by itself."""

import json

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F

from gigavim import open_slide
from gigavim.frames import ClassSpec
from gigavim.model.card import ModelCard, TrainingRecord
from gigavim.model.checkpoint import load_model, save_model
from gigavim.model.config import VimConfig
from gigavim.model.pictures import Look
from gigavim.model.segmentation import SegmentationModel
from gigavim.model.sequence import without_class_tokens
from gigavim.model.vim import Vim
from gigavim.store.reader import EmbeddingStore
from gigavim.tokens.order import scan_cells
from gigavim.training.score import Predictor

CASES = {
    "plain": {"class_token": "none", "pooling": "mean", "position": "block", "grid_hw": (4, 4)},
    "overlapping": {
        "stride_px": 4, "class_token": "none", "pooling": "mean", "position": "none",
    },
    "class_token": {"class_token": "middle", "position": "grid", "grid_hw": (5, 5)},
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def model(request, tmp_path_factory):
    torch.manual_seed(3)
    config = VimConfig(
        **{"d_model": 32, "depth": 4, "patch_px": 8, "stride_px": 8} | CASES[request.param]
    )
    head = "fpn" if request.param == "plain" else "linear"
    network = SegmentationModel(Vim(config), 3, head)
    for name, parameter in network.head.named_parameters():
        if name.startswith(("out.", "linear.")):
            torch.nn.init.normal_(parameter)
    card = ModelCard(
        name="tiny", description="", config=config, head=head, mpp=0.5, mpp_range=(0.25, 0.5),
        mean=(0.8, 0.7, 0.8), std=(0.2, 0.2, 0.2),
        classes=tuple(ClassSpec(name, (9, 9, 9)) for name in "abc"),
        order="blocks(4)", licence="CC0",
        training=TrainingRecord(script="", data="", data_licence="", split=""),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / request.param
    save_model(folder, network, card)
    return folder


def segmented(run, slide, model, out, *flags):
    result = run(
        "segment", slide, "--model", model, "--context", "window", "--window-px", 48,
        "--precision", "fp32", "-o", out, "--tissue", "none", *flags,
    )  # fmt: skip
    assert result.code == 0, result.err
    return tifffile.imread(out / "slide.labels.ome.tif")


def test_the_map_is_that_of_evaluation_in_windows(run, make_slide, model, tmp_path):
    slide = make_slide(size=(221, 300))
    found = segmented(run, slide, model, tmp_path / "out")
    with open_slide(slide) as opened:
        pixels = opened.read(0, 0, 300, 221)
    network, card = load_model(model)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    predictor = Predictor(network, card.scan_order, card.mean, card.std, window_px=48)
    expected = predictor.labels(images)[0].numpy()
    assert len(np.unique(expected)) == 3
    assert np.mean(found != expected) < 1e-3  # equals, but for rounding
    summary = json.loads((tmp_path / "out/slide.summary.json").read_text())
    assert summary["provenance"]["model"]["context"] == "windows of 48 px"
    assert summary["coverage"]["predicted"] == 1
    assert "35 windows" in summary["plan"][0]


def test_blocks_and_batches_change_nothing(run, make_slide, model, tmp_path, monkeypatch):
    slide = make_slide(size=(221, 300))
    whole = segmented(run, slide, model, tmp_path / "whole")
    (tmp_path / "small.toml").write_text("[tokens]\nblock_px = 64\n")
    monkeypatch.setattr("gigavim.engine.window_plan.BATCH_TOKENS", {"cpu": 1})
    parts = segmented(
        run, slide, model, tmp_path / "parts", "--config", tmp_path / "small.toml",
        "--num-workers", 1, "--threads", 1,
    )  # fmt: skip
    assert np.mean(whole != parts) < 1e-4


def test_a_window_knows_nothing_of_its_neighbours(run, make_slide, model, tmp_path):
    slide = make_slide(size=(150, 200))
    before = segmented(run, slide, model, tmp_path / "before")
    pixels = tifffile.imread(slide)
    pixels[:48, :48] = 255 - pixels[:48, :48]
    tifffile.imwrite(
        slide, pixels, photometric="rgb", resolution=(2e4, 2e4), resolutionunit="CENTIMETER"
    )
    after = segmented(run, slide, model, tmp_path / "after")
    changed = before != after
    assert changed[:48, :48].any()
    assert not changed[48:].any()
    assert not changed[:, 48:].any()


def test_windows_with_tissue_are_kept_whole_and_others_left_out(
    run, make_slide, tiny_model, tmp_path
):
    slide = make_slide(size=(480, 640))
    tissue = np.zeros((480, 640), np.uint8)
    tissue[100:110, 300:310] = 255
    tifffile.imwrite(tmp_path / "mask.tif", tissue)
    result = run(
        "segment", slide, "--model", tiny_model, "--context", "window", "--window-px", 96,
        "--tissue", tmp_path / "mask.tif", "-o", "out", "--format", "ome-tiff",
    )  # fmt: skip
    assert result.code == 0, result.err
    summary = json.loads((tmp_path / "out/slide.summary.json").read_text())
    assert summary["tokens"]["count"] == 12 * 12
    labels = tifffile.imread(tmp_path / "out/slide.labels.ome.tif")
    outside = np.ones_like(labels, bool)
    outside[96:192, 288:384] = False
    assert not labels[outside].any()


def test_embeddings_are_those_of_the_windows(run, make_slide, model, tmp_path):
    slide = make_slide(size=(100, 130))
    (tmp_path / "more.toml").write_text('[embedding]\nprobabilities = true\ndtype = "float32"\n')
    result = run(
        "embed", slide, "--model", model, "--context", "window", "--window-px", 48, "--precision",
        "fp32", "--tissue", "none", "--config", tmp_path / "more.toml", "-o", "out",
    )  # fmt: skip
    assert result.code == 0, result.err
    store = EmbeddingStore.open(tmp_path / "out/slide.embeddings.zarr")
    assert store.info.facts["provenance"]["model"]["context"] == "windows of 48 px"
    network, card = load_model(model)
    with open_slide(slide) as opened:
        pixels = opened.read(48, 48, 48, 48)
    window = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    look = Look(card.scan_order, card.mean, card.std, every_cell=True)
    stride, kind = card.config.stride_px, card.config.class_token
    with torch.no_grad():
        seen = look.features(network, window, network.encoder.encode)
        shares = F.avg_pool2d(network.logits(seen.grid).softmax(1), stride)[0]
    rows, cols = look.grid_hw(card.config, (48, 48))
    cells = scan_cells(np.ones((rows, cols), bool), card.scan_order)
    patches = without_class_tokens(seen.encoded, kind)[0]
    stored = {tuple(place): i for i, place in enumerate(store.row_col[:].tolist())}
    assert len(stored) == (-(-100 // stride)) * (-(-130 // stride))
    for place, cell in enumerate(cells.tolist()):
        row, col = divmod(cell, cols)
        if row < 48 // stride and col < 48 // stride:
            i = stored[row + 48 // stride, col + 48 // stride]
            assert np.allclose(store.embeddings[i], patches[place], atol=1e-4)
            assert np.allclose(store.probabilities[i], shares[:, row, col], atol=2e-3)
    assert np.isfinite(store.slide_embedding).all()


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--window-px", "100"], 1, ["100 px", "multiple of 8", "96"]),
        (["--window-px", "8", "--max-memory", "1MB"], 1, ["MB"]),
        (["--window-px", "3"], 2, ["window-px"]),
        (["--context", "tile"], 2, ["slide", "window"]),
    ],
)
def test_what_does_not_fit_is_said(run, make_slide, tiny_model, flags, code, words):
    flags = flags if "--context" in flags else ["--context", "window", *flags]
    result = run("segment", make_slide(), "--model", tiny_model, *flags)
    assert result.code == code
    for word in words:
        assert word in result.err


def test_a_dry_run_counts_windows(run, make_slide, tiny_model):
    result = run(
        "segment", make_slide(), "--model", tiny_model, "--context", "window", "--dry-run",
        "--tissue", "none", "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    plan = json.loads(result.out)
    assert plan["windows"] == 4
    assert plan["tokens"] == 4 * 28 * 28
