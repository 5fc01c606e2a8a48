"""Folders appear whole, and nothing that is not ours is touched."""

import json
import os
from dataclasses import replace

import pytest

from gigavim_pipelines.fingerprints import checksum
from gigavim_pipelines.folders import Archive
from gigavim_pipelines.record import Output, Record, record_name


@pytest.fixture
def archive(tmp_path):
    archive = Archive(tmp_path / "out")
    archive.make()
    return archive


def record(slide_id="a", **outputs):
    return Record(
        id=slide_id, slide="/a.svs", recipe="r", input="i", stamp="s", size_bytes=1,
        outputs=outputs, started=0.0, seconds=1.0, peak_bytes=1, worker="w", token="t",
    )  # fmt: skip


def finish(archive, text="one", *, name="a.txt", overwrite=False):
    with archive.staging("a", overwrite=overwrite) as folder:
        (folder / name).write_text(text)
        made = record(text=Output(name, len(text), checksum(folder / name)))
        made.write(folder / record_name("a"))
    return made


def tree(archive):
    return sorted(
        path.relative_to(archive.slides).as_posix()
        for path in archive.slides.rglob("*") if path.is_file()
    )  # fmt: skip


def test_a_record_reads_back(archive):
    assert archive.record("a") is None
    made = finish(archive)
    assert archive.record("a") == made
    (archive.slides / "a" / record_name("a")).write_text('{"format": "gigavim-batch/9"}')
    assert archive.record("a") is None


def test_a_failing_attempt_leaves_the_good_result(archive):
    finish(archive)
    with pytest.raises(FileNotFoundError), archive.staging("a", overwrite=True) as folder:
        (folder / "a.txt").rename(folder / "nowhere/a.txt")
    assert tree(archive) == ["a/a.done.json", "a/a.txt"]
    assert (archive.slides / "a/a.txt").read_text() == "one"


def test_a_new_result_replaces_the_old_and_keeps_what_is_not_ours(archive):
    finish(archive, name="old.txt")
    (archive.slides / "a/notes").mkdir()
    (archive.slides / "a/notes/mine.txt").write_text("mine")
    finish(archive, "two")
    assert tree(archive) == ["a/a.done.json", "a/a.txt", "a/notes/mine.txt"]
    assert (archive.slides / "a/a.txt").read_text() == "two"


def test_a_file_of_the_users_with_a_results_name_is_kept_beside_it(archive):
    (archive.slides / "a").mkdir()
    (archive.slides / "a/a.txt").write_text("mine")
    (archive.slides / "a/a.txt.old").write_text("mine too")
    assert archive.without_record("a") == "its record is missing"
    finish(archive)
    assert tree(archive) == ["a/a.done.json", "a/a.txt", "a/a.txt.old", "a/a.txt.old2"]
    assert (archive.slides / "a/a.txt").read_text() == "one"
    assert (archive.slides / "a/a.txt.old").read_text() == "mine too"
    assert (archive.slides / "a/a.txt.old2").read_text() == "mine"
    finish(archive, overwrite=True)
    assert tree(archive) == ["a/a.done.json", "a/a.txt", "a/a.txt.old", "a/a.txt.old2"]


@pytest.mark.parametrize(
    "change",
    [
        {"started": "yesterday"}, {"outputs": []}, {"outputs": {"text": {"path": "a.txt"}}},
        {"outputs": {"text": {"path": 5, "size_bytes": 3, "sha256": "x"}}}, {"summary": []},
        {"outputs": {"text": {"path": "../x", "size_bytes": 3, "sha256": "x"}}}, {"id": "b"},
        {"outputs": {"text": {"path": "/etc/passwd", "size_bytes": 3, "sha256": "x"}}},
        {"outputs": {"text": {"path": "", "size_bytes": 3, "sha256": "x"}}}, {"seconds": None},
        {"format": "gigavim-batch/9"},
    ],
    ids=str,
)  # fmt: skip
def test_a_record_that_is_none_is_not_believed(archive, change):
    finish(archive)
    path = archive.slides / "a" / record_name("a")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert archive.record("a") is None
    finish(archive, "two")
    assert tree(archive) == ["a/a.done.json", "a/a.txt"]
    assert archive.record("a") is not None


@pytest.mark.parametrize("damage", ["", "{", '{"format": "gigavim-batch/1"}', None])
def test_without_a_good_record_only_a_slides_own_results_are_replaced(archive, damage):
    finish(archive, name="old.txt")
    (archive.slides / "a/notes").write_text("mine")
    path = archive.slides / "a" / record_name("a")
    path.unlink()
    if damage is None:
        os.mkfifo(path)
    else:
        path.write_text(damage)
    assert archive.record("a") is None
    assert archive.without_record("a") == "its record is damaged"
    with archive.staging("a", overwrite=False, own=["old.txt"]) as folder:
        (folder / "a.txt").write_text("two")
        record().write(folder / record_name("a"))
    assert tree(archive) == ["a/a.done.json", "a/a.txt", "a/notes"]
    assert archive.without_record("b") == ""


def test_recovery_after_a_kill_at_any_moment(archive):
    made = finish(archive)
    # Killed while it worked, and another slide's run is still at it.
    (archive.slides / ".partial-01234567-a").mkdir()
    (archive.slides / ".partial-01234567-a/half").write_text("x")
    (archive.slides / ".partial-01234567-b").mkdir()
    archive.recover(["a"])
    assert sorted(path.name for path in archive.slides.iterdir()) == [".partial-01234567-b", "a"]
    # Killed between setting the old aside and placing the new.
    (archive.slides / "a").rename(archive.slides / ".previous-01234567-a")
    archive.recover(["a"])
    assert archive.record("a") == made
    # Killed after placing the new, before the old was cleared away.
    (archive.slides / "a").rename(archive.slides / ".previous-01234567-a")
    (archive.slides / ".previous-01234567-a/mine.txt").write_text("mine")
    finish(archive, "two")
    archive.recover(["a"])
    assert tree(archive) == ["a/a.done.json", "a/a.txt", "a/mine.txt"]
    assert (archive.slides / "a/a.txt").read_text() == "two"


def test_a_record_that_lies_cannot_reach_outside(archive, tmp_path):
    (tmp_path / "precious").write_text("x")
    made = finish(archive)
    lying = replace(made, outputs={"text": Output("../../../precious", 1, "0")})
    lying.write(archive.slides / "a" / record_name("a"))
    finish(archive, "two", overwrite=True)
    assert (tmp_path / "precious").exists()
