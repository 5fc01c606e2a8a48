"""What an archive is made of: slides with an id, and what is known of each."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import PurePosixPath

from gigavim.errors import SettingsError
from gigavim.names import as_text

LONGEST_ID = 200
_FORBIDDEN = re.compile(r'[/\\:*?"<>|\x00-\x1f]')


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
    if name != safe_id(name):
        raise SettingsError(
            f'{where}: {name!r} cannot name a folder: leave out / \\ : * ? " < > |, a leading dot'
            f" and outer spaces, and use at most {LONGEST_ID} bytes."
        )
    return name


def safe_id(name: str) -> str:
    """An id made of a file's name: what cannot be in a folder's name becomes `_`."""
    text = _FORBIDDEN.sub("_", as_text(name).strip())
    text = re.sub(r"^\.+", "_", text) or "_"
    if len(text.encode()) > LONGEST_ID:
        digest = sha256(text.encode()).hexdigest()[:8]
        text = f"{text.encode()[: LONGEST_ID - 9].decode('utf-8', 'ignore').strip()}-{digest}"
    return text


def distinct(entries: Iterable[Entry]) -> list[Entry]:
    """Drop slides that are listed twice, and give those whose ids clash longer ones.

    Of slides that share an id, each gets as many of its parent folders' names in front as tell
    them apart: `a/1.svs` and `b/1.svs` become `a__1` and `b__1`. What still clashes, as `1.svs` and
    `1.tif` in one folder do, is named by its whole file name.

    Raises:
        SettingsError: two slides cannot be told apart.
    """
    unique = list({entry.slide: entry for entry in entries}.values())
    longer: dict[str, str] = {}
    for slides in _clashes(unique):
        longer |= _told_apart(slides)
    unique = [replace(entry, id=longer.get(entry.slide, entry.id)) for entry in unique]
    for slides in _clashes(unique):
        raise SettingsError(
            f"{slides[0].slide}: another slide has the same id, {slides[0].id!r}; give each an id"
            " of its own in a manifest (slide,id)."
        )
    return unique


def shard(entries: Sequence[Entry], part: int, parts: int) -> list[Entry]:
    """Part `part` (from 1) of `parts`: every n-th slide by id, whatever order they came in."""
    return sorted(entries, key=lambda entry: entry.id)[part - 1 :: parts]


def _clashes(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Entries that share an id; letter case is no difference, as on many disks."""
    by_id: dict[str, list[Entry]] = {}
    for entry in entries:
        by_id.setdefault(entry.id.casefold(), []).append(entry)
    return [group for group in by_id.values() if len(group) > 1]


def _told_apart(entries: Sequence[Entry]) -> dict[str, str]:
    """Longer ids by slide, of slides that share one."""
    parents = [PurePosixPath(_parts_of(entry.slide)).parts[:-1] for entry in entries]
    for depth in range(1, 1 + max(map(len, parents))):
        names = [
            safe_id("__".join([*above[-depth:], entry.id]))
            for above, entry in zip(parents, entries)
        ]
        if len({name.casefold() for name in names}) == len(names):
            break
    else:
        names = [safe_id(PurePosixPath(_parts_of(entry.slide)).name) for entry in entries]
    return {entry.slide: name for entry, name in zip(entries, names)}


def _parts_of(slide: str) -> str:
    return slide.split("://", 1)[-1].replace("\\", "/")
