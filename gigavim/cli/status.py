"""`gigavim status`: how a batch stands."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gigavim.cli import options
from gigavim.cli.batch_progress import failed_lines

if TYPE_CHECKING:
    from gigavim_pipelines.status import Status

MOST_RUNNING = 20


@click.command("status")
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--watch",
    is_flag=False,
    flag_value=2.0,
    type=click.FloatRange(min=0.1),
    metavar="[SECONDS]",
    help="Show it again every 2 s, or so many, until the run ends.",
)
@click.option("--report", is_flag=True, help="Write index and report.html of what is done so far.")
@options.as_json
@options.verbosity
def command(out: Path, watch: float | None, report: bool, as_json: bool) -> int:
    """Say how a batch stands: slides by state, speed, what runs, what failed and why.

    OUT is the output folder of `gigavim batch`, at work or not. Exit code 3: slides failed.

    \b
    Examples:
      gigavim status results
      gigavim status results --watch
      gigavim status results --json | jq .failed_slides
    """  # fmt: skip
    from gigavim_pipelines.status import read_status

    status = read_status(out)
    while watch is not None and status.at_work:
        if not as_json:
            click.clear()
        _show(status, as_json=as_json)
        time.sleep(watch)
        status = read_status(out)
    _show(status, as_json=as_json)
    if report:
        from gigavim_pipelines.report import write_listings

        for path in write_listings(out):
            click.echo(f"  wrote {path}", err=True)
    return 3 if status.failed else 0


def _show(status: "Status", *, as_json: bool) -> None:
    if as_json:
        import orjson

        click.echo(orjson.dumps(status.facts()).decode())
    else:
        click.echo("\n".join(_table(status)))


def _table(status: "Status") -> Iterator[str]:
    from gigavim.engine.memory import format_bytes

    for state, count in status.counts.items():
        share = count / max(status.slides, 1)
        if state != "removed":
            yield f"  {state:<8} {count:>8,}  {share:7.1%}"
        elif count:
            yield f"  {state:<8} {count:>8,}  no longer in their archive; their results stay"
    if status.slides_per_hour is not None:
        left = "" if status.seconds_left is None else f", {_span(status.seconds_left)} left"
        yield f"  speed    {status.slides_per_hour:>8,.0f}  slides an hour{left}"
    if status.peak_bytes:
        yield f"  memory   {format_bytes(status.peak_bytes)} at most in a worker"
    if status.counts["waiting"] and not status.at_work:
        yield "  no run is at work; the command that began it goes on with what is waiting"
    for row in status.running[:MOST_RUNNING]:
        spent = _span(time.time() - row["started"])
        again = f", attempt {row['attempts']}" if row["attempts"] > 1 else ""
        yield f"  running  {row['id']} for {spent}{again}"
    if status.failed:
        for reason, count in status.reasons.items():
            yield f"  {count} failed: {reason}"
        rows = [(row["id"], row["reason"], row["error"], row["advice"]) for row in status.failed]
        yield ""
        yield from failed_lines(rows, status.slides, status.rerun, status.out)


def _span(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"
