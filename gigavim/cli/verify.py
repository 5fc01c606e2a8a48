"""`gigavim verify`: is a store still what it was?"""

from dataclasses import asdict
from pathlib import Path

import click

from gigavim.cli import options, run
from gigavim.cli.progress import Bars


@click.command("verify")
@click.argument("stores", metavar="STORE...", nargs=-1, required=True, type=Path)
@click.option("--slide", metavar="FILE", help="The slide, if it moved since (one store only).")
@options.as_json
@options.verbosity
def command(stores: tuple[Path, ...], slide: str | None, as_json: bool) -> int:
    """Check embedding stores against their checksums, their slides and their models.

    Says what is as it was, what could not be looked at, and what has changed. Exits with 1 (with 3
    if only some of several) where something has.

    \b
    Examples:
      gigavim verify out/a.embeddings.zarr
      gigavim verify archive/*.embeddings.zarr --json
    """  # fmt: skip
    from gigavim.errors import StoreError
    from gigavim.store.verify import verify_store

    if slide and len(stores) > 1:
        raise click.UsageError("--slide goes with one store.")

    def work(path: Path, stem: str) -> None:
        found = verify_store(path, slide=slide or "", progress=Bars(quiet=options.is_quiet()))
        if as_json:
            import orjson

            click.echo(orjson.dumps(asdict(found)).decode())
        elif not options.is_quiet():
            click.echo(found.location)
            for word, lines in (("ok", found.confirmed), ("not checked", found.unchecked)):
                for line in lines:
                    click.echo(f"  {word}: {line}")
        if found.problems:
            first, more = found.problems[0], len(found.problems) - 1
            for problem in found.problems[:20] if not as_json else ():
                click.echo(f"  CHANGED: {problem}", err=True)
            others = f" (and {more} more)" if more else ""
            raise StoreError(f"{path}: is not what it was: {first}{others}")

    return run.run_all({path: path.name for path in stores}, work, fail_fast=False, kind="stores")
