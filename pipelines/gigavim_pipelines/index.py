"""The index of an archive: one row per slide, for analysts, as csv and as parquet."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gigavim.errors import GigavimError
from gigavim.outputs.atomic import atomic_path
from gigavim_pipelines.folders import Archive
from gigavim_pipelines.ledger import read_ledgers
from gigavim_pipelines.record import Record
from gigavim_pipelines.tables import write_csv

log = logging.getLogger(f"gigavim.{__name__}")

Row = dict[str, Any]

EMBEDDING = "embedding"
_HEAD = (
    "id", "slide", "label", "state", "reason", "error", "folder", "store", "size_bytes", "seconds",
    "peak_bytes", "width_px", "height_px", "mpp", "tokens", "unreadable_fraction", "warnings",
)  # fmt: skip
_FROM_LEDGER = (
    "id", "slide", "label", "state", "reason", "error", "size_bytes", "seconds", "peak_bytes",
)  # fmt: skip
_QUALITY = ("tissue_fraction", "tissue_mm2", "fine_detail", "blurred_fraction", "saturation")


def read_index(out: Path) -> list[Row]:
    """One row per slide that a run knows, in order of id.

    Slides that their archive no longer has (state "removed") are there as long as their results.

    Beyond the usual columns there are `fraction NAME` and `area_mm2 NAME` (`area_ha` for rasters)
    per class, and measures of quality. Paths are relative to the folder; `store` is that of the
    embeddings, else of the label map.

    Raises:
        OutputError: no batch ran there.
    """
    archive = Archive(out)
    slides, _ = read_ledgers(out)
    return [_row(archive, slide) for slide in sorted(slides, key=lambda slide: str(slide["id"]))]


def write_index(out: Path, rows: list[Row]) -> list[Path]:
    """Write index.csv, and index.parquet with each slide's embedding if pyarrow is there.

    Returns:
        The files written.
    """
    columns = [*_HEAD, *dict.fromkeys(key for row in rows for key in row if key not in _HEAD)]
    written = [out / "index.csv"]
    write_csv(written[0], columns, rows)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        log.warning("index.csv only: index.parquet needs pyarrow: pip install 'gigavim[archive]'.")
        return written
    table = pyarrow.table({name: _column(pyarrow, rows, name) for name in columns})
    embeddings = [_embedding(out, row) for row in rows]
    if any(vector is not None for vector in embeddings):
        column = pyarrow.array(embeddings, pyarrow.list_(pyarrow.float32()))
        table = table.append_column(EMBEDDING, column)
    written.append(out / "index.parquet")
    with atomic_path(written[1], overwrite=True) as partial:
        pyarrow.parquet.write_table(table, partial)
    return written


def _row(archive: Archive, slide: Row) -> Row:
    row: Row = {name: slide.get(name) for name in ("id", "slide", "label", "state")}
    row |= {
        name: slide[name] for name in ("reason", "error", "size_bytes", "seconds", "peak_bytes")
    }
    if slide["state"] in ("done", "removed"):
        record = archive.record(slide["id"])
        # Without a record it is not done: the next run makes it again.
        row |= dict(_facts(archive, record)) if record is not None else {"state": "waiting"}
    return row


def _facts(archive: Archive, record: Record) -> Iterator[tuple[str, Any]]:
    """What a record says of the slide."""
    summary = record.summary
    yield "folder", (archive.slides / record.id).relative_to(archive.root).as_posix()
    stores = [record.outputs[kind].path for kind in ("store", "ome-tiff", "geotiff")
              if kind in record.outputs]  # fmt: skip
    if stores:
        yield "store", f"slides/{record.id}/{stores[0]}"
    size = _mapping(summary.get("map")) or summary
    tokens, coverage = summary.get("tokens"), _mapping(summary.get("coverage"))
    yield "width_px", _whole(size.get("width_px"))
    yield "height_px", _whole(size.get("height_px"))
    yield "mpp", _number(size.get("mpp_x", size.get("mpp")))
    yield "tokens", _whole(_mapping(tokens).get("count") if isinstance(tokens, dict) else tokens)
    yield "unreadable_fraction", _number(coverage.get("unreadable"))
    yield "warnings", "; ".join(map(str, _listed(summary.get("warnings")))) or None
    for entry in map(_mapping, _listed(summary.get("classes"))):
        for key in ("fraction", "area_mm2", "area_ha"):
            if "name" in entry and key in entry:
                yield f"{key} {entry['name']}", _number(entry[key])
    for key in _QUALITY:
        if key in summary:
            yield key, _number(summary[key])


def _mapping(value: Any) -> dict[str, Any]:
    """A part of a summary, which may be that of anybody's task: empty if it is no mapping."""
    return value if isinstance(value, dict) else {}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None or abs(number) >= 1 << 63 else int(number)


def _column(pyarrow: Any, rows: list[Row], name: str) -> Any:
    """Values of the type that they share; as text where they share none."""
    values = [row.get(name) for row in rows]
    if name in ("id", "slide", "label", "state", "reason", "error", "folder", "store", "warnings"):
        return pyarrow.array(values, pyarrow.string())
    if name in ("size_bytes", "peak_bytes", "width_px", "height_px", "tokens"):
        return pyarrow.array(values, pyarrow.int64())
    return pyarrow.array(values, pyarrow.float64())


def _embedding(out: Path, row: Row) -> Any:
    """The slide embedding of a row's store: (D,) float32, or None."""
    if not str(row.get("store") or "").endswith(".zarr"):
        return None
    import gigavim

    try:
        return gigavim.open_embeddings(out / row["store"]).slide_embedding
    except GigavimError as error:
        log.warning("%s", error)
        return None
