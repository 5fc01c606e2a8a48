# ruff: noqa: PT012  (the file that is half written is the point)
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gigavim.errors import OutputError
from gigavim.outputs.atomic import OutputSet, atomic_path, output_error


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_finished_file_is_there_and_nothing_else(tmp_path):
    with atomic_path(tmp_path / "a.geojson.gz") as partial:
        assert partial.name.endswith("a.geojson.gz")
        partial.write_text("done")
        assert not (tmp_path / "a.geojson.gz").exists()
    assert names(tmp_path) == ["a.geojson.gz"]
    assert (tmp_path / "a.geojson.gz").read_text() == "done"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_writer_leaves_nothing_not_even_folders(tmp_path, error):
    with pytest.raises(error), atomic_path(tmp_path / "new" / "deep" / "a.txt") as partial:
        partial.write_text("half")
        raise error
    assert names(tmp_path) == []


def test_an_existing_file_is_refused_before_any_work(tmp_path):
    (tmp_path / "a.txt").write_text("good")
    with (
        pytest.raises(OutputError, match=r"a\.txt: exists already; use --overwrite"),
        OutputSet() as outputs,
    ):
        outputs.path(tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "good"


def test_a_failing_rerun_keeps_the_good_result(tmp_path):
    (tmp_path / "a.txt").write_text("good")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a.txt", overwrite=True) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "good"
    assert names(tmp_path) == ["a.txt"]


def test_a_set_appears_together(tmp_path):
    (tmp_path / "b.txt").write_text("old")
    with OutputSet(overwrite=True) as outputs:
        for name in ("a.txt", "b.txt"):
            outputs.path(tmp_path / name).write_text("new")
        assert (tmp_path / "b.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt", "b.txt"]
    assert (tmp_path / "b.txt").read_text() == "new"


def test_a_set_that_cannot_be_renamed_wholly_is_taken_back(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(OutputError), OutputSet(overwrite=True) as outputs:
        outputs.path(tmp_path / "a.txt").write_text("new")
        outputs.path(tmp_path / "b.txt").write_text("new")
        # Somebody makes a folder of that name while we work.
        (tmp_path / "b.txt").mkdir()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt", "b.txt"]


def test_a_writer_inside_a_set(tmp_path):
    with OutputSet() as outputs:
        part = outputs.path(tmp_path / "a.txt")
        with atomic_path(part, overwrite=True) as inner:
            inner.write_text("done")
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "done"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "no space left on the disk; free some space"),
        (errno.EDQUOT, "quota is used up; free some space"),
        (errno.EACCES, "not permitted; change its permissions"),
        (errno.EROFS, "not permitted"),
    ],
)
def test_the_disks_refusals_name_file_reason_and_remedy(tmp_path, code, words):
    with (
        pytest.raises(OutputError, match=words) as caught,
        atomic_path(tmp_path / "a.txt") as partial,
    ):
        raise OSError(code, os.strerror(code), str(partial))
    assert str(caught.value).startswith(f"{tmp_path / 'a.txt'}: cannot be written: ")
    assert ".partial" not in str(caught.value)
    assert names(tmp_path) == []


def test_a_set_blames_no_output_for_an_input_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError), OutputSet() as outputs:
        outputs.path(tmp_path / "a.txt")
        (tmp_path / "input.svs").read_bytes()
    assert names(tmp_path) == []


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is not a folder"), OutputSet() as outputs:
        outputs.path(tmp_path / "file" / "a.txt")


def test_a_folder_in_the_place_of_the_file(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(OutputError, match="is a folder"), OutputSet(overwrite=True) as outputs:
        outputs.path(tmp_path / "a.txt")


def test_gdal_hides_the_errno_of_a_full_disk(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    assert "no space left" in str(output_error(tmp_path / "a.tif", OSError("write failed")))


@pytest.mark.skipif(os.name == "nt", reason="signals are those of POSIX")
def test_an_interrupted_process_leaves_nothing(tmp_path):
    code = (
        "import signal, sys, time\n"
        # A background job of a shell without job control inherits that it is ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from gigavim.outputs.atomic import atomic_path\n"
        "with atomic_path(sys.argv[1]) as partial:\n"
        "    partial.write_text('half'); print('ready', flush=True); time.sleep(60)\n"
    )
    target = tmp_path / "a.txt"
    with subprocess.Popen(
        [sys.executable, "-c", code, target],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) != 0
    assert names(tmp_path) == []
