"""`gigavim evaluate`: a model against labelled pictures."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from gigavim.cli import options

if TYPE_CHECKING:
    from gigavim.model.card import ModelCard
    from gigavim.training.labelled import Classes
    from gigavim.training.pack import Picture


@click.command("evaluate")
@click.argument("model")
@click.argument("data", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--recipe",
    help="How masks show the classes, and what was held out: a recipe's file or name."
    " [default: the shipped recipe of the model's name]",
)
@click.option(
    "--groups",
    metavar="A,B",
    help="Groups of pictures to use, or 'all'. [default: those the recipe holds out]",
)
@click.option(
    "--class",
    "rules",
    multiple=True,
    metavar="NAME=VALUES",
    help="Without a recipe: the values of masks that show a class of the model: nuclei=255, "
    "nuclei=1- (all from 1 on), ignored=255. Repeatable; what none names is scored as 'other'.",
)
@click.option("--images", metavar="GLOB", help="With --class, the pictures. [default: images/*]")
@click.option("--masks", metavar="PATTERN",
              help="With --class, a picture's mask, from its folder."
              " [default: ../masks/{stem}.*]")  # fmt: skip
@click.option("--mpp", type=click.FloatRange(min=0, min_open=True), metavar="UM",
              help="With --class, micrometres per pixel of the pictures."
              " [default: what the files say]")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR",
              default=Path("gigavim_evaluation"), show_default=True)  # fmt: skip
@click.option("--tolerance-px", type=click.IntRange(min=0), default=2, show_default=True,
              help="How far a boundary may be off in the boundary F1.")  # fmt: skip
@click.option(
    "--context",
    type=click.Choice(["whole", "window"]),
    default="whole",
    show_default=True,
    help="See a picture as one sequence, or only windows of it.",
)
@click.option("--window-px", type=click.IntRange(min=8), default=224, show_default=True,
              help="Side of these windows, in pixels of the model.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, callback=options.device,
              help="auto, cpu, cuda, cuda:1.")  # fmt: skip
@options.as_json
@options.verbosity
def command(
    model: str,
    data: Path,
    recipe: str | None,
    groups: str | None,
    rules: tuple[str, ...],
    images: str | None,
    masks: str | None,
    mpp: float | None,
    output: Path,
    tolerance_px: int,
    context: str,
    window_px: int,
    device: str,
    as_json: bool,
) -> None:
    """Score MODEL (a shipped name or a folder) on the labelled pictures of DATA.

    DATA is a folder below which the recipe finds pictures and masks, or a file made with
    `gigavim train --pack`; with --class any folder of pictures and masks. Writes Dice and IoU of
    every class, boundary F1, confusion and calibration to evaluation.json, and a sheet of pictures
    to evaluation.png.

    \b
    Examples:
      gigavim evaluate histo-nuclei-nano /data/histo
      gigavim evaluate runs/my/model my.npz --recipe my.toml --groups all
      gigavim evaluate aerial-landcover dubai.npz --context window
      gigavim evaluate histo-nuclei /data/other-lab --class nuclei=1- --mpp 0.25
      gigavim evaluate histo-nuclei /data/other-lab --class nuclei=255 --images 'tissue/*.tif'
        --masks '../labels/{stem}_mask.png'
    """
    import json
    from dataclasses import replace

    from gigavim.model.checkpoint import load_model
    from gigavim.outputs.atomic import OutputSet
    from gigavim.training import evaluate, score
    from gigavim.training.labelled import Classes
    from gigavim.training.run import pick_device

    if rules and (recipe or groups):
        raise click.UsageError("--class stands in place of --recipe and --groups.")
    if not rules and (images or masks or mpp):
        raise click.UsageError("--images, --masks and --mpp go with --class; or give a --recipe.")
    network, card = load_model(model)
    if rules:
        pictures, classes = _by_rules(card, data, rules, images, masks, mpp)
    else:
        pictures, classes = _by_recipe(card, data, recipe, groups), Classes.all_of(card)
    names = [spec.name for spec in classes.specs]
    where = pick_device(device)
    predictor = score.Predictor(
        network.to(where), card.scan_order, card.mean, card.std, tied=card.tied_rates
    )
    if context == "window":
        predictor = replace(predictor, window_px=window_px)
    report, seen = evaluate.evaluate(
        predictor, card, pictures, where, tolerance_px=tolerance_px, classes=classes
    )
    report["context"] = "whole" if context == "whole" else f"windows of {window_px} px"
    text = json.dumps(report, indent=2)
    with OutputSet(overwrite=True) as outputs:
        outputs.path(output / "evaluation.json").write_text(text + "\n", encoding="utf-8")
        evaluate.sheet(seen, classes.specs).save(outputs.path(output / "evaluation.png"))
    if as_json:
        click.echo(text)
        return
    click.echo(f"{card.name} on {len(pictures)} pictures of {', '.join(report['groups'])}")
    click.echo(f"{'':14}{'Dice':>8}{'IoU':>8}{'edge F1':>9}{'Dice, mean of pictures':>24}")
    for name in names:
        dice, iou, each = (
            report["scores"][f"{name}_{kind}"] for kind in ("dice", "iou", "dice_per_image")
        )
        cells = ((dice, 8), (iou, 8), (report["boundary_f1"][name], 9), (each, 24))
        click.echo(f"{name:14}" + "".join(_cell(value, width) for value, width in cells))
    error = report["calibration"]["expected_calibration_error"]
    click.echo(f"mIoU {report['scores']['miou']:.3f}, calibration error {error:.3f}")
    click.echo(f"wrote {output / 'evaluation.json'} and {output / 'evaluation.png'}")


def _cell(value: float | None, width: int) -> str:
    """A score in a table; "-" where no picture shows the class."""
    return f"{'-':>{width}}" if value is None else f"{value:{width}.3f}"


def _by_recipe(
    card: "ModelCard", data: Path, recipe: str | None, groups: str | None
) -> "list[Picture]":
    """Pictures as a recipe finds them; its classes have to be the model's."""
    from gigavim.errors import ModelError, SettingsError
    from gigavim.training.pack import of_groups
    from gigavim.training.recipe import load_recipe, shipped_recipes
    from gigavim.training.run import load_data

    if recipe is None and card.name not in shipped_recipes():
        raise SettingsError(
            f"{card.name} was not trained by a shipped recipe: give its own with --recipe, or say "
            "with --class what the masks show"
        )
    rules = load_recipe(recipe or card.name)
    names = tuple(spec.name for spec in card.classes)
    if names != rules.class_names:
        raise ModelError(
            f"{card.name}: its classes are {', '.join(names)}, the recipe's are "
            f"{', '.join(rules.class_names)}; give the right --recipe"
        )
    return of_groups(load_data(data, rules), groups, rules.split.validation_groups)


def _by_rules(
    card: "ModelCard",
    data: Path,
    rules: tuple[str, ...],
    images: str | None,
    masks: str | None,
    mpp: float | None,
) -> "tuple[list[Picture], Classes]":
    """Pictures of any folder, and the classes that their masks show."""
    from gigavim.errors import ModelError, SettingsError
    from gigavim.frames import length_text
    from gigavim.training.labelled import Rules, read_labelled

    found = Rules.parse(rules, card)
    if not data.is_dir():
        raise SettingsError(f"{data}: --class is for a folder of pictures and masks")
    pictures = read_labelled(
        data, found, images=images or "images/*", masks=masks or "../masks/{stem}.*", mpp=mpp
    )
    coarsest = card.mpp_range[1]
    for picture in pictures:
        if picture.mpp > coarsest * 1.05:
            raise ModelError(
                f"{picture.name}: {card.name} was trained for up to {length_text(coarsest)} per "
                f"pixel, this is {length_text(picture.mpp)}: correct it with --mpp, or take "
                "another model"
            )
    return pictures, found.classes
