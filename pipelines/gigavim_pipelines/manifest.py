"""Manifests: tables of slides, as csv, tsv or parquet.

Columns: `slide` (a path, relative ones counted from the manifest's folder, or a URL), and
optionally `id`, `mpp`, `mask`, `label`. Others are left alone, unless one looks like a misspelling.
"""

import csv
import difflib
import io
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gigavim.errors import SettingsError
from gigavim.names import result_stem
from gigavim_pipelines import remote
from gigavim_pipelines.entries import Entry, check_id, is_remote, safe_id
from gigavim_pipelines.tables import plain

log = logging.getLogger(f"gigavim.{__name__}")

MANIFEST_SUFFIXES = frozenset((".csv", ".tsv", ".parquet"))
COLUMNS = ("slide", "id", "mpp", "mask", "label")
ALIASES = {"wsi": "slide", "image_path": "slide", "spacing_at_level_0": "mpp", "sample_id": "id",
           "mask_path": "mask"}  # fmt: skip
"""What TRIDENT and slide2vec call the same."""
LEAST_MPP = 1e-4
"""Micrometres: a tenth of a nanometre, which is less than any microscope's pixel."""
OWN = ("reason", "error")
"""Columns of the lists of failed slides that a run writes, which are manifests too."""


def read_manifest(path: str | Path) -> list[Entry]:
    """Read a manifest.

    Raises:
        SettingsError: it cannot be read, lacks a column, or a row makes no sense; rows are named.
    """
    try:
        rows = list(_rows(path))
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: is not UTF-8 text; save it as CSV UTF-8.") from error
    if not rows:
        raise SettingsError(f"{path}: holds no slides.")
    names = _columns(path, [str(name) for name in rows[0][1]])
    entries = [_entry(path, line, row, names) for line, row in rows]
    seen: dict[str, int] = {}
    for (line, _), entry in zip(rows, entries, strict=True):
        first = seen.setdefault(entry.id.casefold(), line) if entry.given else line
        if first != line:
            raise SettingsError(
                f"{path}, row {line}: the id {entry.id!r} is that of row {first} too; give each"
                " slide its own in a column `id`."
            )
    places: dict[str, int] = {}
    for (line, _), entry in zip(rows, entries, strict=True):
        first = places.setdefault(entry.slide, line)
        if first != line:
            raise SettingsError(
                f"{path}, row {line}: the slide {entry.slide} is that of row {first} too; a run"
                " takes each slide once. Leave one row out, or run it to another -o."
            )
    return entries


def _rows(path: str | Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Number (the header is 1) and values of each row that is not empty."""
    content = remote.read_bytes(str(path)) if is_remote(str(path)) else Path(path).read_bytes()
    if str(path).lower().endswith(".parquet"):
        rows: list[dict[str, Any]] = _parquet(path, content)
    else:
        text = content.decode("utf-8-sig")
        head = text.split("\n", 1)[0]
        delimiter = max("\t;,", key=lambda mark: (head.count(mark), mark == ","))
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
        if rows and set(OWN) <= rows[0].keys():
            rows = [_plain(row) for row in rows]
    for line, row in enumerate(rows, start=2):
        if any(value not in (None, "") for value in row.values()):
            yield line, row


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of our own list of failed slides, as it was before it was made safe to look at."""
    return {key: plain(value) if isinstance(value, str) else value for key, value in row.items()}


def _parquet(path: str | Path, content: bytes) -> list[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise SettingsError(
            f"{path}: reading parquet needs pyarrow: pip install 'gigavim[archive]', or use a csv."
        ) from error
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content))
    except pyarrow.ArrowInvalid as error:
        raise SettingsError(f"{path}: is no valid parquet file: {error}") from error
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _columns(path: str | Path, header: list[str]) -> dict[str, str]:
    """The file's own name of each column that it has."""
    names: dict[str, str] = {}
    strange = []
    for own in header:
        name = own.strip().lower()
        name = ALIASES.get(name, name)
        if name in COLUMNS:
            names[name] = own
        elif name not in OWN:
            strange.append(own)
    for own in strange:
        close = difflib.get_close_matches(own.strip().lower(), COLUMNS, n=1, cutoff=0.6)
        if close and close[0] not in names:
            raise SettingsError(f"{path}: unknown column {own!r}. Did you mean `{close[0]}`?")
    if "slide" not in names:
        raise SettingsError(
            f"{path}: has no column `slide`; it has {', '.join(header) or 'none'}. A manifest's"
            f" columns are {', '.join(COLUMNS)}, of which only slide is needed."
        )
    if strange:
        log.info("%s: not used: %s", path, ", ".join(strange))
    return names


def _entry(path: str | Path, line: int, row: Mapping[str, Any], names: Mapping[str, str]) -> Entry:
    where = f"{path}, row {line}"
    values = {name: row.get(own) for name, own in names.items()}
    text = {
        name: "" if value is None or value != value else str(value).strip()
        for name, value in values.items()
    }
    if not text["slide"]:
        raise SettingsError(f"{where}: the slide is missing.")
    slide = _absolute(text["slide"], path)
    given = text.get("id")
    mask = text.get("mask")
    return Entry(
        id=check_id(given, where=where) if given else safe_id(result_stem(Path(slide))),
        slide=slide,
        mpp=_mpp(text.get("mpp", ""), where),
        mask=_absolute(mask, path) if mask else None,
        label=text.get("label") or None,
        given=bool(given),
    )


def _absolute(name: str, manifest: str | Path) -> str:
    if is_remote(name):
        return name
    if is_remote(str(manifest)):
        return name if name.startswith("/") else f"{str(manifest).rsplit('/', 1)[0]}/{name}"
    return str(Path(manifest).absolute().parent / Path(name).expanduser())


def _mpp(text: str, where: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not LEAST_MPP <= value < 1e7:
        raise SettingsError(
            f"{where}: mpp is {text!r}; micrometres per pixel are wanted, such as 0.25, or nothing."
        )
    return value
