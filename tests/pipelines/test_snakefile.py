"""The Snakefile, run by snakemake where that is installed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tifffile

SNAKEFILE = Path(__file__).parents[2] / "pipelines/Snakefile"


@pytest.mark.slow
def test_snakemake_runs_each_slide_and_goes_on_past_a_bad_one(tmp_path, make_tissue):
    snakemake = shutil.which("snakemake")
    if snakemake is None:
        pytest.skip("snakemake is not installed")
    (tmp_path / "slides").mkdir()
    for number in range(2):
        tifffile.imwrite(
            tmp_path / f"slides/s{number}.ome.tif", make_tissue(number), photometric="rgb",
            tile=(64, 64), resolution=(2e4, 2e4), resolutionunit="CENTIMETER",
        )  # fmt: skip
    (tmp_path / "slides/bad.ome.tif").write_text("words")
    command = [
        snakemake, "-s", str(SNAKEFILE), "--cores", "1", "--keep-going", "--config",
        "slides=slides/*.tif", "out=results", f"gigavim={sys.executable} -m gigavim",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "bad.ome.tif: " in done.stderr
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == sorted(
        f"s{number}.{end}"
        for number in range(2)
        for end in ("summary.json", "labels.ome.tif", "geojson", "overlay.png")
    )
    (tmp_path / "slides/bad.ome.tif").unlink()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "Nothing to be done" in again.stderr
