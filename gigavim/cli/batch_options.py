"""What the flags of `gigavim batch` mean, found out before anything is made."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from gigavim.errors import SettingsError

_ADDRESS = re.compile(r"(?:(?:tcp|tls|ws|wss|ucx|ucxx)://)?(?:[\w.-]+|\[[0-9a-fA-F:]+\]):(\d{1,5})")
_PORT = re.compile(r"(?:(?:[\w.-]+|\[[0-9a-fA-F:]+\])?:)?(\d{1,5})")

NOT_AGAIN = frozenset(
    ("recipe", "archives", "output", "list_only", "suffixes", "shard", "overwrite", "verify",
     "dry_run", "as_json", "quiet", "verbose")
)  # fmt: skip
"""Parameters that say nothing of how failed slides are to be run again."""


def local_folder(ctx: click.Context, param: click.Parameter, value: str) -> Path:
    """A folder; a URL would become one of that name, and nothing at all the current one."""
    if not value.strip():
        raise click.BadParameter("it is empty: is a variable of your shell not set?", ctx, param)
    if re.match(r"[a-z0-9+]{2,}:/", value):
        raise click.BadParameter(
            "results are written to a local folder; copy it to a URL afterwards", ctx, param
        )
    return Path(value)


def span(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """A span of time such as 90s or 6h."""
    from gigavim_pipelines.recipe_sections import seconds

    return _checked(seconds, ctx, param, value)


def size(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """A size such as 8GB, or auto."""
    from gigavim.engine.memory import parse_bytes

    return value if value == "auto" else _checked(parse_bytes, ctx, param, value)


def _checked(
    parse: Callable[[str], Any], ctx: click.Context, param: click.Parameter, value: str | None
) -> str | None:
    if value is not None:
        try:
            parse(value)
        except (ValueError, SettingsError) as error:
            raise click.BadParameter(f"{error}.", ctx, param) from error
    return value


def scheduler(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """A dask scheduler's address."""
    return _matching(
        _ADDRESS, "it is written like tcp://host:8786, as `dask scheduler` prints it",
        ctx, param, value,
    )  # fmt: skip


def dashboard(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """A port, with or without the address to listen at."""
    wrong = "a port is wanted, such as :8787, or 0.0.0.0:8787 for other machines to see it"
    value = _matching(_PORT, wrong, ctx, param, value)
    return f":{value}" if value is not None and value.isdecimal() else value


def _matching(
    pattern: re.Pattern[str],
    wanted: str,
    ctx: click.Context,
    param: click.Parameter,
    value: str | None,
) -> str | None:
    if value is not None:
        found = pattern.fullmatch(value)
        if found is None or int(found[1]) > 65_535:
            raise click.BadParameter(f"{value!r}: {wanted}.", ctx, param)
    return value


def shard(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """Part and parts."""
    if value is None:
        return None
    part, slash, parts = value.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise click.BadParameter(
            f"{value!r}: two numbers are wanted, part I of N from 1: 3/10.", ctx, param
        )
    return int(part), int(parts)


def slurm_shard() -> tuple[int, int] | None:
    """This task's part of a Slurm array, or None outside of arrays of several tasks.

    Raises:
        click.UsageError: the array's numbers have gaps, so that no task knows its place.
    """
    if not os.environ.get("SLURM_ARRAY_TASK_ID"):
        return None
    names = ("ID", "MIN", "MAX", "STEP", "COUNT")
    values = [os.environ.get(f"SLURM_ARRAY_TASK_{name}", "") for name in names]
    if not all(value.isdecimal() for value in values):
        raise click.UsageError("the Slurm array does not say all of itself: give --shard I/N.")
    task, least, most, step, count = map(int, values)
    if count == 1:
        click.echo(
            "the Slurm array has one task: it takes all slides (one part of more: --shard I/N)",
            err=True,
        )
        return None
    if step < 1 or (most - least) // step + 1 != count or (task - least) % step:
        raise click.UsageError(
            f"the Slurm array has {count} tasks from {least} to {most}, with gaps, so that a task"
            " does not know its place: give --shard I/N, or use an array without gaps."
        )
    part = (task - least) // step + 1
    click.echo(f"part {part} of {count}, as the Slurm array says", err=True)
    return part, count


def given_again(ctx: click.Context) -> list[str]:
    """The options of this call that concern its failed slides too, as words of a command."""
    words: list[str] = []
    for param in ctx.command.params:
        name = param.name or ""
        source = ctx.get_parameter_source(name)
        if name in NOT_AGAIN or source is not click.core.ParameterSource.COMMANDLINE:
            continue
        flag = max(param.opts, key=len)
        values = ctx.params[name] if param.multiple else [ctx.params[name]]
        words += [word for value in values for word in (flag, str(value))]
    return words
