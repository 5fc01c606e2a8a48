"""`gigavim embed` and `gigavim convert` as a user meets them."""

import json

import numpy as np
import pytest
import tifffile

import gigavim


@pytest.fixture
def store(run, make_slide, tiny_model, tmp_path):
    result = run("embed", make_slide(), "--model", tiny_model, "-o", "out", "--tissue", "none")
    assert result.code == 0, result.err
    assert "slide.embeddings.zarr" in result.out
    return tmp_path / "out/slide.embeddings.zarr"


def test_embed_writes_the_store_alone_and_says_json(run, make_slide, tiny_model, tmp_path):
    result = run("embed", make_slide(), "--model", tiny_model, "--json", "--probabilities")
    assert result.code == 0, result.err
    assert [path.name for path in (tmp_path / "gigavim_out").iterdir()] == ["slide.embeddings.zarr"]
    summary = json.loads(result.out)
    opened = gigavim.open_embeddings(tmp_path / "gigavim_out/slide.embeddings.zarr")
    assert summary["tokens"]["count"] == len(opened)
    assert opened.probabilities.shape == (len(opened), 3)
    np.testing.assert_allclose(opened.probabilities[:].sum(1), 1, atol=4e-3)


def test_embed_with_formats_and_a_bad_slide_among_them(run, make_slide, tiny_model, tmp_path):
    (tmp_path / "bad.svs").write_text("no slide")
    slides = [make_slide("a.tif"), tmp_path / "bad.svs"]
    result = run("embed", *slides, "--model", tiny_model, "-o", "o", "--format", "ome-tiff")
    assert result.code == 3
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [
        "a.embeddings.zarr", "a.labels.ome.tif",
    ]  # fmt: skip


def test_convert_writes_what_is_asked_for(run, store, tmp_path):
    result = run("convert", store, "-o", "c", "--format", "ome-tiff", "--format", "csv")
    assert result.code == 0, result.err
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "slide.areas.csv", "slide.labels.ome.tif",
    ]  # fmt: skip
    labels = tifffile.imread(tmp_path / "c/slide.labels.ome.tif")
    assert np.array_equal(labels, gigavim.open_embeddings(store).labels.read(0, 300, 0, 420))
    again = run("convert", store, "-o", "c", "--format", "csv")
    assert again.code == 1
    assert "--overwrite" in again.err
    assert run("convert", store, "-o", "c", "--format", "csv", "--overwrite").code == 0


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ([], 1, ["--format", "h5-trident"]),
        (["--format", "docx"], 2, ["docx"]),
        (["--format", "gpkg"], 1, ["gpkg", "georeferenced"]),
        (["--format", "h5-stamp", "--pool", "3"], 1, ["pooled by 3", "1, 2"]),
        (["--format", "ome-zarr", "--slide", "moved.tif"], 1, ["moved.tif", "--slide"]),
        (["--format", "geojson", "--min-area", "-1"], 2, ["--min-area"]),
    ],
)
def test_what_cannot_be_converted_says_why_and_leaves_nothing(
    run, store, tmp_path, flags, code, words
):
    pytest.importorskip("h5py")
    result = run("convert", store, "-o", "c", *flags)
    assert result.code == code
    for word in words:
        assert word in result.err, result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "c").exists() or not list((tmp_path / "c").iterdir())


@pytest.mark.parametrize("part", ["tokens/embeddings", "map/labels", "map/coverage", "thumbnail"])
def test_a_damaged_store_is_no_defect_of_ours(run, store, tmp_path, part):
    pytest.importorskip("h5py")
    shard = next(p for p in (store / part).rglob("*") if p.is_file() and p.name != "zarr.json")
    shard.write_bytes(shard.read_bytes()[:-9])
    flags = [f for name in ("h5-trident", "csv", "geojson", "overlay") for f in ("--format", name)]
    result = run("convert", store, "-o", "c", *flags)
    assert result.code == 1
    assert "gigavim verify" in result.err
    assert "defect" not in result.err
    assert not (tmp_path / "c").exists() or not list((tmp_path / "c").iterdir())


def test_a_store_is_no_slide(run, store):
    for command in ("segment", "info"):
        result = run(command, store)
        assert ("is an embedding store" in result.err) == (command == "segment"), result.err
        assert "Warning" not in result.err


def test_names_are_those_of_the_store_wherever_one_stands(run, store, tmp_path, monkeypatch):
    monkeypatch.chdir(store)
    assert run("convert", ".", "-o", tmp_path / "c", "--format", "csv").code == 0
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["slide.areas.csv"]


def test_what_is_no_store(run, tmp_path):
    (tmp_path / "x").mkdir()
    for name in ("x", "nowhere.embeddings.zarr"):
        result = run("convert", name, "--format", "csv")
        assert result.code == 1
        assert "no embedding store" in result.err
    assert run("convert", "a/x.zarr", "b/x.zarr", "--format", "csv").code == 2
