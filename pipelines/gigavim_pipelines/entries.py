"""What an archive is made of: slides with an id, and what is known of each."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from gigavim.errors import SettingsError

LONGEST_ID = 200


@dataclass(frozen=True, slots=True)
class Entry:
    """A slide of an archive."""

    id: str
    """Unique within an archive; names the slide's folder and its results."""
    slide: str
    """An absolute path, or an fsspec URL such as "s3://bucket/slide.svs"."""
    mpp: float | None = None
    """Micrometres per level-0 pixel, where the archive says so; else the file's word counts."""
    mask: str | None = None
    """A tissue file for this slide: a path or URL."""
    label: str | None = None
    """Anything the archive's owner says of the slide; carried into the index."""


def is_remote(path: str) -> bool:
    """Whether a path is an fsspec URL."""
    return "://" in path


def check_id(name: str, *, where: str) -> str:
    """Return an id that can name a folder.

    Raises:
        SettingsError: it cannot; `where` says whose it is.
    """
    if not name or name.startswith(".") or name != name.strip() or set(name) & set('/\\\0:*?"<>|'):
        raise SettingsError(
            f'{where}: {name!r} cannot name a folder: leave out / \\ : * ? " < > |, a leading dot'
            " and outer spaces."
        )
    if len(name.encode()) > LONGEST_ID:
        raise SettingsError(f"{where}: an id has at most {LONGEST_ID} bytes, this one is longer.")
    return name


def distinct(entries: Iterable[Entry]) -> list[Entry]:
    """Drop slides that are listed twice, and give those whose ids clash longer ones.

    Of slides that share an id, each gets as many of its parent folders' names in front as tell
    them apart: `a/1.svs` and `b/1.svs` become `a__1` and `b__1`. What still clashes, as `1.svs` and
    `1.tif` in one folder do, is named by its whole file name.

    Raises:
        SettingsError: two slides cannot be told apart.
    """
    unique = list({entry.slide: entry for entry in entries}.values())
    clashing = _clashes(unique)
    if clashing:
        parents = {slide: PurePosixPath(_parts_of(slide)).parts[:-1] for slide in clashing}
        for depth in range(1, 1 + max(len(parts) for parts in parents.values())):
            longer = {
                entry.slide: "__".join([*parents[entry.slide][-depth:], entry.id])
                for entry in unique
                if entry.slide in clashing
            }
            if len(set(longer.values())) == len(longer):
                break
        else:
            longer = {slide: PurePosixPath(_parts_of(slide)).name for slide in clashing}
        unique = [replace(entry, id=longer.get(entry.slide, entry.id)) for entry in unique]
    still = _clashes(unique)
    if still:
        raise SettingsError(
            f"{min(still)}: another slide has the same id; give each an id of its own in a manifest"
            " (slide,id)."
        )
    return [replace(entry, id=check_id(entry.id, where=entry.slide)) for entry in unique]


def shard(entries: Sequence[Entry], part: int, parts: int) -> list[Entry]:
    """Part `part` (from 1) of `parts`: every n-th slide by id, whatever order they came in."""
    return sorted(entries, key=lambda entry: entry.id)[part - 1 :: parts]


def _clashes(entries: Sequence[Entry]) -> set[str]:
    """The slides whose id another one has too; letter case is no difference, as on many disks."""
    by_id: dict[str, list[str]] = {}
    for entry in entries:
        by_id.setdefault(entry.id.casefold(), []).append(entry.slide)
    return {slide for slides in by_id.values() if len(slides) > 1 for slide in slides}


def _parts_of(slide: str) -> str:
    return slide.split("://", 1)[-1].replace("\\", "/")
