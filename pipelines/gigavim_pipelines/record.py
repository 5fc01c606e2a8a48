"""The record of a finished slide: the last file of its folder, and what makes it finished.

A slide is done when its record is there: the folder appears in one rename, record and all. A ledger
that was lost, or not yet told when everything was killed, is made good from the records.
"""

import os
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path, PurePath
from typing import Any

import orjson
from pydantic import TypeAdapter

FORMAT = "gigavim-batch/1"
MOST_BYTES = 1 << 26
"""No record is larger."""


@dataclass(frozen=True, slots=True)
class Output:
    """A file, or folder, of a slide's results."""

    path: str
    """From the slide's folder."""
    size_bytes: int
    sha256: str
    """As `sha256sum` prints it; for a folder see `fingerprints.checksum`."""


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of a finished slide."""

    id: str
    slide: str
    recipe: str
    """Fingerprint of the recipe."""
    input: str
    """Fingerprint of slide, mask and mpp."""
    stamp: str
    """As `fingerprints.stamp` gave it before the slide was processed."""
    size_bytes: int
    """Of the slide."""
    outputs: dict[str, Output]
    """By kind."""
    started: float
    """Seconds since 1970."""
    seconds: float
    peak_bytes: int
    """Most memory the worker held meanwhile."""
    worker: str
    """host:pid."""
    token: str
    """Of the attempt."""
    label: str | None = None
    recipe_name: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    """Of the task's summary what an index needs: areas, sizes, coverage, timings."""
    format: str = FORMAT

    def write(self, path: Path) -> None:
        """Write as JSON, safe on the disk; the caller makes it appear whole."""
        options = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
        with path.open("wb") as file:
            file.write(orjson.dumps(asdict(self), option=options, default=str))
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def read(path: Path) -> "Record | None":
        """Read a record; None where there is none, or none that this version understands."""
        try:
            # A pipe of that name would be waited for.
            if not path.is_file() or path.stat().st_size > MOST_BYTES:
                return None
            record = _checked().validate_json(path.read_bytes(), strict=True)
        except (OSError, ValueError):
            return None
        inside = all(_is_inside(output.path) for output in record.outputs.values())
        return record if record.format == FORMAT and inside else None


@cache
def _checked() -> TypeAdapter[Record]:
    return TypeAdapter(Record)


def _is_inside(path: str) -> bool:
    """Whether a path stays in the folder that it is counted from."""
    parts = PurePath(path).parts
    return bool(parts) and not PurePath(path).is_absolute() and ".." not in parts


def record_name(slide_id: str) -> str:
    """The record's file name in the slide's folder."""
    return f"{slide_id}.done.json"
