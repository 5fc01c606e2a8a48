"""One slide, on a worker: the task is run, watched, measured and recorded."""

import os
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from gigavim.names import as_text
from gigavim_pipelines import remote
from gigavim_pipelines.entries import Entry, is_remote
from gigavim_pipelines.failures import Failure, classify
from gigavim_pipelines.fingerprints import (
    check_readable,
    checksum,
    input_fingerprint,
    slide_bytes,
    stamp,
    total_bytes,
)
from gigavim_pipelines.folders import Archive
from gigavim_pipelines.lastwords import BegunBeforeError, watched
from gigavim_pipelines.memory import peak_memory
from gigavim_pipelines.recipe import Recipe
from gigavim_pipelines.record import Output, Record, record_name
from gigavim_pipelines.thumbnails import add_thumbnail

# One slide at a time in a process, whatever number of threads a worker was given: a slide may end
# its process, and may use all the memory that the worker has.
_one_slide = threading.Lock()
_slides_done = 0

_ANSWER_S = 0.2
"""Time for the client to fetch a slide's answer before its worker leaves."""

_NOT_FOR_INDEX = frozenset(("provenance", "plan"))


@dataclass(frozen=True, slots=True)
class Job:
    """All that a worker must know to process a slide."""

    entry: Entry
    recipe: Recipe
    fingerprint: str
    """Of the recipe."""
    out: Path
    attempt_file: Path
    attempt: int = 1
    timeout_s: float = 0.0
    recycle_after: int = 0
    overwrite: bool = False
    own: frozenset[str] = frozenset()
    """Names in the slide's folder that a run made, where no record says so."""
    token: str = field(default_factory=lambda: uuid4().hex)
    """Of this attempt."""

    def again(self, *, attempt: int) -> "Job":
        """The same slide's job for another attempt."""
        file = self.attempt_file.with_name(f"{self.entry.id}.{attempt}")
        return replace(self, attempt=attempt, attempt_file=file, token=uuid4().hex)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended: one of the two is there."""

    record: Record | None = None
    failure: Failure | None = None
    begun_before: bool = False
    """The scheduler gave the attempt out anew after a worker died at it."""
    worker: str = ""


def run_slide(job: Job) -> Outcome:
    """Process a slide; errors are an answer too. Called by dask on a worker."""
    me = f"{socket.gethostname()}:{os.getpid()}"
    with _one_slide:
        # A worker that was lost after it finished, its answer with it: dask asks for it again.
        record = finished(job)
        if record is not None:
            return Outcome(record=record, worker=record.worker)
        try:
            with watched(job.attempt_file, timeout_s=job.timeout_s):
                outcome = Outcome(record=_record(job, me), worker=me)
        except BegunBeforeError:
            outcome = Outcome(begun_before=True, worker=me)
        # In this thread an exit or an interrupt is the task's own, and costs its slide only.
        except BaseException as error:
            failure = classify(error, detail=traceback.format_exc())
            outcome = Outcome(failure=failure, worker=me)
        _recycle(job.recycle_after)
    return outcome


def finished(job: Job) -> Record | None:
    """The record of this very attempt, if it has ended well."""
    record = Archive(job.out).record(job.entry.id)
    return record if record is not None and record.token == job.token else None


def _record(job: Job, me: str) -> Record:
    entry, archive = job.entry, Archive(job.out)
    started = time.time()
    check_readable(entry)
    before = stamp(entry)
    with (
        peak_memory() as peak,
        archive.staging(entry.id, overwrite=job.overwrite, own=job.own) as folder,
    ):
        fingerprint = input_fingerprint(entry)
        result = _run_task(job, folder)
        made = add_thumbnail(result.outputs, folder, entry.id)
        outputs = {kind: _output(kind, path, folder) for kind, path in made.items()}
        record = Record(
            id=entry.id,
            slide=as_text(entry.slide),
            recipe=job.fingerprint,
            input=fingerprint,
            stamp=before,
            size_bytes=slide_bytes(entry),
            outputs=outputs,
            started=started,
            seconds=round(time.time() - started, 3),
            peak_bytes=peak(),
            worker=me,
            token=job.token,
            label=entry.label,
            recipe_name=job.recipe.recipe.name,
            summary={k: v for k, v in result.summary.items() if k not in _NOT_FOR_INDEX},
        )
        record.write(folder / record_name(entry.id))
    return record


def _run_task(job: Job, folder: Path) -> Any:
    with ExitStack() as stack:
        path, mask = (
            stack.enter_context(_local(name, folder)) if name else None
            for name in (job.entry.slide, job.entry.mask)
        )
        settings = job.recipe.settings.with_flags(
            input={"slide_mpp": job.entry.mpp},
            tokens={"tissue": None if mask is None else str(mask)},
            output={"directory": str(folder), "overwrite": True},
        )
        task = job.recipe.function()
        return task(path, settings=settings, stem=job.entry.id, progress=None)


@contextmanager
def _local(name: str, folder: Path) -> Iterator[Path]:
    if is_remote(name):
        with remote.fetched(name, folder) as path:
            yield path
    else:
        yield Path(name)


def _output(kind: str, path: Path, folder: Path) -> Output:
    path = Path(path).absolute()
    if not (path.is_relative_to(folder.absolute()) and path.exists()):
        raise ValueError(f"the task says that {kind!r} is {path}, which is not in its folder")
    inside = path.relative_to(folder.absolute())
    return Output(inside.as_posix(), total_bytes(path), checksum(path))


def _recycle(after: int) -> None:
    """End this process after some slides, for a fresh one: libraries leak, caches grow.

    dask's nanny starts it anew as it does after a crash; that way no message has to arrive in time,
    and no slide is begun meanwhile.
    """
    from distributed import get_worker

    global _slides_done
    _slides_done += 1
    # Without a nanny nobody would start it anew.
    if after and _slides_done == after and get_worker().nanny is not None:
        threading.Thread(target=_leave, name="gigavim-recycle", daemon=True).start()


def _leave() -> None:
    time.sleep(_ANSWER_S)
    _one_slide.acquire()
    os._exit(0)
