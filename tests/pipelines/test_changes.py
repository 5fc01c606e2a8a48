"""What becomes of results when the archive, the results or the recipe change under them."""

import csv
import json
import os
import shutil
import sqlite3
from contextlib import closing

import pytest


def state(run, out="out"):
    """Slides by state, of those that are in any."""
    facts = json.loads(run("status", out, "--json").out)
    names = ("waiting", "running", "done", "failed", "removed")
    return {name: facts[name] for name in names if facts[name]}


def index(path):
    with (path / "index.csv").open() as file:
        return {row["id"]: row for row in csv.DictReader(file)}


def test_a_second_slide_of_a_name_leaves_the_first_alone(run, faulty, make_slides, tmp_path):
    make_slides("slides", x="fine")
    make_slides("slides/a", one="fine a")
    command = ("batch", faulty, "slides", "-o", "out", "--workers", 1)
    assert run(*command).code == 0
    make_slides("slides/b", one="fine b")
    assert "1 to do, 2 done before" in run(*command).err
    assert state(run) == {"done": 3}
    assert list(index(tmp_path / "out")) == ["b__one", "one", "x"]
    # Also where the ledger is lost, for the records tell of it.
    for file in (tmp_path / "out").glob("ledger.sqlite*"):
        file.unlink()
    assert "0 to do, 3 done before" in run(*command).err
    assert state(run) == {"done": 3}


def test_slides_that_are_removed_are_done_no_more(run, faulty, make_slides, tmp_path):
    slides = make_slides(a="fine", b="fine", c="unwell", d="unwell")
    command = ("batch", faulty, "slides", "-o", "out", "--workers", 1)
    assert run(*command).code == 3
    (slides / "a.svs").unlink()
    (slides / "c.svs").unlink()
    result = run(*command)
    assert "1 no longer in the archive" in result.err
    assert state(run) == {"done": 1, "failed": 1, "removed": 1}
    assert "no longer in their archive" in run("status", "out").out
    # The results are there, and are told of as what they are.
    rows = index(tmp_path / "out")
    assert {name: row["state"] for name, row in rows.items()} == {
        "a": "removed", "b": "done", "d": "failed",
    }  # fmt: skip
    assert (tmp_path / "out" / rows["a"]["folder"] / "a.txt").exists()
    # Part of an archive is no archive of which the rest is gone.
    (slides / "d.svs").write_text("fine")
    assert run("batch", faulty, "out/failed.csv", "-o", "out", "--workers", 1).code == 0
    assert state(run) == {"done": 2, "removed": 1}
    make_slides(a="fine")
    assert "0 to do, 3 done before" in run(*command).err
    assert state(run) == {"done": 3}


def test_removed_slides_of_shards_are_told_by_the_next_run(run, faulty, make_slides):
    slides = make_slides(a="fine", b="fine", c="fine", d="fine")
    command = ("batch", faulty, "slides", "-o", "out", "--workers", 1)
    for part in ("1/2", "2/2"):
        assert run(*command, "--shard", part).code == 0
    (slides / "b.svs").unlink()
    assert run(*command, "--shard", "1/2").code == 0
    assert state(run) == {"done": 3, "removed": 1}


def test_deleted_results_are_waited_for(run, faulty, make_slides, tmp_path):
    make_slides(a="fine", b="fine")
    command = ("batch", faulty, "slides", "-o", "out", "--workers", 1)
    assert run(*command).code == 0
    shutil.rmtree(tmp_path / "out/slides/a")
    assert state(run) == {"waiting": 1, "done": 1}
    assert run("status", "out", "--report").code == 0
    assert index(tmp_path / "out")["a"]["state"] == "waiting"
    assert "1 to do, 1 done before" in run(*command).err
    assert state(run) == {"done": 2}


@pytest.mark.parametrize("damage", ["cut", "removed", "pipe"])
def test_without_a_good_record_a_slide_is_done_again(run, faulty, make_slides, tmp_path, damage):
    make_slides(a="fine")
    command = ("batch", faulty, "slides", "-o", "out", "--workers", 1)
    assert run(*command).code == 0
    record = tmp_path / "out/slides/a/a.done.json"
    text = record.read_text()
    record.unlink()
    if damage == "cut":
        record.write_text(text[:100])
    elif damage == "pipe":
        os.mkfifo(record)
    (record.parent / "notes").write_text("mine")
    result = run(*command)
    assert result.code == 0, result.err
    what = "missing" if damage == "removed" else "damaged"
    assert f"1 because its record is {what}" in result.err
    names = sorted(path.name for path in record.parent.iterdir())
    assert names == ["a.done.json", "a.txt", "notes"]
    assert json.loads(record.read_text())["id"] == "a"


def test_another_recipe_needs_a_folder_of_its_own(run, faulty, make_slides, tmp_path):
    make_slides(a="fine", b="fine")
    other = tmp_path / "other.toml"
    other.write_text(faulty.read_text())
    command = ("slides", "-o", "out", "--workers", 1)
    assert run("batch", faulty, *command).code == 0
    before = (tmp_path / "out/slides/a/a.done.json").read_text()
    for extra in ([], ["--dry-run"]):
        result = run("batch", other, *command, *extra)
        assert result.code == 1
        assert "'faulty'" in result.err
        assert "'other'" in result.err
        assert "--overwrite" in result.err
    # Nor do the records of a lost ledger let it pass.
    for file in (tmp_path / "out").glob("ledger.sqlite*"):
        file.unlink()
    assert run("batch", other, *command).code == 1
    assert (tmp_path / "out/slides/a/a.done.json").read_text() == before
    # One that made nothing has no claim to the folder.
    bad = ("--overwrite", "--set", "recipe.task=os:getcwd")
    assert run("batch", other, *command, *bad).code == 3
    assert "0 to do, 2 done before" in run("batch", faulty, *command).err
    assert run("batch", other, *command, "--overwrite").code == 0
    assert json.loads((tmp_path / "out/slides/a/a.done.json").read_text())["recipe_name"] == "other"
    # Other settings are no other recipe: what they change is done again.
    changed = run("batch", other, *command, "--set", "tokens.tissue=none")
    assert "2 because the recipe changed" in changed.err


def test_an_id_is_not_given_to_another_slide_unasked(run, faulty, make_slides, tmp_path):
    slides = make_slides(a="fine", b="fine too")
    manifest = slides / "list.csv"
    command = ("batch", faulty, manifest, "-o", "out", "--workers", 1)
    manifest.write_text("slide,id\na.svs,case\n")
    assert run(*command).code == 0
    manifest.write_text("slide,id\nb.svs,case\n")
    result = run(*command)
    assert result.code == 1
    assert "a.svs" in result.err
    assert "b.svs" in result.err
    (slides / "a.svs").unlink()
    assert "1 because the slide changed" in run(*command).err


def test_a_label_that_changed_is_in_the_index_without_work(run, faulty, make_slides, tmp_path):
    manifest = make_slides(a="fine") / "list.csv"
    command = ("batch", faulty, manifest, "-o", "out", "--workers", 1)
    for label in ("benign", "tumour"):
        manifest.write_text(f"slide,label\na.svs,{label}\n")
        assert run(*command).code == 0
        assert index(tmp_path / "out")["a"]["label"] == label
    with closing(sqlite3.connect(tmp_path / "out/ledger.sqlite")) as db:
        assert db.execute("SELECT count(*) FROM attempts").fetchone() == (1,)


def test_the_rerun_command_has_every_option_that_was_given(run, faulty, make_slides, tmp_path):
    make_slides(a="unwell", z="fine")
    options = (
        "--workers", "1", "--timeout", "40s", "--tries", "1", "--worker-memory", "2GB",
        "--recycle-after", "7", "--set", "tokens.tissue=none", "--set", "batch.retry_wait=0.2s",
        "--device", "cpu",
    )  # fmt: skip
    result = run("batch", faulty, "slides", "-o", "out", *options, "--wsi-ext", ".svs", "--verify")
    assert result.code == 3
    words = result.err.strip().splitlines()[-1].split()
    head = ["gigavim", "batch", str(faulty), "out/failed.csv", "-o", "out"]
    assert words[: len(head)] == head
    assert sorted(words[len(head) :]) == sorted(options)
    assert "1 of 2 slides failed" in result.err
    assert "1 slide done in" in result.err
    (tmp_path / "slides/a.svs").write_text("fine")
    assert run(*words[1:]).code == 0


def test_what_is_wrong_with_a_slides_files_is_said(run, faulty, make_slides, tmp_path):
    slides = make_slides(a="fine", b="fine", c="fine")
    os.mkfifo(slides / "pipe.svs")
    rows = ["a.svs,", "gone.svs,", "pipe.svs,", "b.svs,nowhere.geojson", "c.svs,pipe.svs"]
    (slides / "list.csv").write_text("\n".join(["slide,mask", *rows]))
    result = run("batch", faulty, slides / "list.csv", "-o", "out", "--workers", 1, "--json")
    assert result.code == 3
    told = {item["id"]: item["error"] for item in json.loads(result.out)["failed"]}
    assert told.keys() == {"b", "c", "gone", "pipe"}
    assert "gone.svs: does not exist" in told["gone"]
    assert "pipe.svs: is no regular file" in told["pipe"]
    assert "mask" in told["b"]
    assert "nowhere.geojson: does not exist" in told["b"]
    assert "mask" in told["c"]
    os.mkfifo(tmp_path / "pipe.toml")
    result = run("batch", "pipe.toml", slides, "-o", "other")
    assert result.code == 1
    assert "pipe.toml: is no regular file" in result.err


def test_whatever_a_task_of_ones_own_does_costs_its_slide_only(run, faulty, make_slides, tmp_path):
    words = ("exit", "interrupt", "nothing", "outside")
    make_slides(fine="fine", odd="odd", **{word: word for word in words})
    result = run("batch", faulty, "slides", "-o", "out", "--workers", 1, "--json")
    assert result.code == 3, result.err
    told = json.loads(result.out)
    assert {item["id"]: item["reason"] for item in told["failed"]} == dict.fromkeys(words, "defect")
    errors = {item["id"]: item["error"] for item in told["failed"]}
    assert "SystemExit" in errors["exit"]
    assert "'x'" in errors["outside"]
    rows = index(tmp_path / "out")
    assert rows["odd"]["state"] == "done"
    assert rows["odd"]["fraction a"] == rows["odd"]["width_px"] == rows["odd"]["tokens"] == ""
    assert "odd" in (tmp_path / "out/report.html").read_text()
    assert run("status", "out").code == 3
