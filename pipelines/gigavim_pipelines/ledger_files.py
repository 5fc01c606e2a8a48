"""The files of ledgers: where they are, who may write them, and what SQLite's errors mean."""

import contextlib
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from gigavim.errors import OutputError
from gigavim_pipelines.space import why_full

VERSION = 2
"""Of the tables; kept in the file's `user_version`."""
_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS runs (
    run TEXT PRIMARY KEY, started REAL NOT NULL, ended REAL, host TEXT, pid INTEGER,
    version TEXT, recipe TEXT, command TEXT, rerun TEXT
);
CREATE TABLE IF NOT EXISTS slides (
    id TEXT PRIMARY KEY,
    slide TEXT NOT NULL,
    mpp REAL, mask TEXT, label TEXT,
    state TEXT NOT NULL CHECK (state IN ('waiting', 'running', 'done', 'failed', 'removed')),
    noted REAL NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    begun INTEGER NOT NULL DEFAULT 0,
    reason TEXT, error TEXT, advice TEXT,
    started REAL, seconds REAL, peak_bytes INTEGER, worker TEXT,
    recipe_name TEXT, recipe TEXT, input TEXT, size_bytes INTEGER,
    outputs TEXT
);
CREATE TABLE IF NOT EXISTS attempts (
    id TEXT NOT NULL, attempt INTEGER NOT NULL, ended REAL NOT NULL,
    outcome TEXT NOT NULL, seconds REAL, worker TEXT
);
CREATE INDEX IF NOT EXISTS slides_by_state ON slides (state);
PRAGMA user_version = {VERSION};
COMMIT;
"""
_AGAIN = "Finished slides are found again by their records."


class BusyError(OutputError):
    """Another run is at work in the output folder."""


def ledger_paths(out: Path) -> list[Path]:
    """The ledgers in an output folder."""
    return sorted(path for path in out.glob("ledger*.sqlite") if path.is_file())


def ledger_path(out: Path, shard: tuple[int, int] | None) -> Path:
    """The ledger of a run, or of a shard (from 1, of how many) of it."""
    if shard is None:
        return out / "ledger.sqlite"
    return out / f"ledger-{shard[0]:0{len(str(shard[1]))}d}-of-{shard[1]}.sqlite"


def open_for_writing(path: Path) -> sqlite3.Connection:
    """A ledger with its tables, made whole or not at all.

    Raises:
        OutputError: it cannot be written, or is none of this version.
    """
    if path.exists() and not path.is_file():
        raise OutputError(f"{path}: is no regular file, and a ledger is; move it away.")
    with explained(path):
        db = sqlite3.connect(path, isolation_level=None)
        try:
            check_version(path, db)
            db.execute("PRAGMA journal_mode = WAL")
            # A record stands behind each result: what a power cut takes from here is found again.
            db.execute("PRAGMA synchronous = NORMAL")
            db.executescript(_SCHEMA)
        except BaseException:
            db.close()
            raise
        return db


@contextlib.contextmanager
def open_for_reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A ledger that may be written meanwhile, and need not be in a folder that can be written.

    Raises:
        OutputError: it cannot be read, or is of another version.
    """
    with explained(path), contextlib.ExitStack() as stack:
        try:
            db = stack.enter_context(_read_only(path))
            check_version(path, db)
        except sqlite3.OperationalError as error:
            if _code(error) not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
                raise
            # To read in WAL mode SQLite writes beside the file: where it may not, a copy is read.
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="gigavim-ledger-")))
            db = stack.enter_context(_read_only(_copied(path, folder)))
            check_version(path, db)
        db.row_factory = sqlite3.Row
        yield db


def check_version(path: Path, db: sqlite3.Connection) -> None:
    """`OutputError` for tables that are not those of this version."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if has_tables(db) and version != VERSION:
        raise OutputError(
            f"{path}: is the ledger of another version of gigavim. Move it away. {_AGAIN}"
        )


def has_tables(db: sqlite3.Connection) -> bool:
    """Whether anything is in a database."""
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    return bool(tables)


def claim(path: Path, *, timeout_s: float = 1.0) -> sqlite3.Connection:
    """Hold a lock that the system lets go of however this process ends.

    It may be held for a moment by someone who only wants to know whether it is.

    Raises:
        OutputError: it cannot be had; `BusyError` if another run holds it.
    """
    name = path.with_name(f".{path.name}.lock")
    lock = None
    try:
        lock = sqlite3.connect(name, timeout=timeout_s, isolation_level=None)
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:
        if lock is not None:
            lock.close()
        if _code(error) == sqlite3.SQLITE_BUSY:
            raise BusyError(
                f"{path}: another run is at work there (gigavim status {path.parent}); wait for it,"
                " or choose another output folder."
            ) from error
        raise _meaning(path, error) from error
    return lock


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn SQLite's errors of the block into an `OutputError` that says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        raise _meaning(path, error) from error


def _meaning(path: Path, error: sqlite3.Error) -> OutputError:
    code = _code(error)
    full = why_full(path.parent) if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR) else None
    if code == sqlite3.SQLITE_FULL or full:
        reason = f"cannot be written: {full or 'no space left on the disk'}"
        advice = "Free some space and run the same command: it goes on with what is not done."
    elif code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        reason = f"writing to {path.parent} is not permitted ({error})"
        advice = "Change its permissions, or choose another output folder with -o."
    elif code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        reason, advice = f"is damaged, or no ledger ({error})", f"Move it away. {_AGAIN}"
    elif code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        reason, advice = "another program holds it", "Close it, and run the same command again."
    elif code == sqlite3.SQLITE_IOERR:
        reason = f"cannot be read or written ({error})"
        advice = "Check the storage, then run the same command: it goes on with what is not done."
    else:
        reason, advice = f"cannot be used ({error})", f"Move it away. {_AGAIN}"
    return OutputError(f"{path}: {reason}. {advice}")


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; 0 for errors of Python's own."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


@contextlib.contextmanager
def _read_only(path: Path) -> Iterator[sqlite3.Connection]:
    address = f"{path.absolute().as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(address, uri=True)) as db:
        yield db


def _copied(path: Path, folder: Path) -> Path:
    """A copy of a ledger with what its write-ahead log holds."""
    for name in (path.name, f"{path.name}-wal"):
        if (path.parent / name).exists():
            try:
                shutil.copyfile(path.parent / name, folder / name)
            except OSError as error:
                raise OutputError(f"{path}: cannot be read: {error.strerror}.") from error
    return folder / path.name
