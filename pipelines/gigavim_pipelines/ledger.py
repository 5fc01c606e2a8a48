"""The ledger: the state of every slide of a run, in one SQLite file that any tool can query.

Written by one process at a time, in WAL mode, so that others can read meanwhile. Of a run in shards
each has its own file.
"""

import contextlib
import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gigavim.errors import OutputError
from gigavim.names import as_text
from gigavim_pipelines.entries import Entry
from gigavim_pipelines.failures import Failure
from gigavim_pipelines.record import Record

LONGEST_MESSAGE = 500

VERSION = 1
"""Of the tables; kept in the file's `user_version`."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    run TEXT PRIMARY KEY, started REAL NOT NULL, ended REAL, host TEXT, pid INTEGER,
    version TEXT, recipe TEXT, command TEXT, rerun TEXT
);
CREATE TABLE IF NOT EXISTS slides (
    id TEXT PRIMARY KEY,
    slide TEXT NOT NULL,
    mpp REAL, mask TEXT, label TEXT,
    state TEXT NOT NULL CHECK (state IN ('waiting', 'running', 'done', 'failed')),
    attempts INTEGER NOT NULL DEFAULT 0,
    begun INTEGER NOT NULL DEFAULT 0,
    reason TEXT, error TEXT, advice TEXT,
    started REAL, seconds REAL, peak_bytes INTEGER, worker TEXT,
    recipe TEXT, input TEXT, size_bytes INTEGER,
    outputs TEXT
);
CREATE TABLE IF NOT EXISTS attempts (
    id TEXT NOT NULL, attempt INTEGER NOT NULL, ended REAL NOT NULL,
    outcome TEXT NOT NULL, seconds REAL, worker TEXT
);
CREATE INDEX IF NOT EXISTS slides_by_state ON slides (state);
"""


def ledger_paths(out: Path) -> list[Path]:
    """The ledgers in an output folder."""
    return sorted(out.glob("ledger*.sqlite"))


def ledger_path(out: Path, shard: tuple[int, int] | None) -> Path:
    """The ledger of a run, or of a shard (from 1, of how many) of it."""
    if shard is None:
        return out / "ledger.sqlite"
    return out / f"ledger-{shard[0]:0{len(str(shard[1]))}d}-of-{shard[1]}.sqlite"


class Ledger:
    """A ledger, open for writing; nobody else writes it meanwhile.

    Raises:
        OutputError: another run writes it, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = _claim(path)
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            # A record stands behind each result: what a power cut takes from here is found again.
            self._db.execute("PRAGMA synchronous = NORMAL")
            _check_version(path, self._db)
            self._db.executescript(_SCHEMA)
            self._db.execute(f"PRAGMA user_version = {VERSION}")
        except OutputError:
            self._db.close()
            self._lock.close()
            raise
        except sqlite3.Error as error:
            self._lock.close()
            raise OutputError(
                f"{path}: cannot be used ({error}). Move it away: finished slides are found"
                " again by their records."
            ) from error

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
        self._db.execute("BEGIN")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def begin_run(self, run: str, *, version: str, recipe: str, command: str, rerun: str) -> None:
        """Note a run, and that nothing is running from before."""
        self._db.execute(
            "INSERT INTO runs VALUES (?, ?, NULL, ?, ?, ?, ?, ?, ?)",
            (run, time.time(), socket.gethostname(), os.getpid(), version, recipe, command, rerun),
        )
        self._db.execute("UPDATE slides SET state = 'waiting' WHERE state = 'running'")

    def end_run(self, run: str) -> None:
        """Note that a run ended by itself."""
        self._db.execute("UPDATE runs SET ended = ? WHERE run = ?", (time.time(), run))

    def begun(self) -> dict[str, int]:
        """How often each slide that is not done was begun, in this run and those before."""
        query = "SELECT id, begun FROM slides WHERE begun > 0 AND state != 'done'"
        return dict(self._db.execute(query).fetchall())

    def wait(self, entries: Iterable[Entry]) -> None:
        """Note slides that are to be processed; of earlier runs only `begun` stays known."""
        with self.transaction():
            self._db.executemany(
                "INSERT OR REPLACE INTO slides (id, slide, mpp, mask, label, state, begun)"
                " VALUES (?1, ?2, ?3, ?4, ?5, 'waiting',"
                " ifnull((SELECT begun FROM slides WHERE id = ?1 AND state != 'done'), 0))",
                (
                    (item.id, as_text(item.slide), item.mpp, item.mask, item.label)
                    for item in entries
                ),
            )

    def running(self, slide_id: str, attempt: int) -> None:
        """Note that a slide was handed to the workers."""
        self._db.execute(
            "UPDATE slides SET state = 'running', attempts = ?, begun = begun + 1, started = ?"
            " WHERE id = ?",
            (attempt, time.time(), slide_id),
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
                    "SELECT state, started FROM slides WHERE id = ?", (record.id,)
                ).fetchone()
                if known != ("done", record.started):
                    self._write(record, 0)
                    self._attempt(record.id, 0, "found", record.seconds, record.worker)

    def _write(self, record: Record, attempt: int) -> None:
        outputs = {o.path: [o.size_bytes, o.sha256] for o in record.outputs.values()}
        self._db.execute(
            "INSERT OR REPLACE INTO slides (id, slide, label, state, attempts, started, seconds,"
            " peak_bytes, worker, recipe, input, size_bytes, outputs)"
            " VALUES (?, ?, ?, 'done', ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                record.id, record.slide, record.label, attempt, record.started, record.seconds,
                record.peak_bytes, record.worker, record.recipe, record.input, record.size_bytes,
                json.dumps(outputs, separators=(",", ":")),
            ),
        )  # fmt: skip

    def tried(
        self, slide_id: str, attempt: int, failure: Failure, worker: str, *, last: bool
    ) -> None:
        """Note a failed attempt; the slide waits for another, or has failed if it was the last."""
        message = failure.message[:LONGEST_MESSAGE]
        with self.transaction():
            self._db.execute(
                "UPDATE slides SET state = ?, reason = ?, error = ?, advice = ?, worker = ?,"
                " seconds = ? - started WHERE id = ?",
                ("failed" if last else "waiting", failure.reason, message, failure.advice, worker,
                 time.time(), slide_id),
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

    Raises:
        OutputError: there is no ledger, or one cannot be read.
    """
    paths = ledger_paths(out)
    if not paths:
        raise OutputError(f"{out}: holds no ledger, so no batch ran there; name a run's -o folder.")
    slides: dict[str, dict[str, Any]] = {}
    runs: list[dict[str, Any]] = []
    for path in paths:
        for row in _select(path, "SELECT * FROM slides"):
            known = slides.get(row["id"])
            if known is None or _age(row) > _age(known):
                slides[row["id"]] = row
        runs += _select(path, "SELECT * FROM runs")
    return list(slides.values()), sorted(runs, key=lambda run: float(run["started"]))


def _age(row: dict[str, Any]) -> tuple[bool, float]:
    """Later is larger; a slide that only waits says nothing against one that was worked on."""
    return row["state"] != "waiting", float(row["started"] or 0)


def _select(path: Path, query: str) -> list[dict[str, Any]]:
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        ) as db:
            _check_version(path, db)
            db.row_factory = sqlite3.Row
            return [dict(row) for row in db.execute(query)]
    except sqlite3.Error as error:
        raise OutputError(f"{path}: cannot be read as a ledger ({error}).") from error


def _check_version(path: Path, db: sqlite3.Connection) -> None:
    """`OutputError` for tables that are not those of this version."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if tables and version != VERSION:
        raise OutputError(
            f"{path}: is the ledger of another version of gigavim. Move it away: finished slides"
            " are found again by their records."
        )


def at_work(out: Path) -> bool | None:
    """Whether some run writes a ledger of a folder now; None if that cannot be found out."""
    for path in ledger_paths(out):
        try:
            _claim(path, timeout_s=0.0).close()
        except OutputError as error:
            cause = error.__cause__
            busy = (
                isinstance(cause, sqlite3.Error) and cause.sqlite_errorcode == sqlite3.SQLITE_BUSY
            )
            return True if busy else None
    return False


def _claim(path: Path, *, timeout_s: float = 1.0) -> sqlite3.Connection:
    """Hold a lock that the system lets go of however this process ends.

    It may be held for a moment by someone who only wants to know whether it is.
    """
    name = path.with_name(f".{path.name}.lock")
    lock = sqlite3.connect(name, timeout=timeout_s, isolation_level=None)
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        lock.close()
        raise OutputError(
            f"{path}: another run is at work there (gigavim status {path.parent}); wait for it, or"
            " choose another output folder."
        ) from error
    return lock
