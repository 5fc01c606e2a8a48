"""The ledger: the state of every slide of a run, in one SQLite file that any tool can query.

Written by one process at a time, in WAL mode, so that others can read meanwhile. Of a run in shards
each has its own file.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gigavim.errors import OutputError
from gigavim.names import as_text
from gigavim_pipelines.entries import Entry
from gigavim_pipelines.failures import Failure
from gigavim_pipelines.folders import Archive
from gigavim_pipelines.ledger_files import (
    BusyError,
    claim,
    explained,
    has_tables,
    ledger_paths,
    open_for_reading,
    open_for_writing,
)
from gigavim_pipelines.record import Record

LONGEST_MESSAGE = 500


class Ledger:
    """A ledger, open for writing; nobody else writes it meanwhile.

    Raises:
        OutputError: another run writes it, or it cannot be written; so does every method.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = claim(path)
        try:
            self._db = open_for_writing(path)
        except OutputError:
            self._lock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._db.close()
        self._lock.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Make the changes of a block together."""
        with explained(self.path):
            self._db.execute("BEGIN")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                # A full disk makes SQLite roll back by itself.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def begin_run(self, run: str, *, version: str, recipe: str, command: str, rerun: str) -> None:
        """Note a run, and that nothing is running from before."""
        with self.transaction():
            self._db.execute(
                "INSERT INTO runs VALUES (?, ?, NULL, ?, ?, ?, ?, ?, ?)",
                (run, time.time(), socket.gethostname(), os.getpid(), version, recipe, command,
                 rerun),
            )  # fmt: skip
            self._db.execute("UPDATE slides SET state = 'waiting' WHERE state = 'running'")

    def end_run(self, run: str) -> None:
        """Note that a run ended by itself."""
        with self.transaction():
            self._db.execute("UPDATE runs SET ended = ? WHERE run = ?", (time.time(), run))

    def begun(self) -> dict[str, int]:
        """How often each slide that is not done was begun, in this run and those before."""
        query = "SELECT id, begun FROM slides WHERE begun > 0 AND state NOT IN ('done', 'removed')"
        with explained(self.path):
            return dict(self._db.execute(query).fetchall())

    def wait(self, entries: Iterable[Entry]) -> None:
        """Note slides to be processed; of earlier runs `begun` and `outputs` stay known."""
        now = time.time()
        with self.transaction():
            self._db.executemany(
                "INSERT OR REPLACE INTO slides"
                " (id, slide, mpp, mask, label, state, noted, begun, outputs)"
                " VALUES (?1, ?2, ?3, ?4, ?5, 'waiting', ?6,"
                " ifnull((SELECT begun FROM slides WHERE id = ?1 AND state != 'done'), 0),"
                " (SELECT outputs FROM slides WHERE id = ?1))",
                (
                    (item.id, as_text(item.slide), item.mpp, item.mask, item.label, now)
                    for item in entries
                ),
            )

    def running(self, slide_id: str, attempt: int) -> None:
        """Note that a slide was handed to the workers."""
        now = time.time()
        with self.transaction():
            self._db.execute(
                "UPDATE slides SET state = 'running', attempts = ?, begun = begun + 1,"
                " started = ?, noted = ? WHERE id = ?",
                (attempt, now, now, slide_id),
            )

    def done(self, record: Record, attempt: int) -> None:
        """Note a slide that was finished just now."""
        with self.transaction():
            self._write(record, attempt)
            self._attempt(record.id, attempt, "done", record.seconds, record.worker)

    def found(self, records: Iterable[Record]) -> None:
        """Note slides whose records were found, finished by runs before."""
        with self.transaction():
            for record in records:
                known = self._db.execute(
                    "SELECT state, started, slide, label FROM slides WHERE id = ?", (record.id,)
                ).fetchone()
                if known != ("done", record.started, record.slide, record.label):
                    self._write(record, 0)
                    if known is None or known[:2] != ("done", record.started):
                        self._attempt(record.id, 0, "found", record.seconds, record.worker)

    def removed(self, rows: Iterable[dict[str, Any]]) -> None:
        """Note slides, by their rows of any ledger, that their archive no longer has."""
        now = time.time()
        with self.transaction():
            for row in rows:
                changed = row | {"state": "removed", "noted": now}
                self._db.execute(
                    f"INSERT OR REPLACE INTO slides ({', '.join(changed)})"
                    f" VALUES ({', '.join('?' * len(changed))})",
                    tuple(changed.values()),
                )

    def _write(self, record: Record, attempt: int) -> None:
        outputs = {o.path: [o.size_bytes, o.sha256] for o in record.outputs.values()}
        self._db.execute(
            "INSERT OR REPLACE INTO slides (id, slide, label, state, noted, attempts, started,"
            " seconds, peak_bytes, worker, recipe_name, recipe, input, size_bytes, outputs)"
            " VALUES (?, ?, ?, 'done', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                record.id, record.slide, record.label, time.time(), attempt, record.started,
                record.seconds, record.peak_bytes, record.worker, record.recipe_name, record.recipe,
                record.input, record.size_bytes, json.dumps(outputs, separators=(",", ":")),
            ),
        )  # fmt: skip

    def tried(
        self, slide_id: str, attempt: int, failure: Failure, worker: str, *, last: bool
    ) -> None:
        """Note a failed attempt; the slide waits for another, or has failed if it was the last."""
        message, now = failure.message[:LONGEST_MESSAGE], time.time()
        with self.transaction():
            self._db.execute(
                "UPDATE slides SET state = ?, reason = ?, error = ?, advice = ?, worker = ?,"
                " seconds = ? - started, noted = ? WHERE id = ?",
                ("failed" if last else "waiting", failure.reason, message, failure.advice, worker,
                 now, now, slide_id),
            )  # fmt: skip
            self._attempt(slide_id, attempt, failure.reason, None, worker)

    def _attempt(
        self, slide_id: str, attempt: int, outcome: str, seconds: float | None, worker: str
    ) -> None:
        self._db.execute(
            "INSERT INTO attempts VALUES (?, ?, ?, ?, ?, ?)",
            (slide_id, attempt, time.time(), outcome, seconds, worker),
        )


def read_ledgers(out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Slides and runs of all ledgers in a folder, each a row's columns; of a slide the newest.

    A slide that is done, but whose folder is gone, is told as waiting, for that is what it is; one
    that its archive no longer has is told only if there are results of it.

    Raises:
        OutputError: a ledger cannot be read.
    """
    slides: dict[str, dict[str, Any]] = {}
    runs: list[dict[str, Any]] = []
    for path in ledger_paths(out):
        with open_for_reading(path) as db:
            if not has_tables(db):  # the disk was full when it was to be made
                continue
            for found in db.execute("SELECT * FROM slides"):
                row = dict(found)
                known = slides.get(row["id"])
                if known is None or _age(row) > _age(known):
                    slides[row["id"]] = row
            runs += map(dict, db.execute("SELECT * FROM runs"))
    # After the ledgers: a slide's folder is there before they say that it is done.
    folders = Archive(out).ids()
    rows = [
        row | {"state": "waiting"} if row["state"] == "done" and row["id"] not in folders else row
        for row in slides.values()
        if row["state"] != "removed" or row["id"] in folders
    ]
    return rows, sorted(runs, key=lambda run: float(run["started"]))


def _age(row: dict[str, Any]) -> tuple[bool, float]:
    """Later is larger; a slide that only waits says nothing against one that was worked on."""
    return row["state"] != "waiting", float(row["noted"])


def at_work(out: Path) -> bool | None:
    """Whether some run writes a ledger of a folder now; None if that cannot be found out."""
    for path in ledger_paths(out):
        try:
            claim(path, timeout_s=0.0).close()
        except BusyError:
            return True
        except OutputError:
            return None
    return False
