"""`gigavim batch` and `gigavim status` as a user meets them."""

import csv
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import dask
import distributed  # noqa: F401  # its defaults have to be there before one is changed for a while
import pytest

from gigavim_pipelines.fingerprints import checksum


def attempts(out):
    """(id, attempt, outcome) of every attempt in the ledger."""
    with closing(sqlite3.connect(out / "ledger.sqlite")) as db:
        return db.execute("SELECT id, attempt, outcome FROM attempts ORDER BY ended").fetchall()


def results(out):
    return {path.name: checksum(path) for path in out.glob("slides/*/*.txt")}


def test_each_slide_gets_a_folder_with_its_results_and_record(run, faulty, make_slides, tmp_path):
    result = run("batch", faulty, make_slides(a="fine", b="fine"), "-o", "out", "--workers", 1)
    assert result.code == 0, result.err
    assert "2 slides done" in result.err
    for name in "ab":
        folder = tmp_path / "out/slides" / name
        assert sorted(path.name for path in folder.iterdir()) == [
            f"{name}.done.json",
            f"{name}.txt",
        ]
        record = json.loads((folder / f"{name}.done.json").read_text())
        output = record["outputs"]["text"]
        assert output["sha256"] == checksum(folder / output["path"])
        assert record["peak_bytes"] > 1e6
    assert not (tmp_path / "out/failed.csv").exists()


def test_what_is_done_is_not_done_again_and_what_changed_is(run, faulty, make_slides, tmp_path):
    slides = make_slides(a="fine", b="fine", c="fine", d="fine")
    command = ("batch", faulty, slides, "-o", "out", "--workers", 1)
    assert run(*command).code == 0
    out = tmp_path / "out"
    assert run(*command).code == 0
    assert len(attempts(out)) == 4

    (slides / "a.svs").write_text("other words")
    (out / "slides/b/b.txt").write_text("damage")
    (out / "slides/c/c.txt").unlink()
    (out / "slides/a/notes.txt").write_text("the user's own")
    os.utime(slides / "d.svs")  # touched, not changed
    result = run(*command)
    assert result.code == 0
    assert "3 to do, 1 done before" in result.err
    assert "1 because the slide changed, 2 because its results were damaged" in result.err
    assert [name for name, _, outcome in attempts(out)[4:] if outcome == "done"] == ["a", "b", "c"]
    assert (out / "slides/a/notes.txt").read_text() == "the user's own"
    assert (out / "slides/b/b.txt").read_text().startswith("fine")

    command += ("--set", "tokens.tissue=none")
    assert "4 because the recipe changed" in run(*command).err
    # Where and how fast is not what.
    assert "0 to do" in run(*command, "--device", "cpu").err
    assert "4 because --overwrite" in run(*command, "--overwrite").err


def test_a_lost_ledger_is_made_good_from_the_records(run, faulty, make_slides, tmp_path):
    command = ("batch", faulty, make_slides(a="fine", b="fine"), "-o", "out", "--workers", 1)
    assert run(*command).code == 0
    for file in (tmp_path / "out").glob("ledger.sqlite*"):
        file.unlink()
    assert "0 to do, 2 done before" in run(*command).err
    assert {outcome for _, _, outcome in attempts(tmp_path / "out")} == {"found"}
    assert json.loads(run("status", "out", "--json").out)["done"] == 2


def test_failures_cost_only_their_slides_and_are_told_last(run, faulty, make_slides, tmp_path):
    slides = make_slides(
        a="fine", crash="segfault", hung="hang", greedy="hoard", io="unwell", bug="defect",
        later=f"unwell-once {tmp_path / 'marker'}", z="fine",
    )  # fmt: skip
    result = run(
        "batch", faulty, slides, "-o", "out", "--workers", 2, "--timeout", "3s",
        "--worker-memory", "400MB", "--json",
    )  # fmt: skip
    assert result.code == 3
    told = json.loads(result.out.splitlines()[-1])
    assert told["done"] == 3
    reasons = {slide["id"]: slide["reason"] for slide in told["failed"]}
    assert reasons == {
        "crash": "crash", "hung": "timeout", "greedy": "memory", "io": "I/O", "bug": "defect",
    }  # fmt: skip
    errors = {slide["id"]: slide["error"] for slide in told["failed"]}
    assert "and may hold 400 MB" in errors["greedy"]
    tried = [name for name, _, outcome in attempts(tmp_path / "out") if outcome != "done"]
    assert {name: tried.count(name) for name in tried} == {
        "crash": 2, "hung": 2, "greedy": 2, "io": 2, "bug": 1, "later": 1,
    }  # fmt: skip
    assert set(results(tmp_path / "out")) == {"a.txt", "later.txt", "z.txt"}
    assert {path.name for path in (tmp_path / "out/slides").iterdir()} == {"a", "later", "z"}
    assert "Segmentation fault" in (tmp_path / "out/logs/crash.log").read_text()
    assert "faulty.py" in (tmp_path / "out/logs/hung.log").read_text()

    last = result.err.strip().splitlines()
    assert last[-1].strip().startswith(f"gigavim batch {faulty} out/failed.csv -o out")
    assert "5 of 8 slides failed:" in last
    with (tmp_path / "out/failed.csv").open() as file:
        failed = list(csv.DictReader(file))
    assert {row["id"]: row["reason"] for row in failed} == reasons

    # Mended, they run again under the same names from the list of what failed.
    for name in reasons:
        (slides / f"{name}.svs").write_text("fine")
    again = run("batch", faulty, tmp_path / "out/failed.csv", "-o", "out", "--workers", 1)
    assert again.code == 0
    status = run("status", "out", "--json")
    assert status.code == 0
    assert json.loads(status.out)["done"] == 8
    assert not (tmp_path / "out/failed.csv").exists()


def test_manifest_says_mpp_mask_and_label(run, faulty, make_slides, tmp_path):
    slides = make_slides(a="fine", b="fine")
    (slides / "list.csv").write_text(
        "slide,id,mpp,mask,label\na.svs,first,0.25,b.svs,tumour\nb.svs,,,,\n"
    )
    result = run("batch", faulty, slides / "list.csv", "-o", "out", "--workers", 1)
    assert result.code == 0, result.err
    text = (tmp_path / "out/slides/first/first.txt").read_text()
    assert text == f"fine 0.25 {slides / 'b.svs'}"
    assert (tmp_path / "out/slides/b/b.txt").read_text() == "fine 0.0 auto"
    assert (
        json.loads((tmp_path / "out/slides/first/first.done.json").read_text())["label"] == "tumour"
    )


def test_shards_share_the_work_and_the_folder(run, faulty, make_slides, tmp_path, monkeypatch):
    slides = make_slides(**{f"s{number}": "fine" for number in range(5)})
    command = ("batch", faulty, slides, "-o", "out", "--workers", 1)
    assert "2 to do" in run(*command, "--shard", "2/2").err
    for name, value in {"ID": 10, "MIN": 10, "MAX": 20, "STEP": 10, "COUNT": 2}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    first = run(*command)
    assert "part 1 of 2, as the Slurm array says" in first.err
    assert "3 to do" in first.err
    assert json.loads(run("status", "out", "--json").out)["done"] == 5
    assert "0 to do, 5 done before" in run(*command, "--shard", "1/1").err
    assert run(*command, "--shard", "0/2").code == 2


@pytest.mark.parametrize(
    "array",
    [
        {"ID": 9, "MIN": 1, "MAX": 9, "STEP": 1, "COUNT": 3},
        {"ID": 1, "MIN": 1, "MAX": 9, "STEP": 1, "COUNT": 3},
        {"ID": 3},
    ],
    ids=str,
)
def test_an_array_with_gaps_runs_nothing(run, faulty, make_slides, monkeypatch, array):
    slides = make_slides(a="fine")
    for name, value in array.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    result = run("batch", faulty, slides, "-o", "out")
    assert result.code == 2
    assert "--shard I/N" in result.err


def test_links_that_lead_back_are_followed_once(run, faulty, make_slides):
    slides = make_slides(a="fine")
    (slides / "loop").symlink_to(".")
    (slides / "again").symlink_to(slides)
    assert "1 of 1 slide " in run("batch", faulty, slides, "-o", "out", "--dry-run").out


def test_workers_are_replaced_after_some_slides(run, faulty, make_slides, tmp_path):
    names = [f"s{number}" for number in range(8)]
    slides = make_slides(**dict.fromkeys(names, f"slow 0.2 {tmp_path}"))
    # However soon dask would give lost workers up, they come back.
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "10ms"}):
        result = run("batch", faulty, slides, "-o", "out", "--workers", 2, "--recycle-after", 2)
    assert result.code == 0, result.err
    begun = [path.name.split(".") for path in tmp_path.glob("s*.*") if path.suffix[1:].isdigit()]
    assert sorted(name for name, _ in begun) == names
    assert len({pid for _, pid in begun}) > 2
    assert sorted(attempts(tmp_path / "out"))[0][2] == "done"
    assert len(attempts(tmp_path / "out")) == 8


def test_two_runs_at_once_in_one_folder_are_refused(run, faulty, make_slides, tmp_path):
    slides = make_slides(a=f"slow 6 {tmp_path}")
    first = start(tmp_path, "batch", faulty, slides, "-o", "out", "--workers", 1)
    wait_for(tmp_path, "a.*")
    result = run("batch", faulty, slides, "-o", "out")
    assert result.code == 1
    assert "another run is at work there" in result.err
    assert json.loads(run("status", "out", "--json").out)["running"] == 1
    watched = run("status", "out", "--watch", 0.2)
    assert "running  a for" in watched.out
    assert watched.out.count("1   100.0%") > 1
    assert first.wait(60) == 0


def test_a_run_killed_outright_goes_on_where_it_was(run, faulty, make_slides, tmp_path):
    words = {f"s{number}": f"slow 0.3 {tmp_path}" for number in range(6)}
    slides = make_slides(**words)
    process = start(tmp_path, "batch", faulty, slides, "-o", "out", "--workers", 1)
    wait_for(tmp_path, "s3.*")
    process.kill()
    process.wait()
    done = {path.parent.name for path in tmp_path.glob("out/slides/*/*.done.json")}
    assert {"s0", "s1"} <= done < set(words)
    assert run("batch", faulty, slides, "-o", "out", "--workers", 1).code == 0
    assert {path.stem for path in tmp_path.glob("out/slides/*/*.txt")} == set(words)
    assert {path.name for path in (tmp_path / "out/slides").iterdir()} == set(words)
    begun = [path.name.split(".")[0] for path in tmp_path.glob("s*.*") if path.suffix[1:].isdigit()]
    assert all(begun.count(name) == 1 for name in done)


@pytest.mark.slow
def test_killed_at_random_moments_nothing_is_lost_or_done_twice(run, faulty, make_slides, tmp_path):
    words = {f"s{number:02d}": f"slow 0.15 {tmp_path}" for number in range(60)}
    slides = make_slides(**words)
    rng = random.Random(0)
    for _ in range(8):
        process = start(tmp_path, "batch", faulty, slides, "-o", "out", "--workers", 2)
        time.sleep(rng.uniform(1, 4))
        # Sometimes all of it, sometimes the client alone: its workers see that it is gone.
        if rng.random() < 0.5:
            os.killpg(process.pid, 9)
        process.kill()
        process.wait()
    assert run("batch", faulty, slides, "-o", "out", "--workers", 2).code == 0
    assert set(results(tmp_path / "out")) == {f"{name}.txt" for name in words}
    assert len(set(results(tmp_path / "out").values())) == 1
    assert {path.name for path in (tmp_path / "out/slides").iterdir()} == set(words)
    outcomes = [name for name, _, outcome in attempts(tmp_path / "out") if outcome != "killed"]
    assert sorted(outcomes) == sorted(words)
    # A slide leaves a marker each time that it is begun: none after it was done.
    for name in words:
        path = tmp_path / f"out/slides/{name}/{name}.done.json"
        record = json.loads(path.read_text())
        begun = [marker.stat().st_mtime for marker in tmp_path.glob(f"{name}.*")]
        assert max(begun) < record["started"] + record["seconds"]


def test_what_did_not_end_comes_last_the_next_time(run, faulty, make_slides, tmp_path):
    slides = make_slides(a="unwell", b="fine")
    command = ("batch", faulty, slides, "-o", "out", "--workers", 1)
    assert run(*command).code == 3
    make_slides(c="fine", a="fine")
    result = run(*command)
    assert result.code == 0
    assert result.err.index("c: done") < result.err.index("a: done")


def test_interrupted_it_leaves_nothing_half_done(faulty, make_slides, tmp_path):
    slides = make_slides(a=f"slow 60 {tmp_path}", b="fine")
    process = start(tmp_path, "batch", faulty, slides, "-o", "out", "--workers", 1)
    wait_for(tmp_path, "a.*")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130
    assert list((tmp_path / "out/slides").iterdir()) == []


def test_a_worker_killed_costs_an_attempt(run, faulty, make_slides, tmp_path):
    slides = make_slides(a=f"slow 2 {tmp_path}", b="fine")
    process = start(tmp_path, "batch", faulty, slides, "-o", "out", "--workers", 2)
    (marker,) = wait_for(tmp_path, "a.*")
    os.kill(int(marker.suffix[1:]), 9)
    assert process.wait(60) == 0
    assert [outcome for name, _, outcome in attempts(tmp_path / "out") if name == "a"] == [
        "killed", "done",
    ]  # fmt: skip


def start(folder: Path, *arguments: object) -> subprocess.Popen:
    """A run of the command line in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "gigavim", *map(str, arguments)], cwd=folder,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def wait_for(folder: Path, pattern: str, seconds: float = 30) -> list[Path]:
    """The markers that a slow slide leaves when it is begun."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = [path for path in folder.glob(pattern) if path.suffix[1:].isdigit()]
        if found:
            return found
        time.sleep(0.02)
    pytest.fail(f"{pattern} was not begun within {seconds} s")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, ["RECIPE"]),
        (["segmnt", "."], 2, ["segmnt", "segment"]),
        (["qc.toml", "."], 1, ["qc.toml", "no such settings file"]),
        (["segment", "nowhere"], 1, ["nowhere", "does not exist"]),
        (["segment", "empty"], 1, ["empty", "no slides found"]),
        (["segment", "x.svs", "--set", "tokens.tisue=none"], 2, ["tokens.tisue", "tokens.tissue"]),
        (["segment", "x.svs", "--set", "tissue=none"], 2, ["section.key=value"]),
        (["segment", "x.svs", "--set", "tokens.tissue=no.png"], 2, ["tokens.tissue", "no.png"]),
        (["segment", "x.svs", "--set", "compute.max_memory=x"], 2, ["compute.max_memory"]),
        (["segment", "x.svs", "--timeout", "5parsecs"], 2, ["--timeout", "5parsecs", "90s"]),
        (["segment", "x.svs", "--worker-memory", "lots"], 2, ["--worker-memory", "lots"]),
        (["segment", "x.svs", "--dashboard", "x:y"], 2, ["--dashboard", "x:y", ":8787"]),
        (["segment", "x.svs", "--dashboard", ":99999"], 2, ["--dashboard", ":99999"]),
        (["segment", "x.svs", "--scheduler", "x:y"], 2, ["--scheduler", "tcp://host:8786"]),
        (["segment", "x.svs", "--shard", "3"], 2, ["--shard", "3/10"]),
        (["segment", "xyz://bucket/scans"], 1, ["xyz://bucket/scans", "xyz", "s3"]),
        (["segment", "x.svs", "--scheduler", "tcp://127.0.0.1:9"], 1, ["127.0.0.1:9", "scheduler"]),
        (["segment", "x.svs", "--model", "no-such"], 1, ["no-such"]),
        (["segment", "x.svs", "-o", "x.svs"], 1, ["x.svs"]),
        (["segment", "x.svs", "-o", "s3://bucket/out"], 2, ["local folder"]),
        (["segment", "x.svs", "-o", ""], 2, ["-o", "variable"]),
        (["segment", "x.svs", ""], 2, ["ARCHIVE", "variable"]),
        (["segment", "twice.csv"], 1, ["twice.csv, row 3", "row 2"]),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(run, tmp_path, arguments, code, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.svs").write_text("fine")
    (tmp_path / "twice.csv").write_text("slide,id\nx.svs,one\nx.svs,two\n")
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        result = run("batch", *arguments)
    assert result.code == code
    assert all(word in result.err for word in words), result.err
    assert "Traceback" not in result.err
    if "--scheduler" not in arguments:
        assert not (tmp_path / "gigavim_out").exists()


def test_status_of_a_folder_without_a_run(run, tmp_path):
    result = run("status", tmp_path)
    assert result.code == 1
    assert "no batch ran there" in result.err


def test_dry_run_says_why_and_writes_nothing(run, faulty, make_slides, tmp_path):
    result = run("batch", faulty, make_slides(a="fine"), "-o", "out", "--dry-run")
    assert result.code == 0
    assert "a\t" in result.out
    assert "1 of 1 slide would be processed" in result.out
    assert not (tmp_path / "out").exists()


def test_list_names_the_shipped_recipes(run):
    from gigavim_pipelines.recipe import list_recipes

    result = run("batch", "--list")
    assert result.code == 0
    assert [line.split()[0] for line in result.out.splitlines()] == list(list_recipes())
