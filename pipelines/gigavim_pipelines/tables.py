"""Tables as csv that spreadsheets open without running anything in them.

A cell of text that begins with =, +, -, @, a tab or a carriage return is a formula to spreadsheets
(OWASP, "CSV Injection"). An apostrophe in front makes it text to them; `plain` takes it off again.
"""

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gigavim.outputs.atomic import atomic_path

_FORMULA = re.compile(r"'*[=+\-@\t\r]")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as UTF-8 csv, whole or not at all; values that are missing become empty cells.

    Raises:
        OutputError: the disk refuses.
    """
    with (
        atomic_path(path, overwrite=True) as partial,
        partial.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, list(map(escaped, columns)), restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({escaped(name): escaped(value) for name, value in row.items()})


def escaped(value: Any) -> Any:
    """Text that is no formula to a spreadsheet; what is no text as it is."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def plain(text: str) -> str:
    """The text that `escaped` was given."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text
