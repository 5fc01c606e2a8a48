"""The `gigavim` command: a group whose commands are imported only when they run."""

import difflib
import importlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import click

from gigavim import __version__
from gigavim.cli import options
from gigavim.errors import GigavimError

SHORT_SPIN = "GOMP_SPINCOUNT", "20000"
"""Rounds of a loop in which a thread of torch's OpenMP waits for the others before it sleeps, in
place of 300,000. Where other programs use the processors too, each wait may be for a thread that
has none: `gigavim segment` of the sample slide takes 45 s beside a busy program then, and 13 so."""

# name -> (module, one line of help): listing the commands imports none of them.
COMMANDS = {
    "batch": ("gigavim.cli.batch", "Run an archive of slides through a recipe, resumably."),
    "convert": ("gigavim.cli.convert", "Convert embedding stores to other tools' formats."),
    "doctor": ("gigavim.cli.doctor", "Say what runs on this machine, and check that it is right."),
    "embed": ("gigavim.cli.embed", "Embed slides into stores that other tools are fed from."),
    "evaluate": ("gigavim.cli.evaluate", "Score a model on labelled pictures."),
    "info": ("gigavim.cli.info", "Say what a slide or an embedding store is."),
    "models": ("gigavim.cli.models", "List the models that can be used, or show one."),
    "pretrain": ("gigavim.cli.pretrain", "Train an encoder on pictures without labels."),
    "segment": ("gigavim.cli.segment", "Segment slides and write maps that other tools open."),
    "status": ("gigavim.cli.status", "Say how a batch stands: done, running, failed and why."),
    "train": ("gigavim.cli.train", "Train a segmentation model by a recipe."),
    "verify": ("gigavim.cli.verify", "Check embedding stores against their checksums."),
}


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports one to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command, or None."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or say what was probably meant."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            if Path(name).suffix or Path(name).exists():
                hint = f" To segment a slide: gigavim segment {name}"
            ctx.fail(f"No such command {name!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table of commands, written without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in sorted(COMMANDS)])


@click.group(
    cls=LazyGroup,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # Peers spell flags with underscores: both are understood.
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)
@click.version_option(__version__, prog_name="gigavim")
@options.verbosity
def cli() -> None:
    """Whole-slide and aerial images of any size through one Vision Mamba sequence.

    \b
    Examples:
      gigavim segment slide.svs
      gigavim info slide.svs
      gigavim models

    \b
    Exit codes:
      0  all is well
      1  the input, the model or the machine did not allow it; the message says why
      2  the command was not understood
      3  some of several slides failed; the others are done
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit the process.

    Errors of gigavim's own tree become one line on standard error and exit code 1; the traceback is
    shown with -v.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGTERM, _interrupt)
    os.environ.setdefault(*SHORT_SPIN)  # before torch is loaded; workers inherit it
    try:
        sys.exit(_run(arguments))
    except BrokenPipeError:
        # The reader of our output (`head`, say) has gone: silence Python's own complaint at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """A polite request to end cleans up as Ctrl-C does."""
    raise KeyboardInterrupt


def _run(arguments: list[str]) -> int:
    try:
        result: Any = cli.main(args=arguments, prog_name="gigavim", standalone_mode=False)
    except click.Abort:
        click.echo("Interrupted: nothing half-written is left behind.", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except GigavimError as error:
        if options.wants_tracebacks():
            raise
        click.echo(f"Error: {options.one_line(error)}", err=True)
        return 1
    except MemoryError as error:
        if options.wants_tracebacks():
            raise
        reason = str(error) or "no more to be had"
        click.echo(
            f"Error: out of memory ({reason}): close other programs, or raise this process's limit;"
            " a smaller --max-memory moves the tokens to disk.",
            err=True,
        )
        return 1
    except Exception as error:
        if options.wants_tracebacks():
            raise
        click.echo(
            f"Error: unexpected {type(error).__name__}: {error}. This is a defect of gigavim:"
            " please report it with the output of the same command with -v.",
            err=True,
        )
        return 1
    return result if isinstance(result, int) else 0
