"""`gigavim batch`: an archive of slides through one recipe."""

import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gigavim.cli import options

if TYPE_CHECKING:
    from gigavim_pipelines.recipe import Recipe
    from gigavim_pipelines.run import Batch


def _local(ctx: click.Context, param: click.Parameter, value: Path) -> Path:
    """Refuse a URL, which would become a folder of that name."""
    if re.match(r"[a-z0-9+]{2,}:/", value.as_posix()):
        raise click.BadParameter(
            "results are written to a local folder; copy it to a URL afterwards", ctx, param
        )
    return value


@click.command("batch")
@click.argument("recipe", required=False)
@click.argument("archives", metavar="ARCHIVE...", nargs=-1)
@click.option(
    "-o",
    "--output",
    "--results-dir",
    "--job-dir",
    "output",
    type=click.Path(path_type=Path),
    default=Path("gigavim_out"),
    callback=_local,
    show_default=True,
    metavar="DIR",
    help="Folder of the results, the ledger and the report.",
)
@click.option("--list", "list_only", is_flag=True, help="List the shipped recipes, and stop.")
@click.option("--model", metavar="NAME|DIR", help="The recipe with this model.")
@click.option("--device", metavar="NAME", help="auto, cpu, cuda  [default: the recipe's, auto].")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="The recipe with another setting, such as tokens.tissue=none. Repeatable.",
)
@click.option(
    "--wsi-ext",
    "suffixes",
    multiple=True,
    metavar=".EXT",
    help="In folders, take files with this ending only. Repeatable  [default: all slide formats].",
)
@click.option("--workers", type=click.IntRange(min=1), help="Slides at a time on this machine.")
@click.option("--timeout", metavar="TIME", help="Longest time for a slide: 90s, 15m, 6h; 0: any.")
@click.option("--tries", type=click.IntRange(min=1), help="Of a slide whose failure may pass.")
@click.option("--worker-memory", metavar="SIZE", help="A worker is replaced beyond it, say 8GB.")
@click.option("--recycle-after", type=click.IntRange(min=0), help="Slides a worker process lives.")
@click.option(
    "--scheduler", metavar="ADDRESS", help="Use a dask cluster that runs: tcp://host:8786."
)
@click.option("--dashboard", metavar="ADDRESS", help="Show dask's dashboard, at :8787 say.")
@click.option(
    "--shard",
    metavar="I/N",
    help="Only part I of N of the slides  [default: as SLURM_ARRAY_TASK_ID says, else all].",
)
@click.option("--overwrite", is_flag=True, help="Do again what is done; replaces each slide's own.")
@click.option("--verify", is_flag=True, help="Check every result's checksum before it is skipped.")
@click.option("--dry-run", is_flag=True, help="Say which slides would be processed and why.")
@options.as_json
@options.verbosity
def command(
    recipe: str | None, archives: tuple[str, ...], list_only: bool, as_json: bool, **flags: Any
) -> int:
    """Run every slide of an archive through a recipe; start it again and it goes on where it was.

    RECIPE is a name of `gigavim batch --list` or a TOML file. ARCHIVE is a folder, a glob, a
    manifest (csv or parquet with a column slide, and optionally id, mpp, mask, label), a slide, or
    the URL of one of these (s3://...). A slide that is corrupt, hangs or crashes costs only itself.

    \b
    Examples:
      gigavim batch segment slides/ -o results
      gigavim batch segment cohort.csv -o results --workers 4 --timeout 30m
      gigavim batch qc "s3://bucket/scans/*.svs" -o qc
      gigavim status results --watch
    """  # fmt: skip
    from gigavim_pipelines.recipe import list_recipes, load_recipe

    if list_only:
        for name, known in list_recipes().items():
            click.echo(f"{name:<10} {known.recipe.description}")
        return 0
    if recipe is None or not archives:
        raise click.UsageError("give a RECIPE and at least one ARCHIVE, or --list.")
    chosen = _with_flags(load_recipe(recipe, _overrides(flags)), flags)
    return _run(chosen, recipe, archives, flags, as_json=as_json)


def _overrides(flags: dict[str, Any]) -> list[str]:
    """The model is needed early: a recipe may demand one."""
    model = [] if flags["model"] is None else [f"model.name={_quoted(flags['model'])}"]
    return [*model, *flags["overrides"]]


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _with_flags(recipe: "Recipe", flags: dict[str, Any]) -> "Recipe":
    keys = ("workers", "timeout", "tries", "worker_memory", "recycle_after")
    return recipe.with_flags(
        compute={"device": flags["device"]}, batch={key: flags[key] for key in keys}
    )


def _run(
    recipe: "Recipe", name: str, archives: tuple[str, ...], flags: dict[str, Any], *, as_json: bool
) -> int:
    from gigavim.cli.batch_progress import Lines, dry_run, summary_lines
    from gigavim_pipelines.discovery import discover
    from gigavim_pipelines.run import Options, run_batch

    out: Path = flags["output"]
    entries = discover(archives, suffixes=flags["suffixes"], leave_out=out)
    chosen = Options(
        scheduler=flags["scheduler"],
        shard=_shard(flags["shard"]),
        overwrite=flags["overwrite"],
        verify=flags["verify"],
        dashboard=flags["dashboard"],
        command=shlex.join(["gigavim", *sys.argv[1:]]),
        rerun=_rerun(name, flags),
    )
    if flags["dry_run"]:
        click.echo("\n".join(dry_run(entries, recipe, out, chosen)))
        return 0
    try:
        with Lines(quiet=options.is_quiet()) as lines:
            batch = run_batch(entries, recipe, out, options=chosen, watcher=lines)
    except KeyboardInterrupt:
        click.echo("\nFinished slides are safe: the same command goes on with the rest.", err=True)
        raise
    if as_json:
        import orjson

        click.echo(orjson.dumps(_facts(batch)).decode())
    if not options.is_quiet() or batch.failed:
        click.echo("\n".join(summary_lines(batch, chosen.rerun, out)), err=True)
    return 3 if batch.failed else 0


def _rerun(recipe: str, flags: dict[str, Any]) -> str:
    """The command for the slides that failed, with the flags that make results what they are."""
    out: Path = flags["output"]
    words = ["gigavim", "batch", recipe, str(out / "failed.csv"), "-o", str(out)]
    for name in ("model", "device", "workers", "timeout", "worker_memory", "scheduler"):
        if flags[name] is not None:
            words += [f"--{name.replace('_', '-')}", str(flags[name])]
    for override in flags["overrides"]:
        words += ["--set", override]
    return shlex.join(words)


def _facts(batch: "Batch") -> dict[str, Any]:
    return {
        "slides": batch.slides,
        "done": batch.done,
        "done_before": batch.skipped,
        "seconds": round(batch.seconds, 3),
        "failed": [
            {"id": entry.id, "slide": entry.slide, "reason": why.reason, "error": why.message,
             "advice": why.advice}
            for entry, why in batch.failed
        ],
    }  # fmt: skip


def _shard(text: str | None) -> tuple[int, int] | None:
    """Part and parts, of the flag or of a Slurm array.

    Raises:
        click.BadParameter: not of the form I/N with I from 1 to N.
    """
    if text is None:
        return _slurm_shard()
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise click.BadParameter(
            "two numbers are wanted, part I of N from 1: 3/10", None, None, "--shard"
        )
    return (int(part), int(parts)) if int(parts) > 1 else None


def _slurm_shard() -> tuple[int, int] | None:
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
