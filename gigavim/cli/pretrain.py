"""`gigavim pretrain`: an encoder from pictures without labels."""

from pathlib import Path

import click

from gigavim.cli import options


@click.command("pretrain")
@click.argument("recipe")
@click.option(
    "--data",
    type=click.Path(exists=True, path_type=Path),
    required=True,
    metavar="PATH",
    help="Folder below which the recipe finds its pictures, or a packed file.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR",
              help="[default: gigavim_pretrain/NAME]")  # fmt: skip
@click.option("--device", default="auto", show_default=True, callback=options.device,
              help="auto, cpu, cuda, cuda:1.")  # fmt: skip
@click.option("--steps", type=click.IntRange(min=1), help="Instead of the recipe's.")
@click.option("--max-minutes", type=click.FloatRange(min=0, min_open=True),
              help="Set the number of steps so that training takes this long.")  # fmt: skip
@click.option("--seed", type=int, help="Instead of the recipe's.")
@options.verbosity
def command(
    recipe: str,
    data: Path,
    output: Path | None,
    device: str,
    steps: int | None,
    max_minutes: float | None,
    seed: int | None,
) -> None:
    """Train the encoder of RECIPE by masked image modelling: no masks are needed.

    Held-out groups stay unseen. OUTPUT/encoder is what `encoder_weights` of a recipe takes;
    the same command goes on from the last checkpoint.

    \b
    Example:
      gigavim pretrain histo-nuclei --data /data/unlabelled --max-minutes 30
    """
    from gigavim.cli.train import talk
    from gigavim.errors import SettingsError
    from gigavim.extras import installed
    from gigavim.training.pack import read_pack, read_pictures
    from gigavim.training.pretrain import pretrain
    from gigavim.training.recipe import load_recipe
    from gigavim.training.run import fast_products, pick_device

    found = load_recipe(recipe, steps=steps, max_minutes=max_minutes, seed=seed)
    encoder = found.model.encoder
    if encoder.stride_px != encoder.patch_px:
        raise SettingsError(
            f"{recipe}: hidden patches would show: pretraining needs stride = patch"
        )
    if not options.is_quiet():
        talk()
    installed("kornia", "train")  # said before the pictures are read, not after
    where = pick_device(device)
    folder = output or Path("gigavim_pretrain") / found.model.name
    pictures = (
        list(read_pictures(data, found, labelled=False))
        if data.is_dir()
        else read_pack(data, found)
    )
    with fast_products(where, workers=found.schedule.workers):
        card, errors = pretrain(found, pictures, folder, where)
    if card is not None:
        click.echo(f"{folder / 'encoder'}: {card.name}; error on held-out groups {errors[-1]:.4f}")
