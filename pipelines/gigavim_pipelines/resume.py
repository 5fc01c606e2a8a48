"""What is left to do: an archive's slides against the records of those that are done."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from gigavim_pipelines.entries import Entry
from gigavim_pipelines.fingerprints import (
    UNKNOWN,
    checksum,
    input_fingerprint,
    modified_ns,
    stamp,
    total_bytes,
)
from gigavim_pipelines.folders import Archive
from gigavim_pipelines.record import Record, record_name

_THREADS = 16
"""They wait for the storage most of the time."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a slide."""

    entry: Entry
    reason: str
    """Why it is to be processed; empty if it is done."""
    record: Record | None = None
    """Of the run that did it."""


def sort_out(
    entries: Sequence[Entry], archive: Archive, fingerprint: str, *, verify: bool = False
) -> Iterator[Verdict]:
    """Judge each slide: done, or new, or to be done again, and why.

    Done is a slide whose record has the recipe's fingerprint and the input's, and whose results are
    there with their checksums. Checksums are computed where a result is newer than its record, or
    of all with `verify`; a slide whose size and time are those recorded counts as unchanged.
    """
    judge = partial(_judge, archive=archive, fingerprint=fingerprint, verify=verify)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="gigavim-resume") as pool:
        yield from pool.map(judge, entries)


def _judge(entry: Entry, archive: Archive, fingerprint: str, verify: bool) -> Verdict:
    record = archive.record(entry.id)
    if record is None:
        return Verdict(entry, "new")
    if record.recipe != fingerprint:
        return Verdict(entry, "the recipe changed")
    if not _same_input(entry, record):
        return Verdict(entry, "the slide changed")
    if not _intact(record, archive, verify):
        return Verdict(entry, "its results were damaged")
    return Verdict(entry, "", record)


def _same_input(entry: Entry, record: Record) -> bool:
    now = stamp(entry)
    if now != UNKNOWN and now == record.stamp:
        return True
    try:
        return input_fingerprint(entry) == record.input
    except OSError:
        # It cannot be read now: what was made of it stays.
        return True


def _intact(record: Record, archive: Archive, verify: bool) -> bool:
    folder = archive.slides / record.id
    try:
        written_ns = modified_ns(folder / record_name(record.id))
        for output in record.outputs.values():
            path = folder / output.path
            if total_bytes(path) != output.size_bytes:
                return False
            if (verify or modified_ns(path) > written_ns) and checksum(path) != output.sha256:
                return False
    except OSError:
        return False
    return True
