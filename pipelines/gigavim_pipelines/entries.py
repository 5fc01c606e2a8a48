"""What an archive is made of: slides with an id, and what is known of each."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256

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
    given: bool = field(default=False, compare=False)
    """The id is its owner's word, which no other rule changes."""


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


def shard(entries: Sequence[Entry], part: int, parts: int) -> list[Entry]:
    """Part `part` (from 1) of `parts`: every n-th slide by path, whatever order they came in."""
    return sorted(entries, key=lambda entry: entry.slide)[part - 1 :: parts]
