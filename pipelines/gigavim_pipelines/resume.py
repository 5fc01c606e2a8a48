"""What is left to do: an archive's slides against the records of those that are done."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from gigavim.errors import OutputError
from gigavim.names import as_text
from gigavim_pipelines.entries import Entry
from gigavim_pipelines.fingerprints import checksum, modified_ns, same_input, total_bytes
from gigavim_pipelines.folders import Archive
from gigavim_pipelines.ledger import read_ledgers
from gigavim_pipelines.naming import slide_exists
from gigavim_pipelines.recipe import Identity
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
    replaces: str = ""
    """What would be lost that is not of this recipe and slide, and is replaced only on request."""


def sort_out(
    entries: Sequence[Entry],
    archive: Archive,
    recipe: Identity,
    *,
    verify: bool = False,
    overwrite: bool = False,
) -> Iterator[Verdict]:
    """Judge each slide: done, or new, or to be done again, and why.

    Done is a slide whose record has the recipe's fingerprint and the input's, and whose results are
    there with their checksums. Checksums are computed where a result is newer than its record, or
    of all with `verify`; a slide whose size and time are those recorded counts as unchanged.

    Raises:
        OutputError: results of another recipe, or of another slide, would be replaced, and there
            is no `overwrite`.
    """
    if not overwrite:
        _refuse_other_recipe(archive, recipe)
    judge = partial(_judge, archive=archive, recipe=recipe, verify=verify)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="gigavim-resume") as pool:
        for verdict in pool.map(judge, entries):
            if verdict.replaces and not overwrite:
                raise OutputError(verdict.replaces)
            yield verdict


def gone(rows: Iterable[dict[str, Any]], entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Rows of ledgers whose slides an archive, listed whole, no longer has.

    These are slides whose files are not there any more, or which have another id now.
    """
    ids = {entry.id for entry in entries}
    slides = {as_text(entry.slide) for entry in entries}
    others = [row for row in rows if row["id"] not in ids and row["state"] != "removed"]
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="gigavim-resume") as pool:
        there = pool.map(slide_exists, [str(row["slide"]) for row in others])
        return [
            row for row, is_there in zip(others, there) if not is_there or row["slide"] in slides
        ]


def _judge(entry: Entry, archive: Archive, recipe: Identity, verify: bool) -> Verdict:
    record = archive.record(entry.id)
    if record is None:
        return Verdict(entry, archive.without_record(entry.id) or "new")
    if record.recipe_name not in ("", recipe.name):
        replaces = _other_recipe(archive, record.recipe_name, recipe.name)
        return Verdict(entry, "the recipe changed", replaces=replaces)
    same = same_input(entry, record.stamp, record.input, unreadable=True)
    other = "" if same else _other_slide(entry, record, archive)
    if record.recipe != recipe.fingerprint:
        return Verdict(entry, "the recipe changed", replaces=other)
    if not same:
        return Verdict(entry, "the slide changed", replaces=other)
    if not _intact(record, archive, verify):
        return Verdict(entry, "its results were damaged")
    return Verdict(entry, "", record)


def _refuse_other_recipe(archive: Archive, recipe: Identity) -> None:
    """`OutputError` if some slide's results here are another recipe's."""
    for row in read_ledgers(archive.root)[0]:
        made_by = row["recipe_name"] if row["state"] in ("done", "removed") else None
        if made_by and made_by != recipe.name:
            raise OutputError(_other_recipe(archive, made_by, recipe.name))


def _other_recipe(archive: Archive, there: str, wanted: str) -> str:
    return (
        f"{archive.root}: holds results of the recipe {there!r}, and a folder is for one recipe."
        f" Give {wanted!r} another -o, or let it replace what is there of its slides: --overwrite."
    )


def _other_slide(entry: Entry, record: Record, archive: Archive) -> str:
    """What to say if an id's results are those of a slide that is still there beside this one."""
    if record.slide == as_text(entry.slide) or not slide_exists(record.slide):
        return ""
    return (
        f"{archive.slides / entry.id}: holds results of {record.slide}, and {entry.slide} would"
        " replace them; give it another id or another -o, or say --overwrite."
    )


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
