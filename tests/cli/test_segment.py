"""`gigavim segment` as a user meets it."""

import json
import os
import sys

import numpy as np
import pytest
import tifffile
from PIL import Image


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_slide_becomes_four_files(run, make_slide, tiny_model, tmp_path):
    result = run("segment", make_slide(), "--model", tiny_model, "-o", "out")
    assert result.code == 0, result.err
    assert files(tmp_path / "out") == [
        "slide.geojson", "slide.labels.ome.tif", "slide.overlay.png", "slide.summary.json",
    ]  # fmt: skip
    labels = tifffile.imread(tmp_path / "out/slide.labels.ome.tif")
    assert labels.shape == (300, 420)
    assert set(np.unique(labels)) <= {0, 1, 2}
    summary = json.loads((tmp_path / "out/slide.summary.json").read_text())
    assert summary["provenance"]["model"]["name"] == "tiny"
    pixels = {entry["name"]: entry["pixels"] for entry in summary["classes"]}
    assert pixels["tissue"] == int((labels == 1).sum())
    assert json.loads((tmp_path / "out/slide.geojson").read_text())["type"] == "FeatureCollection"
    assert Image.open(tmp_path / "out/slide.overlay.png").size[0] > 0


def test_the_result_does_not_depend_on_chunks_threads_or_where_it_lives(
    run, make_slide, tiny_model, tmp_path
):
    path = make_slide(size=(500, 700))
    variants = {
        "plain": [],
        "small": ["--num-workers", 1, "--threads", 1],
        "blocks": ["--config", tmp_path / "small.toml"],
    }
    (tmp_path / "small.toml").write_text("[tokens]\nblock_px = 128\n")
    maps = {}
    for name, flags in variants.items():
        result = run(
            "segment", path, "--model", tiny_model, "-o", name, "--precision", "fp32", *flags
        )
        assert result.code == 0, result.err
        maps[name] = tifffile.imread(tmp_path / name / "slide.labels.ome.tif")
    for name in ("small", "blocks"):
        # Rounding may flip a pixel whose two best classes are equal to seven digits.
        assert np.mean(maps[name] != maps["plain"]) < 1e-4


def test_existing_results_are_kept_unless_told(run, make_slide, tiny_model, tmp_path):
    path = make_slide()
    assert run("segment", path, "--model", tiny_model).code == 0
    before = (tmp_path / "gigavim_out/slide.summary.json").read_bytes()
    refused = run("segment", path, "--model", tiny_model)
    assert refused.code == 1
    assert "--overwrite" in refused.err
    assert (tmp_path / "gigavim_out/slide.summary.json").read_bytes() == before
    assert run("segment", path, "--model", tiny_model, "--overwrite").code == 0


def test_fluorescence_through_a_brightfield_model_is_warned_of(run, make_slide, tmp_path, caplog):
    random = np.random.default_rng(3)
    glow = np.zeros((300, 420, 3), np.float32)
    glow[..., 2] = 12 + 200 * (random.random((300, 420)) < 0.05)
    dark = tmp_path / "dapi.tif"
    options = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(dark, glow.astype(np.uint8), photometric="rgb", **options)
    result = run("segment", dark, make_slide(), "-o", "out", "--tissue", "none")
    assert result.code == 0, result.err
    (warned,) = [text for text in caplog.messages if "looks like fluorescence" in text]
    assert "dapi.tif" in warned
    assert "histo-nuclei-nano" in warned
    warnings = {
        name: json.loads((tmp_path / f"out/{name}.summary.json").read_text())["warnings"]
        for name in ("dapi", "slide")
    }
    assert len(warnings["dapi"]) == 1
    assert "fluorescence" in warnings["dapi"][0]
    assert warnings["slide"] == []
    caplog.clear()
    assert run("segment", dark, "--dry-run").code == 0
    assert "looks like fluorescence" in caplog.text


def test_one_bad_slide_of_three_does_not_stop_the_others(run, make_slide, tiny_model, tmp_path):
    bad = tmp_path / "bad.svs"
    bad.write_text("not a slide at all")
    slides = [make_slide("a.tif"), bad, make_slide("b.tif")]
    result = run("segment", *slides, "--model", tiny_model, "-o", "out")
    assert result.code == 3
    assert "1 of 3 slides failed" in result.err
    assert {"a.summary.json", "b.summary.json"} <= set(files(tmp_path / "out"))
    assert not any(name.startswith("bad") for name in files(tmp_path / "out"))


def test_fail_fast_stops_at_the_first(run, make_slide, tiny_model, tmp_path):
    bad = tmp_path / "bad.svs"
    bad.write_text("not a slide at all")
    result = run(
        "segment", bad, make_slide("b.tif"), "--model", tiny_model, "-o", "out", "--fail-fast"
    )
    assert result.code == 1
    assert not (tmp_path / "out" / "b.summary.json").exists()


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--model", "no-such-model"], 1, ["no-such-model", "histo-nuclei-nano"]),
        (["--device", "cuda:99"], 1, ["cuda:99", "--device cpu"]),
        (["--device", "abacus"], 2, ["abacus"]),
        (["--mpp", "0.5", "--mag", "20"], 2, ["--mpp", "--mag"]),
        (["--max-memory", "lots"], 2, ["lots"]),
        (["--max-memory", "1MB"], 1, ["MB"]),
        (["--channels", "0,1"], 2, ["0,1,2"]),
        (["--channels", "²,1,2"], 2, ["0,1,2"]),
        (["--format", "geotiff"], 1, ["geotiff", "georeferenced"]),
        (["--tissue", "nowhere.geojson"], 1, ["nowhere.geojson"]),
        (["--weights", "nowhere.safetensors"], 1, ["nowhere.safetensors"]),
        (["--weights", "published.pth"], 1, ["published.pth", "safetensors"]),
        (["--model", ""], 1, ["model.name"]),
        (["--config", "nowhere.toml"], 1, ["nowhere.toml", "--config"]),
        (["--scratch-dir", "nowhere"], 1, ["nowhere", "--scratch-dir"]),
        (["--slide-mpp", "5"], 1, ["--allow-mpp-mismatch", "--slide-mpp"]),
        (["--slide-mpp", "1e-9"], 1, ["slide.tif", "--slide-mpp"]),
        (["--mpp", "1e-9"], 1, ["1e-09 um (from model.mpp)", "--mpp"]),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    run, make_slide, tiny_model, tmp_path, flags, code, words
):
    model = [] if "--model" in flags else ["--model", tiny_model]
    result = run("segment", make_slide(), *model, *flags)
    assert result.code == code, result.err
    assert all(word in result.err for word in words), result.err
    assert "Traceback" not in result.err
    if code == 1:
        assert result.err.count("Error:") == 1
    assert list((tmp_path / "gigavim_out").glob("*")) == []


def test_a_slide_without_mpp_names_the_ways_out(run, make_slide, tiny_model):
    result = run("segment", make_slide(mpp=None), "--model", tiny_model)
    assert result.code == 1
    assert "--slide-mpp" in result.err
    assert "gigavim.toml" in result.err


def test_slide_mpp_mends_a_slide_without(run, make_slide, tiny_model, tmp_path):
    result = run("segment", make_slide(mpp=None), "--model", tiny_model, "--slide-mpp", "0.25")
    assert result.code == 0, result.err
    labels = tifffile.imread(tmp_path / "gigavim_out/slide.labels.ome.tif")
    assert labels.shape == (150, 210)


def test_weights_that_do_not_fit_name_the_tensor(run, make_slide, tiny_model, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    state = load_file(tiny_model / "weights.safetensors")
    state["head.linear.weight"] = torch.zeros(5, 5)
    save_file(state, tmp_path / "other.safetensors")
    result = run(
        "segment", make_slide(), "--model", tiny_model, "--weights", tmp_path / "other.safetensors"
    )
    assert result.code == 1
    assert "head.linear.weight" in result.err


def test_the_summary_names_the_weights_that_ran(run, make_slide, tiny_model, tmp_path):
    import hashlib

    from safetensors.torch import load_file, save_file

    state = load_file(tiny_model / "weights.safetensors")
    state["head.linear.bias"] += 1
    other = tmp_path / "other.safetensors"
    save_file(state, other)
    result = run("segment", make_slide(), "--model", tiny_model, "--weights", other)
    assert result.code == 0, result.err
    summary = json.loads((tmp_path / "gigavim_out/slide.summary.json").read_text())
    expected = hashlib.sha256(other.read_bytes()).hexdigest()
    assert summary["provenance"]["model"]["sha256"] == expected


def test_a_blank_slide_says_so(run, tiny_model, tmp_path):
    path = tmp_path / "blank.tif"
    tifffile.imwrite(
        path, np.full((256, 256, 3), 245, np.uint8), photometric="rgb",
        resolution=(2e4, 2e4), resolutionunit="CENTIMETER",
    )  # fmt: skip
    result = run("segment", path, "--model", tiny_model)
    assert result.code == 1
    assert "no tissue" in result.err
    assert "--tissue none" in result.err
    assert run("segment", path, "--model", tiny_model, "--tissue", "none").code == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 77), (9, 3), (65, 129)])
def test_tiny_slides(run, make_slide, tiny_model, tmp_path, size):
    result = run("segment", make_slide(size=size), "--model", tiny_model, "--tissue", "none")
    assert result.code == 0, result.err
    labels = tifffile.imread(tmp_path / "gigavim_out/slide.labels.ome.tif")
    assert labels.shape == size


def test_dry_run_writes_nothing(run, make_slide, tiny_model, tmp_path):
    result = run("segment", make_slide(), "--model", tiny_model, "--dry-run")
    assert result.code == 0
    assert "tokens" in result.out
    assert not (tmp_path / "gigavim_out").exists()


def test_dry_run_names_the_slide_and_speaks_json(run, make_slide, tiny_model):
    slide = make_slide()
    assert run("segment", slide, "--model", tiny_model, "--dry-run").out.startswith(str(slide))
    planned = json.loads(run("segment", slide, "--model", tiny_model, "--dry-run", "--json").out)
    assert planned["slide"] == str(slide)
    assert planned["tokens"] > 0


def test_json_is_one_object_on_standard_output(run, make_slide, tiny_model):
    result = run("segment", make_slide(), "--model", tiny_model, "--json", "-q")
    assert json.loads(result.out)["tokens"]["count"] > 0


def test_two_slides_of_one_name_do_not_overwrite_each_other(run, make_slide, tiny_model, tmp_path):
    first = make_slide("x.tif")
    other = tmp_path / "sub"
    other.mkdir()
    second = first.rename(other / "x.tif")
    result = run("segment", make_slide("x.tif"), second, "--model", tiny_model)
    assert result.code == 2
    assert "x" in result.err


def test_a_path_given_twice_counts_once(run, make_slide, tiny_model, tmp_path):
    path = make_slide()
    result = run("segment", path, path, "--model", tiny_model)
    assert result.code == 0, result.err
    assert result.out.count("slide.summary.json") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_results_have_the_name_of_a_link_not_of_what_it_points_to(
    run, make_slide, tiny_model, tmp_path
):
    link = tmp_path / "patient.tif"
    link.symlink_to(make_slide("8f3a.tif"))
    assert run("segment", link, "--model", tiny_model).code == 0
    assert "patient.summary.json" in files(tmp_path / "gigavim_out")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse the name")
def test_a_name_that_is_no_text(run, make_slide, tiny_model, tmp_path):
    path = make_slide().rename(tmp_path / os.fsdecode(b"caf\xe9.tif"))
    result = run("segment", path, "--model", tiny_model, "--json", "-q")
    assert result.code == 0, result.err
    assert json.loads(result.out)["slide"].endswith("caf\ufffd.tif")
    assert len(list((tmp_path / "gigavim_out").iterdir())) == 4
    assert json.loads(run("info", path, "--json").out)["path"].endswith("caf\ufffd.tif")


def test_a_name_too_long_for_the_results_is_said(run, make_slide, tiny_model, tmp_path):
    path = make_slide(f"{'x' * 240}.tif")
    result = run("segment", path, "--model", tiny_model)
    assert result.code == 1
    assert "cannot be written" in result.err
    assert not (tmp_path / "gigavim_out").exists()


@pytest.mark.slow
def test_a_polite_request_to_end_leaves_nothing(make_slide, tiny_model, tmp_path):
    import signal
    import subprocess
    import time

    code = "from gigavim.cli.main import main; main()"
    arguments = ["segment", make_slide(size=(4000, 4000)), "--model", tiny_model, "-o", "out"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=tmp_path, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "out").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert not (tmp_path / "out").exists()
