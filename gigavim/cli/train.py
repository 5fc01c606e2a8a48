"""`gigavim train`: a recipe and data to a model folder."""

import logging
from pathlib import Path

import click

from gigavim.cli import options


@click.command("train")
@click.argument("recipe")
@click.option(
    "--data",
    type=click.Path(exists=True, path_type=Path),
    metavar="PATH",
    help="Folder below which the recipe finds its pictures, or a file made with --pack.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Checkpoint, logs and the model go here; a checkpoint there is continued."
    " [default: gigavim_train/NAME]",
)
@click.option("--print-recipe", is_flag=True,
              help="Only print RECIPE, to start one of your own from a shipped one.")  # fmt: skip
@click.option("--pack", type=click.Path(path_type=Path), metavar="FILE",
              help="Only pack the data into one file, for training elsewhere.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, callback=options.device,
              help="auto, cpu, cuda, cuda:1.")  # fmt: skip
@click.option("--steps", type=click.IntRange(min=1), help="Instead of the recipe's.")
@click.option("--max-minutes", type=click.FloatRange(min=0, min_open=True),
              help="Set the number of steps so that training takes this long.")  # fmt: skip
@click.option("--max-gpu-memory", callback=options.size, metavar="SIZE",
              help="Memory of the device that training may use, such as 40GB: batches, layers and "
              "sequences are split to keep it, or it is said what would fit. [default: what is "
              "there, nothing is split]")  # fmt: skip
@click.option("--weights", type=click.Path(path_type=Path), metavar="DIR|FILE",
              help="Encoder to start from, as `gigavim models import` and `pretrain` write it, or "
              "a model folder, for its encoder. "
              "[default: model.encoder_weights of the recipe]")  # fmt: skip
@click.option("--seed", type=int, help="Instead of the recipe's.")
@click.option("--workers", type=click.IntRange(min=1),
              help="Batches per step, on a CPU thread each.")  # fmt: skip
@options.verbosity
def command(
    recipe: str,
    data: Path | None,
    output: Path | None,
    print_recipe: bool,
    pack: Path | None,
    device: str,
    steps: int | None,
    max_minutes: float | None,
    max_gpu_memory: str | None,
    weights: Path | None,
    seed: int | None,
    workers: int | None,
) -> None:
    """Train a segmentation model by RECIPE: a TOML file, or the name of a shipped one.

    Training can be stopped at any time; the same command goes on from the last checkpoint, and
    more --steps or --max-minutes train on after the end. OUTPUT/model is then a folder that
    `gigavim segment --model` takes. docs/training.md has a first training of two minutes.

    \b
    Examples:
      gigavim train histo-nuclei --data /data/histo
      gigavim train histo-nuclei-nano --print-recipe > my.toml
      gigavim train my.toml --data /data --pack my.npz
      gigavim train my.toml --data my.npz --max-minutes 10 -o runs/my
      gigavim train my.toml --data my.npz --max-gpu-memory 12GB
      gigavim train my.toml --data my.npz --weights gigavim_pretrain/my/encoder
      torchrun --nproc-per-node 4 -m gigavim train my.toml --data my.npz
    """
    from gigavim.training.recipe import load_recipe, recipe_path

    if print_recipe:
        load_recipe(recipe)
        click.echo(recipe_path(recipe).read_text(encoding="utf-8"), nl=False)
        return
    if data is None:
        raise click.UsageError("Missing option '--data'.")
    found = load_recipe(
        recipe, encoder_weights=weights, steps=steps, max_minutes=max_minutes, seed=seed,
        workers=workers,
    )  # fmt: skip
    if not options.is_quiet():
        talk()
    if pack is not None:
        from gigavim.training.pack import read_pictures, write_pack

        count = write_pack(pack, read_pictures(data, found), found)
        click.echo(f"{pack}: {count} pictures, {pack.stat().st_size / 1e6:.1f} MB", err=True)
        return
    import torch

    from gigavim.engine.memory import parse_bytes
    from gigavim.errors import ResourceError
    from gigavim.extras import installed
    from gigavim.training.run import Run, fast_products, load_data, pick_device

    installed("kornia", "train")  # said before the pictures are read, not after
    given = max_gpu_memory not in (None, "auto")
    limit = parse_bytes(str(max_gpu_memory)) if given else None
    where = pick_device(device)
    folder = output or Path("gigavim_train") / found.model.name
    with fast_products(where, workers=found.schedule.workers):
        pictures = load_data(data, found)
        try:
            result = Run(found, pictures, folder, where, max_memory_bytes=limit).train()
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"the memory of {where} does not suffice ({str(error).splitlines()[0]}): lower "
                "schedule.largest_blocks, or pack fewer pictures at a coarser data.pack_mpp"
            ) from error
    if result.metrics:
        from gigavim.training.score import monitored

        value = monitored(result.metrics, found.loss.monitor)
        click.echo(f"{result.model}: {found.loss.monitor} {value:.4f} on held-out groups")


def talk() -> None:
    """Show what the training logs, with the time."""
    logger = logging.getLogger("gigavim.training")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
