"""Slides with unreadable parts: recorded up to a limit, refused above it."""

import json

import numpy as np
import pytest
import tifffile


@pytest.fixture
def damaged(tmp_path):
    """A slide of 256 JPEG tiles, so many of which hold noise instead of a picture."""

    def make(broken: int):
        path = tmp_path / "damaged.tif"
        pixels = np.random.default_rng(0).normal((190, 120, 170), 20, (1024, 1024, 3))
        tifffile.imwrite(
            path, pixels.clip(0, 255).astype(np.uint8), tile=(64, 64), photometric="rgb",
            compression="jpeg", resolution=(2e4, 2e4), resolutionunit="CENTIMETER",
        )  # fmt: skip
        with tifffile.TiffFile(path) as tiff:
            spans = list(zip(tiff.pages[0].dataoffsets, tiff.pages[0].databytecounts))
        with path.open("r+b") as file:
            for offset, count in spans[100 : 100 + broken]:
                file.seek(offset)
                file.write(b"\x5a" * count)
        return path

    return make


def test_a_few_unreadable_tiles_are_recorded(run, damaged, tiny_model, tmp_path):
    result = run("segment", damaged(2), "--model", tiny_model, "--tissue", "none")
    assert result.code == 0, result.err
    summary = json.loads((tmp_path / "gigavim_out/damaged.summary.json").read_text())
    assert summary["tokens"]["unreadable"] == 2 * 8 * 8
    assert summary["coverage"]["unreadable"] == pytest.approx(2 / 256, abs=1e-5)


def test_half_a_slide_unreadable_fails(run, damaged, tiny_model, tmp_path):
    path = damaged(128)
    result = run("segment", path, "--model", tiny_model, "--tissue", "none")
    assert result.code == 1
    assert result.err.count("Error:") == 1
    assert "damaged.tif" in result.err
    assert "1.0%" in result.err
    assert not (tmp_path / "gigavim_out").exists()


def test_the_limit_is_a_setting(run, damaged, tiny_model, tmp_path):
    (tmp_path / "gigavim.toml").write_text("[output]\nmax_unreadable = 0.6\n")
    result = run("segment", damaged(128), "--model", tiny_model, "--tissue", "none")
    assert result.code == 0, result.err
