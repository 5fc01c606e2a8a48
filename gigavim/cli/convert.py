"""`gigavim convert`: stores in, other formats out."""

from pathlib import Path
from typing import Any

import click

from gigavim.cli import options, run
from gigavim.cli.progress import Bars
from gigavim.config import load_settings


@click.command("convert")
@click.argument("stores", metavar="STORE...", nargs=-1, required=True, type=Path)
@run.output
@run.formats("none: name at least one")
@run.writing_options
@run.overwrite
@click.option("--slide", metavar="FILE", help="The slide, where a format needs it and it moved.")
@run.fail_fast
@options.config
@options.as_json
@options.verbosity
def command(
    stores: tuple[Path, ...],
    config: Path | None,
    fail_fast: bool,
    as_json: bool,
    slide: str | None,
    **flags: Any,
) -> int:
    """Convert embedding stores to formats of other tools, without running the model again.

    STORE is a NAME.embeddings.zarr of `gigavim embed`. The files are those that `--format` of
    `embed` or `segment` would have written.

    \b
    Examples:
      gigavim convert out/a.embeddings.zarr -o results --format geojson --min-area 20
      gigavim convert out/*.embeddings.zarr -o mil --format h5-clam --pool 16
      gigavim convert out/a.embeddings.zarr --format spatialdata --format ome-zarr
    """  # fmt: skip
    from gigavim.conversion import convert, store_stem

    settings = load_settings(config).with_flags(output=run.output_section(flags) | {"slide": slide})

    def work(path: Path, stem: str) -> None:
        if not options.is_quiet():
            click.echo(f"{path}", err=True)
        progress = Bars(quiet=options.is_quiet())
        result = convert(path, settings=settings, stem=stem, progress=progress)
        run.report(result, as_json=as_json)

    stems = {path: store_stem(path) for path in dict.fromkeys(stores)}
    for stem in stems.values():
        if list(stems.values()).count(stem) > 1:
            raise click.UsageError(f"two stores are named {stem}: convert them with different -o.")
    return run.run_all(stems, work, fail_fast=fail_fast, kind="stores")
