"""How a batch shows itself while it runs, and at its end."""

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import click
from tqdm import tqdm

if TYPE_CHECKING:
    from gigavim_pipelines.entries import Entry
    from gigavim_pipelines.failures import Failure
    from gigavim_pipelines.recipe import Recipe
    from gigavim_pipelines.record import Record
    from gigavim_pipelines.resume import Verdict
    from gigavim_pipelines.run import Batch, Options

MOST_SHOWN = 50
"""Failed slides on the screen; the file has them all."""


class Lines:
    """A bar on a terminal, a line per slide elsewhere; failures are told either way."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bar: tqdm[None] | None = None
        self._total = self._ended = self._failed = 0
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def start(self, todo: Sequence["Verdict"], skipped: int, workers: int) -> None:
        """Say what there is to do."""
        self._total = len(todo)
        if self._quiet:
            return
        again = Counter(verdict.reason for verdict in todo if verdict.reason != "new")
        parts = [f"{len(todo)} to do"] + [f"{skipped} done before"] * bool(skipped)
        parts += [f"{count} because {reason}" for reason, count in again.items()]
        slides = f"{counted(len(todo) + skipped, 'slide')}: {', '.join(parts)}"
        if workers:
            slides += f"; {counted(workers, 'worker')}"
        elif todo:
            slides += "; waiting for the first worker"
        click.echo(slides, err=True)
        if todo and self._terminal:
            self._bar = tqdm(total=len(todo), unit=" slides", file=sys.stderr, smoothing=0.1)

    def done(self, record: "Record") -> None:
        """Count a finished slide."""
        self._advance()
        if self._bar is None and not self._quiet:
            click.echo(f"{self._count()} {record.id}: done in {record.seconds:.1f} s", err=True)

    def tried(self, entry: "Entry", failure: "Failure", *, last: bool) -> None:
        """Tell of a failed attempt."""
        if last:
            self._failed += 1
            self._advance()
        if last or not self._quiet:
            what = "failed" if last else "will be tried again"
            text = f"{self._count()} {entry.id}: {what}: {failure.reason}: {failure.message}"
            if self._bar is None:
                click.echo(text, err=True)
            else:
                self._bar.write(text, file=sys.stderr)

    def _advance(self) -> None:
        self._ended += 1
        if self._bar is not None:
            self._bar.set_postfix(failed=self._failed, refresh=False)
            self._bar.update()

    def _count(self) -> str:
        return f"[{self._ended}/{self._total}]"


def summary_lines(batch: "Batch", rerun: str, out: Path) -> Iterator[str]:
    """What was done, and last what failed and how to run it again."""
    took = time.strftime("%H:%M:%S", time.gmtime(batch.seconds))
    done = f"{counted(batch.done, 'slide')} done in {took}"
    if batch.skipped:
        done += f", {batch.skipped} done before"
    if batch.removed:
        done += f", {batch.removed} no longer in the archive (what was made of them stays)"
    yield f"\n{done}; results in {out}"
    if batch.failed:
        yield from failed_lines(
            [(entry.id, why.reason, why.message, why.advice) for entry, why in batch.failed],
            batch.slides, rerun, out,
        )  # fmt: skip


def failed_lines(
    failed: Sequence[tuple[str, str, str, str]], slides: int, rerun: str, out: Path
) -> Iterator[str]:
    """Each failed slide (id, reason, message, advice), then the command to run them again."""
    yield f"{len(failed)} of {counted(slides, 'slide')} failed:"
    for name, reason, message, advice in failed[:MOST_SHOWN]:
        yield f"  {name}: {reason}: {message}"
        if not advice.startswith("see the message"):
            yield f"    {advice.replace('its log', str(out / 'logs' / f'{name}.log'))}"
    if len(failed) > MOST_SHOWN:
        yield f"  ... and {len(failed) - MOST_SHOWN} more in {out / 'failed.csv'}"
    yield "Run them again with:"
    yield f"  {rerun}"


def dry_run(
    entries: Sequence["Entry"], recipe: "Recipe", out: Path, options: "Options"
) -> Iterator[str]:
    """Which slides a batch would process, and why; nothing is written."""
    from gigavim_pipelines.entries import shard
    from gigavim_pipelines.folders import Archive
    from gigavim_pipelines.resume import sort_out

    if options.shard is not None:
        entries = shard(entries, *options.shard)
    done = 0
    judged = sort_out(
        entries, Archive(out), recipe.identity(), verify=options.verify, overwrite=options.overwrite
    )
    for verdict in judged:
        if verdict.reason or options.overwrite:
            yield f"{verdict.entry.id}\t{verdict.entry.slide}\t{verdict.reason or '--overwrite'}"
        else:
            done += 1
    slides = counted(len(entries), "slide")
    yield f"{len(entries) - done} of {slides} would be processed, {done} done before."


def counted(number: int, what: str) -> str:
    """A number of things, in words: "1 slide", "2 slides"."""
    return f"{number} {what}{'' if number == 1 else 's'}"
