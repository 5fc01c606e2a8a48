"""Progress bars: one per stage, with its own unit a second."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click
from tqdm import tqdm

from gigavim.progress import Advance


class Bars:
    """tqdm bars on a terminal; one finished line per stage where the output is a file or a pipe."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty()

    @contextmanager
    def stage(self, name: str, total: float, unit: str) -> Iterator[Advance]:
        """Show a stage of `total` units of work."""
        started = time.perf_counter()
        with tqdm(
            total=total,
            unit=f" {unit}",
            unit_scale=unit == "tokens",
            desc=f"{name:>8}",
            disable=self._quiet or not self._terminal,
            bar_format=_FORMAT.replace("AMOUNT", _AMOUNTS.get(unit, _COUNT)),
            file=sys.stderr,
        ) as bar:
            yield lambda amount: _advance(bar, amount)
        if not self._quiet and not self._terminal:
            seconds = max(time.perf_counter() - started, 1e-9)
            decimals = 1 if unit == "Mpx" else 0
            amount, rate = (f"{value:,.{decimals}f} {unit}" for value in (total, total / seconds))
            speed = "" if unit == "files" else f" ({rate}/s)"
            click.echo(f"{name:>8}: {amount} in {seconds:.1f} s{speed}", err=True)


_FORMAT = "{desc} {percentage:3.0f}%|{bar:24}| AMOUNT{unit} [{elapsed}<{remaining}, {rate_fmt}]"
_COUNT = "{n_fmt}/{total_fmt}"
_AMOUNTS = {"Mpx": "{n:.1f}/{total:.1f}"}


def _advance(bar: "tqdm[None]", amount: float) -> None:
    # A sum of fractions may end a hair above the total, which tqdm would print as overrun.
    bar.update(min(amount, bar.total - bar.n))
