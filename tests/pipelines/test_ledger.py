import sqlite3
from contextlib import closing

import pytest

from gigavim.errors import OutputError
from gigavim_pipelines.entries import Entry
from gigavim_pipelines.failures import Failure
from gigavim_pipelines.ledger import Ledger, read_ledgers
from gigavim_pipelines.ledger_files import ledger_path
from gigavim_pipelines.record import Output, Record
from gigavim_pipelines.status import read_status, write_failed


def record(slide_id, started=100.0):
    return Record(
        id=slide_id, slide=f"/{slide_id}.svs", recipe="r" * 64, input="i" * 64, stamp="s",
        size_bytes=1, outputs={"text": Output(f"{slide_id}.txt", 1, "0" * 64)}, started=started,
        seconds=2.0, peak_bytes=7, worker="w", token="t",
    )  # fmt: skip


def begin(ledger, run="run"):
    ledger.begin_run(run, version="1", recipe="{}", command="gigavim", rerun="gigavim again")


@pytest.fixture
def out(tmp_path):
    """A ledger of four slides: one of each state."""
    with Ledger(ledger_path(tmp_path, None)) as ledger:
        begin(ledger)
        ledger.wait(Entry(name, f"/{name}.svs", 0.25) for name in "abcd")
        for name in "abc":
            ledger.running(name, 1)
        ledger.done(record("a"), 1)
        ledger.tried("b", 1, Failure("I/O", "no"), "w", last=False)
        ledger.tried("b", 2, Failure("crash", "boom"), "w", last=True)
    (tmp_path / "slides/a").mkdir(parents=True)
    return tmp_path


def test_status_tells_states_and_reasons(out):
    with Ledger(ledger_path(out, None)):
        status = read_status(out)
    assert status.at_work
    assert status.counts == {"waiting": 1, "running": 1, "done": 1, "failed": 1, "removed": 0}
    assert status.reasons == {"crash": 1}
    assert [row["id"] for row in status.running] == ["c"]
    assert status.failed[0]["advice"]
    assert status.peak_bytes == 7
    assert status.rerun == "gigavim again"


def test_what_a_killed_run_had_begun_is_not_running(out):
    status = read_status(out)
    assert not status.at_work
    assert status.counts == {"waiting": 2, "running": 0, "done": 1, "failed": 1, "removed": 0}
    assert status.seconds_left is None


def test_failed_slides_become_a_manifest(out):
    from gigavim_pipelines.manifest import read_manifest

    assert read_manifest(write_failed(out)) == [Entry("b", "/b.svs", 0.25)]
    with Ledger(ledger_path(out, None)) as ledger:
        ledger.done(record("b"), 1)
    assert write_failed(out) is None
    assert not (out / "failed.csv").exists()


def test_what_ran_when_a_run_was_killed_waits_and_is_remembered(out):
    with Ledger(ledger_path(out, None)) as ledger:
        begin(ledger, "next")
        assert read_status(out).counts["running"] == 0
        ledger.wait([Entry("b", "/b.svs"), Entry("c", "/c.svs"), Entry("e", "/e.svs")])
        assert ledger.begun() == {"b": 1, "c": 1}
        ledger.done(record("c"), 1)
        assert ledger.begun() == {"b": 1}


def test_records_that_are_found_are_told_once(out):
    with Ledger(ledger_path(out, None)) as ledger:
        ledger.found([record("a"), record("d")])
        ledger.found([record("a"), record("d")])
    with closing(sqlite3.connect(ledger_path(out, None))) as db:
        found = db.execute("SELECT id FROM attempts WHERE outcome = 'found'").fetchall()
    assert found == [("d",)]


def test_shards_have_ledgers_of_their_own_and_the_newest_word_counts(out):
    with Ledger(ledger_path(out, (2, 12))) as ledger:
        assert ledger.path.name == "ledger-02-of-12.sqlite"
        begin(ledger, "shard")
        ledger.wait([Entry("a", "/a.svs"), Entry("d", "/d.svs")])
        ledger.done(record("d", started=200.0), 1)
    (out / "slides/d").mkdir()
    slides, runs = read_ledgers(out)
    states = {row["id"]: row["state"] for row in slides}
    assert states == {"a": "done", "b": "failed", "c": "running", "d": "done"}
    assert [run["run"] for run in runs] == ["run", "shard"]


def test_one_writer_at_a_time(out):
    with Ledger(ledger_path(out, None)):
        with pytest.raises(OutputError, match="another run"):
            Ledger(ledger_path(out, None))
        Ledger(ledger_path(out, (1, 2))).__exit__(None, None, None)
    Ledger(ledger_path(out, None)).__exit__(None, None, None)


def test_a_damaged_or_foreign_ledger_says_what_to_do(tmp_path):
    path = ledger_path(tmp_path, None)
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(OutputError, match="records"):
        Ledger(path)
    with pytest.raises(OutputError, match="ledger"):
        read_status(tmp_path)
    path.unlink()
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE slides (id TEXT)")
    for use in (Ledger, lambda path: read_status(path.parent)):
        with pytest.raises(OutputError, match="another version"):
            use(path)


def test_ten_thousand_slides_stay_under_ten_megabytes(tmp_path):
    path = ledger_path(tmp_path, None)
    with Ledger(path) as ledger:
        begin(ledger)
        ledger.wait(
            Entry(f"slide{n:06d}", f"/data/archive/slide{n:06d}.svs") for n in range(10_000)
        )
        for number in range(10_000):
            ledger.running(f"slide{number:06d}", 1)
            ledger.done(record(f"slide{number:06d}"), 1)
    assert path.stat().st_size < 10e6
