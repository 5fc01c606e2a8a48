"""Names of files: what results are called after a slide, and names as text."""

import os
from pathlib import Path


def result_stem(path: Path) -> str:
    """The first part of the names of a slide's results: `a` of `a.svs`, `a.ome.tif` and `a`.

    A link's own name counts, as the user knows the slide by it, not that of the file behind it.
    """
    named = own_name(path)
    return named.split(".ome.")[0] or named if ".ome." in named else Path(named).stem


def own_name(path: Path) -> str:
    """The last part of a path, of `.` and `..` that of the folder they stand for."""
    return path.name if path.name not in ("", "..") else path.resolve().name


def as_text(path: str | Path) -> str:
    """A path as UTF-8 can hold it: bytes of a name that are no UTF-8 become U+FFFD."""
    return os.fsencode(path).decode("utf-8", "replace")
