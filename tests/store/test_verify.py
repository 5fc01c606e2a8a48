"""`gigavim verify` and `gigavim info` on stores, as users meet them."""

import json
import shutil
import subprocess

import pytest


@pytest.fixture
def embedded(run, make_slide, tiny_model, tmp_path):
    path = make_slide(size=(301, 423))
    result = run("embed", path, "--model", tiny_model, "-o", "out", "--tissue", "none")
    assert result.code == 0, result.err
    return tmp_path / "out/slide.embeddings.zarr"


def test_a_sound_store(run, embedded):
    result = run("verify", embedded)
    assert result.code == 0, result.err
    assert "fingerprint" in result.out
    assert "weights that ran" in result.out
    found = json.loads(run("verify", embedded, "--json").out)
    assert found["problems"] == []
    assert len(found["confirmed"]) == 4


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="there is no sha256sum")
def test_sha256sum_agrees(embedded):
    command = ["sha256sum", "--check", "--strict", "--quiet", "checksums.sha256"]
    subprocess.run(command, cwd=embedded, check=True)


def test_every_kind_of_damage_is_found(run, embedded):
    chunk = next(p for p in (embedded / "tokens/embeddings").rglob("*") if p.name != "zarr.json")
    while chunk.is_dir():
        chunk = next(chunk.iterdir())
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    (embedded / "thumbnail/zarr.json").unlink()
    (embedded / "extra").write_text("x")
    result = run("verify", embedded)
    assert result.code == 1
    for words in ("has changed", "is missing", "not part of the store", "2 more"):
        assert words in result.err, result.err


def test_another_slide_and_other_weights(run, embedded, make_slide, tiny_model, tmp_path):
    other = make_slide("other.tif", size=(200, 200))
    result = run("verify", embedded, "--slide", other)
    assert result.code == 1
    assert "is not the slide" in result.err
    (tmp_path / "slide.tif").unlink()
    result = run("verify", embedded)
    assert result.code == 0
    assert "not checked: slide" in result.out
    assert "--slide" in result.out


def test_what_is_no_store(run, tmp_path):
    result = run("verify", tmp_path)
    assert result.code == 1
    assert "no embedding store" in result.err


def test_info(run, embedded, make_slide):
    result = run("info", embedded)
    assert result.code == 0
    for words in ("format 1.1", "2,240 x 32 float16", "mean of all tokens", "tiny"):
        assert words in result.out, result.out
    facts = json.loads(run("info", embedded, "--json").out)
    assert facts["tokens"] == 40 * 56
    assert facts["slide"]["name"] == "slide.tif"
