import os
import sys
from pathlib import Path

import pytest

from gigavim.names import as_text, result_stem


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("a.svs", "a"),
        ("a.ome.tif", "a"),
        ("a.b.c.png", "a.b.c"),
        ("a.ome.zarr", "a"),
        ("noext", "noext"),
        (".hidden.png", ".hidden"),
        (".ome.tif", ".ome.tif"),
    ],
)
def test_results_are_called_after_the_file(name, stem):
    assert result_stem(Path("folder") / name) == stem


def test_a_folder_given_as_a_dot_has_its_own_name(tmp_path, monkeypatch):
    inner = tmp_path / "dicom" / "inner"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    assert result_stem(Path()) == "inner"
    assert result_stem(Path("..")) == "dicom"


@pytest.mark.skipif(sys.platform == "win32", reason="names are UTF-16 there")
def test_bytes_that_are_no_text_are_replaced():
    assert as_text(os.fsdecode(b"caf\xe9.svs")) == "caf\ufffd.svs"
    assert as_text(Path("😐.svs")) == "😐.svs"
