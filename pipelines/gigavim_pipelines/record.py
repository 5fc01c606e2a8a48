"""The record of a finished slide: the last file of its folder, and what makes it finished.

A slide is done when its record is there: the folder appears in one rename, record and all. A ledger
that was lost, or not yet told when everything was killed, is made good from the records.
"""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import orjson

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
        options = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY
        with path.open("wb") as file:
            file.write(orjson.dumps(asdict(self), option=options, default=str))
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read a record; None where there is none, or none that this version understands."""
        try:
            # A pipe of that name would be waited for.
            if not path.is_file() or path.stat().st_size > MOST_BYTES:
                return None
            values = orjson.loads(path.read_bytes())
            if values["format"] != FORMAT:
                return None
            outputs = {kind: Output(**output) for kind, output in values["outputs"].items()}
            return cls(**{**values, "outputs": outputs})
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None


def record_name(slide_id: str) -> str:
    """The record's file name in the slide's folder."""
    return f"{slide_id}.done.json"
