"""`gigavim batch`: an archive of slides through one recipe."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gigavim.cli import batch_options, options
from gigavim.errors import SettingsError

if TYPE_CHECKING:
    from gigavim_pipelines.recipe import Recipe
    from gigavim_pipelines.run import Batch


@click.command("batch")
@click.argument("recipe", required=False)
@click.argument("archives", metavar="ARCHIVE...", nargs=-1)
@click.option(
    "-o",
    "--output",
    "--results-dir",
    "--job-dir",
    "output",
    default="gigavim_out",
    callback=batch_options.local_folder,
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
@click.option(
    "--timeout",
    metavar="TIME",
    callback=batch_options.span,
    help="Longest time for a slide: 90s, 15m, 6h; 0: any.",
)
@click.option("--tries", type=click.IntRange(min=1), help="Of a slide whose failure may pass.")
@click.option(
    "--worker-memory",
    metavar="SIZE",
    callback=batch_options.size,
    help="A worker is replaced beyond it, say 8GB.",
)
@click.option("--recycle-after", type=click.IntRange(min=0), help="Slides a worker process lives.")
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    callback=batch_options.scheduler,
    help="Use a dask cluster that runs: tcp://host:8786.",
)
@click.option(
    "--dashboard",
    metavar="ADDRESS",
    callback=batch_options.dashboard,
    help="Show dask's dashboard, at :8787 say.",
)
@click.option(
    "--shard",
    metavar="I/N",
    callback=batch_options.shard,
    help="Only part I of N of the slides  [default: as SLURM_ARRAY_TASK_ID says, else all].",
)
@click.option("--overwrite", is_flag=True, help="Do again what is done; replaces each slide's own.")
@click.option("--verify", is_flag=True, help="Check every result's checksum before it is skipped.")
@click.option("--dry-run", is_flag=True, help="Say which slides would be processed and why.")
@options.as_json
@options.verbosity
@click.pass_context
def command(
    ctx: click.Context,
    /,
    recipe: str | None,
    archives: tuple[str, ...],
    list_only: bool,
    as_json: bool,
    **flags: Any,
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
    from gigavim_pipelines.recipe import list_recipes

    if list_only:
        for name, known in list_recipes().items():
            click.echo(f"{name:<10} {known.recipe.description}")
        return 0
    if recipe is None or not archives:
        raise click.UsageError("give a RECIPE and at least one ARCHIVE, or --list.")
    if not all(archive.strip() for archive in archives):
        raise click.UsageError("an ARCHIVE is empty: is a variable of your shell not set?")
    return _run(_recipe(recipe, flags), recipe, archives, flags, ctx, as_json=as_json)


def _recipe(name: str, flags: dict[str, Any]) -> "Recipe":
    """The recipe as the flags change it; what is wrong with the flags is wrong usage."""
    from gigavim_pipelines.recipe import UnknownRecipeError, load_recipe, with_overrides

    try:
        recipe = load_recipe(name)
    except UnknownRecipeError as error:
        raise click.UsageError(str(error)) from error
    keys = ("workers", "timeout", "tries", "worker_memory", "recycle_after")
    try:
        recipe = with_overrides(recipe, flags["overrides"]).with_flags(
            model={"name": flags["model"]},
            compute={"device": flags["device"]},
            batch={key: flags[key] for key in keys},
        )
        recipe = with_overrides(recipe, ())
        recipe.check()
    except SettingsError as error:
        raise click.UsageError(str(error)) from error
    return recipe


def _run(
    recipe: "Recipe",
    name: str,
    archives: tuple[str, ...],
    flags: dict[str, Any],
    ctx: click.Context,
    *,
    as_json: bool,
) -> int:
    from gigavim.cli.batch_progress import Lines, dry_run, summary_lines
    from gigavim_pipelines.discovery import discover
    from gigavim_pipelines.run import Options, run_batch

    out: Path = flags["output"]
    shard = flags["shard"] or batch_options.slurm_shard()
    entries = discover(archives, suffixes=flags["suffixes"], out=out)
    chosen = Options(
        scheduler=flags["scheduler"],
        shard=None if shard == (1, 1) else shard,
        overwrite=flags["overwrite"],
        verify=flags["verify"],
        dashboard=flags["dashboard"],
        command=shlex.join(["gigavim", *sys.argv[1:]]),
        rerun=_rerun(name, out, ctx),
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


def _rerun(recipe: str, out: Path, ctx: click.Context) -> str:
    """The command for the slides that failed, with the options that this one was given."""
    words = ["gigavim", "batch", recipe, str(out / "failed.csv"), "-o", str(out)]
    return shlex.join([*words, *batch_options.given_again(ctx)])


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
