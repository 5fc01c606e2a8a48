"""Options that several commands share, so that a flag is spelled the same everywhere."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from gigavim.errors import SettingsError

Function = Callable[..., Any]
Decorator = Callable[[Function], Function]

_LEVELS = [logging.WARNING, logging.INFO, logging.DEBUG]


def verbosity(function: Function) -> Function:
    """-v and -q, understood before and after the command's name."""
    for flag in (
        click.option(
            "-q", "--quiet", is_flag=True, expose_value=False, callback=_set_quiet,
            help="Say nothing but errors.",
        ),
        click.option(
            "-v", "--verbose", count=True, expose_value=False, callback=_set_verbose,
            help="Say more (-vv: more still); show tracebacks.",
        ),
    ):  # fmt: skip
        function = flag(function)
    return function


def _set_verbose(ctx: click.Context, param: click.Parameter, value: int) -> None:
    # What libraries log about a damaged file is said by our own one-line error: only -v shows it.
    logging.basicConfig(level=logging.CRITICAL, format="%(levelname)s: %(message)s")
    if value:
        logging.getLogger().setLevel(logging.WARNING)
    if value or ctx.parent is None:
        _logger.setLevel(_LEVELS[min(value, 2)])


def _set_quiet(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        _logger.setLevel(logging.ERROR)


def wants_tracebacks() -> bool:
    """Whether -v was given."""
    return _logger.getEffectiveLevel() < logging.WARNING


def is_quiet() -> bool:
    """Whether -q was given."""
    return _logger.getEffectiveLevel() > logging.WARNING


_logger = logging.getLogger("gigavim")


def one_line(what: object) -> str:
    """A path, or an error's message, on one line: what is no text in a file name is written out."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in str(what))


def inputs(**attrs: Any) -> Decorator:
    """INPUT...: slides, each a file or a folder that is one slide (DICOM, OME-Zarr).

    Existence is not checked here: the slide's own error says more.
    """
    return click.argument("inputs", metavar="INPUT...", nargs=-1, required=True, type=Path, **attrs)


def channels(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int] | None:
    """Parse "0,1,2".

    Raises:
        click.BadParameter: not three channel numbers.
    """
    if value is None:
        return None
    parts = value.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise click.BadParameter("three channel numbers are wanted, such as 0,1,2", ctx, param)
    return [int(part) for part in parts]


def size(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Let a size of memory through as it is written, such as "4GB", or "auto".

    Raises:
        click.BadParameter: no size.
    """
    from gigavim.engine.memory import parse_bytes

    if value is not None and value != "auto":
        try:
            parse_bytes(value)
        except SettingsError as error:
            raise click.BadParameter(str(error), ctx, param) from error
    return value


def device(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Let the name of a device through, whether it is there or not.

    Raises:
        click.BadParameter: no name of a device.
    """
    if value is not None and not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        raise click.BadParameter(f"{value!r} is none of auto, cpu, cuda, cuda:1, mps", ctx, param)
    return value


slide_mpp = click.option(
    "--slide-mpp",
    type=click.FloatRange(min=0, min_open=True),
    metavar="UM",
    help="Micrometres per level-0 pixel, for files that do not say or say it wrong.",
)
channels_option = click.option(
    "--channels",
    callback=channels,
    metavar="R,G,B",
    help="Channels to use as red, green and blue, for multiplex images: 0,1,2.",
)
config = click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Settings file [default: gigavim.toml in the current folder, if there].",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON to standard output.")
