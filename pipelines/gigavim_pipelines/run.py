"""A batch from its archives to its results: the function that joins all parts."""

import json
import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

from gigavim import __version__
from gigavim.errors import ResourceError
from gigavim.names import as_text
from gigavim.outputs.atomic import explained
from gigavim_pipelines import cluster
from gigavim_pipelines.engine import Engine, Policy
from gigavim_pipelines.entries import Entry, shard
from gigavim_pipelines.failures import Failure
from gigavim_pipelines.folders import Archive
from gigavim_pipelines.ledger import Ledger, read_ledgers
from gigavim_pipelines.ledger_files import ledger_path
from gigavim_pipelines.recipe import Identity, Recipe
from gigavim_pipelines.recipe_sections import seconds
from gigavim_pipelines.record import Record
from gigavim_pipelines.report import write_listings
from gigavim_pipelines.resume import Verdict, gone, sort_out
from gigavim_pipelines.space import PROBE_BYTES, why_full
from gigavim_pipelines.status import write_failed
from gigavim_pipelines.worker import Job

if TYPE_CHECKING:
    from distributed import Client

log = logging.getLogger(f"gigavim.{__name__}")

_PATIENCE_S = 120.0
"""Workers of this machine that do not start in that time never will."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a batch is run, beyond its recipe."""

    scheduler: str | None = None
    """Of a dask cluster that runs already; None: workers are started here."""
    shard: tuple[int, int] | None = None
    """Which part (from 1) of how many."""
    overwrite: bool = False
    """Do again what is done."""
    verify: bool = False
    """Compute every result's checksum before it counts as done."""
    dashboard: str | None = None
    """Where dask shows its dashboard."""
    command: str = ""
    """As the user gave it, for the ledger."""
    rerun: str = ""
    """The command that runs the failed slides again, for the ledger."""


@dataclass(slots=True)
class Batch:
    """What became of an archive."""

    slides: int
    skipped: int = 0
    """Done by runs before."""
    removed: int = 0
    """Done by runs before, and no longer in the archive."""
    done: int = 0
    failed: list[tuple[Entry, Failure]] = field(default_factory=list)
    seconds: float = 0.0


class Watcher(Protocol):
    """Told how a batch goes on."""

    def start(self, todo: Sequence[Verdict], skipped: int, workers: int) -> None:
        """What is to be done and why, how many slides are done, and how many workers there are."""

    def done(self, record: Record) -> None:
        """A slide is finished."""

    def tried(self, entry: Entry, failure: Failure, *, last: bool) -> None:
        """An attempt failed."""


def run_batch(
    entries: Sequence[Entry], recipe: Recipe, out: Path, *, options: Options, watcher: Watcher
) -> Batch:
    """Process the slides of an archive that are not done.

    Args:
        entries: the slides, as `discover` lists them.
        recipe: what is done with each.
        out: the folder of the results; see `folders.Archive`.
        options: see `Options`.
        watcher: told how it goes.

    Returns:
        What was done, skipped, and what failed, each slide by itself.

    Raises:
        OutputError: the output folder cannot be used, another run is at work in it, or it holds
            results of another recipe.
        ResourceError: the dask scheduler cannot be reached, or was lost; the disk is full.
        SettingsError: the recipe names something that is not there.
    """
    started = time.perf_counter()
    identity, listed = recipe.identity(), entries
    if options.shard is not None:
        entries = shard(entries, *options.shard)
    archive = Archive(out.absolute())
    archive.make()
    batch, run = Batch(len(entries)), uuid4().hex[:12]
    with Ledger(ledger_path(out, options.shard)) as ledger:
        archive.recover(entry.id for entry in entries)
        rows, _ = read_ledgers(out)
        todo = _left(entries, archive, identity, ledger, options)
        ledger.begin_run(
            run,
            version=__version__,
            recipe=recipe.model_dump_json(),
            command=options.command,
            rerun=options.rerun,
        )
        removed = gone(rows, listed)
        ledger.removed(removed)
        batch.removed = sum(row["state"] == "done" for row in removed)
        batch.skipped = len(entries) - len(todo)
        if todo:
            own = _own_names(todo, rows)
            _process(todo, own, batch, (recipe, identity), archive, ledger, options, watcher)
        else:
            watcher.start(todo, batch.skipped, 0)
        ledger.end_run(run)
    write_failed(out)
    write_listings(out)
    batch.seconds = time.perf_counter() - started
    return batch


def _process(
    todo: Sequence[Verdict],
    own: Mapping[str, frozenset[str]],
    batch: Batch,
    recipe: tuple[Recipe, Identity],
    archive: Archive,
    ledger: Ledger,
    options: Options,
    watcher: Watcher,
) -> None:
    """Run what is to be done on workers; `own` as `_own_names` says."""
    notes = _Notes(batch, ledger, archive, watcher)
    try:
        with (
            _attempts_folder(ledger.path, archive) as attempts,
            _client(recipe[0], options, notes) as (client, fitted, policy),
        ):
            watcher.start(todo, batch.skipped, cluster.slots(client))
            jobs = _jobs(todo, own, (fitted, recipe[1]), archive, attempts, options)
            Engine(client, notes, policy).run(jobs)
    finally:
        # Our own workers are gone; those of a cluster may still end what they are at.
        if options.scheduler is None:
            archive.recover(verdict.entry.id for verdict in todo)


def _left(
    entries: Sequence[Entry], archive: Archive, recipe: Identity, ledger: Ledger, options: Options
) -> list[Verdict]:
    """The slides to process; the ledger is told of them and of those that are done."""
    todo: list[Verdict] = []

    def done() -> Iterator[Record]:
        for verdict in sort_out(
            entries, archive, recipe, verify=options.verify, overwrite=options.overwrite
        ):
            entry, record = verdict.entry, verdict.record
            if record is None:
                todo.append(verdict)
            elif options.overwrite:
                todo.append(Verdict(entry, "--overwrite"))
            else:
                # It may have been moved, or labelled anew, which makes no other results.
                label = entry.label or record.label
                yield replace(record, slide=as_text(entry.slide), label=label)

    ledger.found(done())
    ledger.wait(verdict.entry for verdict in todo)
    for verdict in todo:
        if verdict.reason.startswith("its record"):
            log.warning(
                "%s: %s; it is done again, and only its own results are replaced",
                archive.slides / verdict.entry.id, verdict.reason,
            )  # fmt: skip
    # What was begun before and is not done may have been what ended the run: it comes last.
    begun = ledger.begun()
    return sorted(todo, key=lambda verdict: begun.get(verdict.entry.id, 0))


def _own_names(
    todo: Sequence[Verdict], rows: Iterable[Mapping[str, Any]]
) -> dict[str, frozenset[str]]:
    """By id, the names in a slide's folder that the ledgers know as a run's.

    Of slides only whose records do not say it themselves.
    """
    wanted = {verdict.entry.id for verdict in todo if verdict.reason.startswith("its record")}
    return {
        row["id"]: frozenset(Path(path).parts[0] for path in json.loads(row["outputs"]))
        for row in rows
        if row["id"] in wanted and row["outputs"]
    }


class _Notes:
    """The engine's listener: ledger, logs and watcher are told."""

    def __init__(self, batch: Batch, ledger: Ledger, archive: Archive, watcher: Watcher) -> None:
        self._batch, self._ledger = batch, ledger
        self._archive, self._watcher = archive, watcher
        self._largest = PROBE_BYTES

    def begun(self, job: Job) -> None:
        self._ledger.running(job.entry.id, job.attempt)

    def done(self, job: Job, record: Record) -> None:
        self._ledger.done(record, job.attempt)
        self._batch.done += 1
        size = sum(output.size_bytes for output in record.outputs.values())
        self._largest = max(self._largest, size)
        self._watcher.done(record)

    def tried(self, job: Job, failure: Failure, worker: str, *, last: bool) -> None:
        entry = job.entry
        if failure.detail:
            path = self._archive.logs / f"{entry.id}.log"
            with explained(path), path.open("a", encoding="utf-8") as file:
                when = time.strftime("%Y-%m-%d %H:%M:%S")
                file.write(f"{when} attempt {job.attempt} on {worker}\n{failure.detail}\n\n")
        # A worker that died left its working folder.
        self._archive.recover([entry.id])
        self._ledger.tried(entry.id, job.attempt, failure, worker, last=last)
        if last:
            self._batch.failed.append((entry, failure))
        self._watcher.tried(entry, failure, last=last)

    def full(self, job: Job) -> ResourceError | None:
        """Why nothing more can be written, if that is what an attempt's failure means."""
        self._archive.recover([job.entry.id])
        reason = why_full(self._archive.logs, self._largest)
        if reason is None:
            return None
        return ResourceError(
            f"{self._archive.root}: {reason}, so the run has stopped. What is done is safe"
            f" ({self._batch.done} in this run). Free some space and run the same command: it goes"
            " on with the rest."
        )


@contextmanager
def _client(
    recipe: Recipe, options: Options, notes: _Notes
) -> Iterator[tuple["Client", Recipe, Policy]]:
    """Workers, the recipe as it fits them, and how failures are met."""
    tries, wait_s = recipe.batch.tries, seconds(recipe.batch.retry_wait)
    if options.scheduler is not None:
        with cluster.remote_client(options.scheduler) as client:
            # As many again wait at the scheduler: a cluster that adapts grows by what waits.
            yield client, recipe, Policy(tries, wait_s, lookahead=1, full=notes.full)
        return
    plan = cluster.plan_local(recipe)
    with cluster.local_client(plan, dashboard=options.dashboard) as client:
        policy = Policy(
            tries, wait_s, patience_s=_PATIENCE_S, full=notes.full, memory_bytes=plan.memory_bytes
        )
        yield client, cluster.within(recipe, plan), policy


@contextmanager
def _attempts_folder(ledger: Path, archive: Archive) -> Iterator[Path]:
    """Where workers leave their last words; those of a run that was killed are of no use."""
    folder = archive.logs / f".attempts-{ledger.stem}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _jobs(
    todo: Sequence[Verdict],
    own: Mapping[str, frozenset[str]],
    recipe: tuple[Recipe, Identity],
    archive: Archive,
    attempts: Path,
    options: Options,
) -> Iterator[Job]:
    fitted, identity = recipe
    timeout_s = seconds(fitted.batch.timeout)
    for verdict in todo:
        yield Job(
            entry=verdict.entry,
            recipe=fitted,
            fingerprint=identity.fingerprint,
            out=archive.root,
            attempt_file=attempts / f"{verdict.entry.id}.1",
            timeout_s=timeout_s,
            recycle_after=fitted.batch.recycle_after,
            overwrite=options.overwrite,
            own=own.get(verdict.entry.id, frozenset()),
        )
