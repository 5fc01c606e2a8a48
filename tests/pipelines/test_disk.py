"""Disks that are full, and folders that cannot be written."""

import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from types import SimpleNamespace

import pytest

from gigavim.errors import OutputError, ResourceError
from gigavim_pipelines import run as running
from gigavim_pipelines.entries import Entry
from gigavim_pipelines.folders import Archive
from gigavim_pipelines.ledger import Ledger, read_ledgers
from gigavim_pipelines.ledger_files import ledger_path
from gigavim_pipelines.space import why_full
from gigavim_pipelines.status import read_status

resource = pytest.importorskip("resource", reason="limits are POSIX's")

FAT = '''
"""A task that writes as many bytes as a slide says."""
from pathlib import Path
from types import SimpleNamespace


def run(path, *, settings, stem, progress):
    out = Path(settings.output.directory) / f"{stem}.bin"
    out.write_bytes(bytes(int(Path(path).read_text())))
    return SimpleNamespace(outputs={"bin": out}, summary={})
'''


@pytest.fixture
def small_disk(tmp_path):
    """Make a file system of a size, or change it: `small_disk("1m")`."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = []

    def mount(options):
        again = "remount," if mounted else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{again}{options}", "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"file systems cannot be mounted here: {done.stderr.decode().strip()}")
        mounted.append(options)
        return place

    if not shutil.which("mount"):
        pytest.skip("there is no mount here")
    yield mount
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def fat(own_task):
    return own_task("fat", FAT)


def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_room(
    run, fat, make_slides, small_disk
):
    slides = make_slides(**{f"s{number}": "2000000" for number in range(6)})
    out = small_disk("size=9m") / "out"
    command = ("batch", fat, slides, "-o", out, "--workers", 1)
    result = run(*command)
    assert result.code == 1
    assert "no space left on the disk, so the run has stopped" in result.err
    assert "run the same command" in result.err
    facts = json.loads(run("status", out, "--json").out)
    assert facts["failed"] == 0
    assert 0 < facts["done"] < 6
    assert facts["done"] + facts["waiting"] == 6
    assert all(not path.name.startswith(".") for path in (out / "slides").iterdir())
    small_disk("size=60m")
    again = run(*command)
    assert again.code == 0, again.err
    assert f"{facts['waiting']} to do, {facts['done']} done before" in again.err


def test_a_slide_that_is_too_large_for_the_disk_costs_itself_only(
    run, fat, make_slides, small_disk
):
    slides = make_slides(a="1000", huge="40000000", z="1000")
    out = small_disk("size=20m") / "out"
    result = run("batch", fat, slides, "-o", out, "--workers", 1, "--tries", 2, "--json")
    assert result.code == 3, result.err
    told = json.loads(result.out)
    assert told["done"] == 2
    assert [(slide["id"], slide["reason"]) for slide in told["failed"]] == [("huge", "disk")]


@pytest.mark.parametrize("size", ["8k", "28k", "40k"])
def test_a_ledger_that_could_not_be_made_is_made_later(run, fat, make_slides, small_disk, size):
    slides = make_slides(a="10", b="10")
    out = small_disk(f"size={size}") / "out"
    command = ("batch", fat, slides, "-o", out, "--workers", 1)
    result = run(*command)
    assert result.code == 1
    assert "no space left on the disk" in result.err
    assert "ree some space" in result.err
    small_disk("size=20m")
    result = run(*command)
    assert result.code == 0, result.err


def test_a_ledger_that_grows_beyond_a_limit_ends_the_run_cleanly(fat, make_slides, tmp_path):
    """RLIMIT_FSIZE stands for a quota: it needs no rights."""
    slides = make_slides(**{f"s{number:03d}": "10" for number in range(60)})
    command = [sys.executable, "-m", "gigavim", "batch", fat, slides, "-o", tmp_path / "out"]
    limit = 90_000

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    first = subprocess.run(
        [*map(str, command), "--workers", "1", "-q"], capture_output=True, text=True, check=False,
        preexec_fn=limited,
    )  # fmt: skip
    assert first.returncode == 1
    assert "ledger.sqlite: cannot be written" in first.stderr
    assert "run the same command" in first.stderr
    assert "defect" not in first.stderr
    again = subprocess.run(
        [*map(str, command), "--workers", "2"], capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    assert read_status(tmp_path / "out").counts["done"] == 60


def _refuse(handle, start, size):
    raise OSError(errno.EINVAL, "Invalid argument")


@pytest.mark.parametrize("reserves", [True, False])
def test_room_is_found_out_by_trying(tmp_path, small_disk, monkeypatch, reserves):
    if not reserves:  # as ZFS refuses
        monkeypatch.setattr(os, "posix_fallocate", _refuse)
    assert why_full(tmp_path) is None
    place = small_disk("size=2m")
    assert why_full(place, 1_000_000) is None
    assert "no space left" in str(why_full(place, 3_000_000))
    assert list(place.iterdir()) == []


def test_what_a_full_disk_makes_libraries_say_is_recognised(tmp_path, monkeypatch):
    """GDAL and others hide the system's error: the disk is asked."""
    archive = Archive(tmp_path)
    archive.make()
    notes = running._Notes(running.Batch(1), SimpleNamespace(), archive, SimpleNamespace())
    job = SimpleNamespace(entry=Entry("a", "/a.svs"))
    assert notes.full(job) is None
    monkeypatch.setattr(running, "why_full", lambda folder, size: "the disk quota is used up")
    assert isinstance(notes.full(job), ResourceError)


@pytest.fixture
def killed(tmp_path):
    """A ledger as `kill -9` leaves it: what was written last is in its log only."""
    place = tmp_path / "killed"
    (place / "slides/a").mkdir(parents=True)
    with Ledger(ledger_path(tmp_path, None)) as ledger:
        ledger.begin_run("r", version="1", recipe="{}", command="", rerun="")
        ledger.wait([Entry("a", "/a.svs"), Entry("b", "/b.svs")])
        ledger.running("a", 1)
        for name in ("ledger.sqlite", "ledger.sqlite-wal"):
            shutil.copy(tmp_path / name, place / name)
    with closing(
        sqlite3.connect(f"{(place / 'ledger.sqlite').as_uri()}?immutable=1", uri=True)
    ) as db:
        assert db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
    return place


def test_a_folder_that_cannot_be_written_can_be_looked_at(
    run, killed, fat, make_slides, small_disk
):
    place = small_disk("size=20m")
    shutil.copytree(killed, place / "out")
    small_disk("ro")
    result = run("status", place / "out", "--json")
    assert result.code == 0, result.err
    facts = json.loads(result.out)
    assert facts["waiting"] + facts["running"] == 2
    assert sorted(path.name for path in (place / "out").iterdir()) == [
        "ledger.sqlite", "ledger.sqlite-wal", "slides",
    ]  # fmt: skip
    slides = make_slides(a="10")
    for out in (place / "out", place / "new"):
        result = run("batch", fat, slides, "-o", out, "--workers", 1)
        assert result.code == 1
        assert "not permitted" in result.err
        assert "another run" not in result.err
        assert "another output folder" in result.err


def test_who_may_not_write_may_look(killed, monkeypatch):
    """As on a read-only mount, where this cannot make one: SQLite is refused, and a copy read."""
    from gigavim_pipelines import ledger_files

    real, refused = ledger_files._read_only, []

    def read_only(path):
        if path.parent == killed:
            refused.append(path)
            error = sqlite3.OperationalError("unable to open database file")
            error.sqlite_errorcode = sqlite3.SQLITE_CANTOPEN
            raise error
        return real(path)

    monkeypatch.setattr(ledger_files, "_read_only", read_only)
    rows, runs = read_ledgers(killed)
    assert refused
    assert {row["id"]: row["state"] for row in rows} == {"a": "running", "b": "waiting"}
    assert len(runs) == 1


def test_a_run_that_another_process_is_not_at_is_not_at_work(killed, monkeypatch):
    from gigavim_pipelines import status

    monkeypatch.setattr(status, "at_work", lambda out: None)
    assert read_status(killed).at_work
    monkeypatch.setattr(status.psutil, "pid_exists", lambda pid: False)
    assert not read_status(killed).at_work
    assert read_status(killed).counts["running"] == 0


def test_a_ledger_that_is_no_file_is_refused(tmp_path):
    os.mkfifo(ledger_path(tmp_path, None))
    with pytest.raises(OutputError, match="no regular file"):
        Ledger(ledger_path(tmp_path, None))
    assert read_ledgers(tmp_path) == ([], [])
