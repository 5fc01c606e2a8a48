"""How a run stands, from its ledgers: for people, for programs, and as a list of what failed."""

import socket
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from gigavim.errors import OutputError
from gigavim_pipelines.ledger import at_work, read_ledgers
from gigavim_pipelines.tables import write_csv

FAILED_NAME = "failed.csv"
RECENT_S = 3600.0
"""The rate is that of the last hour: slides differ, and so do nights."""


@dataclass(frozen=True, slots=True)
class Status:
    """How the slides of an output folder stand."""

    out: Path
    counts: dict[str, int]
    """Slides by state: waiting, running, done, failed, and removed from their archive."""
    reasons: dict[str, int]
    """Failed slides by reason."""
    running: list[dict[str, Any]]
    """Rows of the ledger."""
    failed: list[dict[str, Any]]
    runs: list[dict[str, Any]]
    at_work: bool
    """Whether a run is at work on them now."""
    slides_per_hour: float | None
    seconds_left: float | None
    peak_bytes: int
    """Most memory that a worker held for a finished slide."""

    @property
    def slides(self) -> int:
        """How many the archive has."""
        return sum(count for state, count in self.counts.items() if state != "removed")

    @property
    def rerun(self) -> str:
        """The command that runs the failed slides again."""
        return str(self.runs[-1]["rerun"]) if self.runs else ""

    def facts(self) -> dict[str, Any]:
        """Plain data, for programs."""
        keys = ("id", "slide", "reason", "error", "advice", "attempts")
        return {
            "out": str(self.out),
            "at_work": self.at_work,
            "slides": self.slides,
            **self.counts,
            "reasons": self.reasons,
            "slides_per_hour": self.slides_per_hour,
            "seconds_left": self.seconds_left,
            "peak_bytes": self.peak_bytes,
            "running_slides": [
                {key: row[key] for key in ("id", "slide", "attempts", "started")}
                for row in self.running
            ],
            "failed_slides": [{key: row[key] for key in keys} for row in self.failed],
            "runs": self.runs,
        }


def read_status(out: Path) -> Status:
    """Read the ledgers of an output folder.

    Raises:
        OutputError: no batch ran there, or a ledger cannot be read.
    """
    slides, runs = read_ledgers(out)
    if not runs:
        raise OutputError(f"{out}: holds no ledger, so no batch ran there; name a run's -o folder.")
    busy = at_work(out)
    if busy is None:
        busy = any(run["ended"] is None and _may_live(run) for run in runs)
    if not busy:
        # What a killed run had begun is begun by none.
        slides = [
            row | {"state": "waiting"} if row["state"] == "running" else row for row in slides
        ]
    by_state = Counter(row["state"] for row in slides)
    states = ("waiting", "running", "done", "failed", "removed")
    counts = {state: by_state[state] for state in states}
    failed = sorted((row for row in slides if row["state"] == "failed"), key=lambda row: row["id"])
    running = [row for row in slides if row["state"] == "running"]
    rate = _rate([row for row in slides if row["state"] == "done"], runs)
    left = counts["waiting"] + counts["running"]
    return Status(
        out=out,
        counts=counts,
        reasons=dict(Counter(row["reason"] for row in failed).most_common()),
        running=sorted(running, key=lambda row: float(row["started"])),
        failed=failed,
        runs=runs,
        at_work=busy,
        slides_per_hour=rate,
        seconds_left=left / rate * 3600 if rate and left and busy else None,
        peak_bytes=max((row["peak_bytes"] or 0 for row in slides), default=0),
    )


def write_failed(out: Path) -> Path | None:
    """Write the failed slides of a folder as a manifest to run again; None if there are none."""
    path = out / FAILED_NAME
    failed = read_status(out).failed
    if not failed:
        path.unlink(missing_ok=True)
        return None
    columns = ("slide", "id", "mpp", "mask", "label", "reason", "error")
    write_csv(path, columns, [{name: row[name] for name in columns} for row in failed])
    return path


def _may_live(run: dict[str, Any]) -> bool:
    """Whether a run's process may be there; of other machines that cannot be known."""
    return bool(run["host"] != socket.gethostname() or psutil.pid_exists(run["pid"]))


def _rate(done: list[dict[str, Any]], runs: list[dict[str, Any]]) -> float | None:
    """Slides an hour, over the last hour of the latest run."""
    if not done or not runs:
        return None
    ends = [row["started"] + row["seconds"] for row in done]
    until = time.time() if runs[-1]["ended"] is None else max(ends)
    since = max(until - RECENT_S, min(run["started"] for run in runs[-1:]))
    recent = sum(end >= since for end in ends)
    return round(recent / (until - since) * 3600, 1) if recent and until > since else None
