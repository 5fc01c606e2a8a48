"""`gigavim embed`: slides in, embedding stores out."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gigavim.cli import options
from gigavim.cli.run import formats, run_slides, settings_from, slide_options, writing_options

if TYPE_CHECKING:
    from gigavim.progress import Progress
    from gigavim.results import Result


@click.command("embed")
@options.inputs()
@formats("the store alone")
@click.option(
    "--embedding-dtype",
    type=click.Choice(["float16", "float32"]),
    help="Numbers of the stored embeddings  [default: float16].",
)
@click.option(
    "--probabilities", is_flag=True, default=None, help="Store class probabilities per token too."
)
@writing_options
@slide_options
def command(
    inputs: tuple[Path, ...],
    config: Path | None,
    dry_run: bool,
    fail_fast: bool,
    as_json: bool,
    embedding_dtype: str | None,
    probabilities: bool | None,
    **flags: Any,
) -> int:
    """Embed slides into zarr stores that other tools are fed from.

    For each slide the output folder receives NAME.embeddings.zarr: an embedding for every patch
    with its position, mean-pooled grids, the embedding of the slide, the label map, masks, and how
    it was made. docs/format.md describes it; `gigavim convert` turns it into other formats, which
    --format writes at once.

    \b
    Examples:
      gigavim embed slide.svs -o embeddings
      gigavim embed *.svs -o embeddings --format h5-trident
      python -c "import gigavim; print(gigavim.open_embeddings('embeddings/a.embeddings.zarr'))"
    """  # fmt: skip
    stored = {"dtype": embedding_dtype, "probabilities": probabilities}
    settings = settings_from(config, flags, embedding=stored)

    def make(path: Path, stem: str, progress: "Progress") -> "Result":
        from gigavim.embedding import embed

        return embed(path, settings=settings, stem=stem, progress=progress)

    return run_slides(inputs, settings, make, dry_run=dry_run, fail_fast=fail_fast, as_json=as_json)
