"""The report of an archive: one HTML file that needs nothing but itself to be looked at."""

import base64
import time
from collections import defaultdict
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gigavim import __version__
from gigavim.engine.memory import format_bytes
from gigavim.outputs.atomic import atomic_path
from gigavim_pipelines.folders import Archive
from gigavim_pipelines.index import Row, read_index, write_index
from gigavim_pipelines.status import Status, read_status
from gigavim_pipelines.thumbnails import THUMBNAIL

REPORT_NAME = "report.html"
MOST_INLINE = 2000
"""Pictures of larger archives are those in the slides' folders, loaded as they come into view."""
BINS = 60
"""Bars of the picture of slides done over time."""


def write_listings(out: Path) -> list[Path]:
    """Write the index and the report of an output folder; return the files.

    Raises:
        OutputError: no batch ran there, or they cannot be written.
    """
    rows = read_index(out)
    return [*write_index(out, rows), write_report(out, rows)]


def write_report(out: Path, rows: list[Row]) -> Path:
    """Write report.html: class areas, failures, throughput, and a sortable table of slides."""
    from jinja2 import Environment, select_autoescape

    source = resources.files("gigavim_pipelines").joinpath("report.html.jinja")
    template = Environment(
        autoescape=select_autoescape(default_for_string=True), trim_blocks=True, lstrip_blocks=True
    ).from_string(source.read_text(encoding="utf-8"))
    status = read_status(out)
    classes = _classes(rows)
    page = template.stream(
        name=out.resolve().name,
        version=__version__,
        written=time.strftime("%Y-%m-%d %H:%M"),
        cards=_cards(status, rows),
        classes=classes,
        totals=_totals(rows, classes),
        extras=_extras(rows),
        slides=(_slide(out, row, len(rows) <= MOST_INLINE) for row in rows),
        failed=[row | {"log": _log(out, row["id"])} for row in status.failed],
        rerun=status.rerun,
        bars=_bars(out, rows),
        several=len(rows) > 1,
    )
    path = out / REPORT_NAME
    with atomic_path(path, overwrite=True) as partial, partial.open("wb") as file:
        page.dump(file, encoding="utf-8")
    return path


def _cards(status: Status, rows: list[Row]) -> list[tuple[str, str]]:
    """Figures at a glance: (what, how much)."""
    done = [row for row in rows if row["state"] == "done"]
    seconds = sum(row["seconds"] or 0 for row in done)
    pixels = sum((row.get("width_px") or 0) * (row.get("height_px") or 0) for row in done)
    cards = [("slides", f"{status.slides:,}"), ("done", f"{status.counts['done']:,}")]
    cards += [("failed", f"{status.counts['failed']:,}")]
    left = status.counts["waiting"] + status.counts["running"]
    cards += [("not done yet", f"{left:,}")] * bool(left)
    cards += [("removed", f"{status.counts['removed']:,}")] * bool(status.counts["removed"])
    if status.slides_per_hour:
        cards.append(("slides an hour", f"{status.slides_per_hour:,.0f}"))
    if seconds and pixels:
        cards.append(("per worker", f"{pixels / seconds / 1e6:,.1f} Mpx/s"))
    if status.peak_bytes:
        cards.append(("most memory", format_bytes(status.peak_bytes)))
    return cards


def _classes(rows: list[Row]) -> list[str]:
    """Names of all classes, as they come."""
    names = (key.split(" ", 1)[1] for row in rows for key in row if key.startswith("fraction "))
    return list(dict.fromkeys(names))


def _totals(rows: list[Row], classes: list[str]) -> list[dict[str, Any]]:
    """Each class's area over what the archive has, and the mean of its shares."""
    totals, rows = [], [row for row in rows if row["state"] == "done"]
    for name in classes:
        shares = [
            row[f"fraction {name}"] for row in rows if row.get(f"fraction {name}") is not None
        ]
        if not shares:
            continue
        areas = {
            unit: sum(row.get(f"area_{key} {name}") or 0 for row in rows)
            for key, unit in (("mm2", "mm²"), ("ha", "ha"))
        }
        text = " + ".join(f"{area:,.2f} {unit}" for unit, area in areas.items() if area)
        totals.append({"name": name, "share": sum(shares) / len(shares), "area": text})
    return totals


def _extras(rows: list[Row]) -> list[str]:
    """Measures of quality that some slide has."""
    wanted = ("tissue_fraction", "fine_detail", "blurred_fraction", "saturation")
    return [key for key in wanted if any(row.get(key) is not None for row in rows)]


def _slide(out: Path, row: Row, inline: bool) -> dict[str, Any]:
    folder = row.get("folder")
    shown = dict(row) | {"href": quote(folder) + "/" if folder else None, "picture": None}
    if folder:
        record = Archive(out).record(row["id"])
        outputs = record.outputs if record is not None else {}
        shown["outputs"] = {
            kind: f"{quote(folder)}/{quote(output.path)}"
            for kind, output in outputs.items()
            if kind != THUMBNAIL
        }
        if THUMBNAIL in outputs:
            shown["picture"] = _picture(out, f"{folder}/{outputs[THUMBNAIL].path}", inline)
    return shown


def _picture(out: Path, path: str, inline: bool) -> str | None:
    """The address of a picture: itself, or a path from the report."""
    if not inline:
        return quote(path)
    try:
        return f"data:image/jpeg;base64,{base64.b64encode((out / path).read_bytes()).decode()}"
    except OSError:
        return None


def _bars(out: Path, rows: list[Row]) -> list[dict[str, float]]:
    """Slides done in equal spans of time: where each bar stands, and its height from 0 to 1."""
    ends = []
    for row in rows:
        record = Archive(out).record(row["id"]) if row["state"] == "done" else None
        if record is not None:
            ends.append(record.started + record.seconds)
    if len(ends) < 2 or max(ends) <= min(ends):
        return []
    first, span = min(ends), max(ends) - min(ends)
    counts: defaultdict[int, int] = defaultdict(int)
    for end in ends:
        counts[min(int((end - first) / span * BINS), BINS - 1)] += 1
    most = max(counts.values())
    return [{"x": bin_, "height": count / most} for bin_, count in sorted(counts.items())]


def _log(out: Path, slide_id: str) -> str | None:
    log = Archive(out).logs / f"{slide_id}.log"
    return quote(log.relative_to(out).as_posix()) if log.exists() else None
