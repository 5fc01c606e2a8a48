"""`gigavim evaluate`: a model against labelled pictures."""

from pathlib import Path

import click

from gigavim.cli import options


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
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1.")
@options.as_json
@options.verbosity
def command(
    model: str,
    data: Path,
    recipe: str | None,
    groups: str | None,
    output: Path,
    tolerance_px: int,
    context: str,
    window_px: int,
    device: str,
    as_json: bool,
) -> None:
    """Score MODEL (a shipped name or a folder) on the labelled pictures of DATA.

    DATA is a folder below which the recipe finds pictures and masks, or a file made with
    `gigavim train --pack`. Writes Dice and IoU of every class, boundary F1, confusion and
    calibration to evaluation.json, and a sheet of pictures to evaluation.png.

    \b
    Examples:
      gigavim evaluate histo-nuclei-nano /data/histo
      gigavim evaluate runs/my/model my.npz --recipe my.toml --groups all
      gigavim evaluate aerial-landcover dubai.npz --context window
    """
    import json
    from dataclasses import replace

    from gigavim.errors import ModelError
    from gigavim.model.checkpoint import load_model
    from gigavim.outputs.atomic import OutputSet
    from gigavim.training import evaluate, score
    from gigavim.training.pack import of_groups
    from gigavim.training.recipe import load_recipe
    from gigavim.training.run import load_data, pick_device

    network, card = load_model(model)
    rules = load_recipe(recipe or card.name)
    names = tuple(spec.name for spec in card.classes)
    if names != rules.class_names:
        raise ModelError(
            f"{model}: its classes are {', '.join(names)}, the recipe's are "
            f"{', '.join(rules.class_names)}; give the right --recipe"
        )
    pictures = of_groups(load_data(data, rules), groups, rules.split.validation_groups)
    where = pick_device(device)
    predictor = score.Predictor(network.to(where), card.scan_order, card.mean, card.std)
    if context == "window":
        predictor = replace(predictor, window_px=window_px)
    report, seen = evaluate.evaluate(predictor, card, pictures, where, tolerance_px=tolerance_px)
    report["context"] = "whole" if context == "whole" else f"windows of {window_px} px"
    text = json.dumps(report, indent=2)
    with OutputSet(overwrite=True) as outputs:
        outputs.path(output / "evaluation.json").write_text(text + "\n", encoding="utf-8")
        evaluate.sheet(seen, card).save(outputs.path(output / "evaluation.png"))
    if as_json:
        click.echo(text)
        return
    click.echo(f"{card.name} on {len(pictures)} pictures of {', '.join(report['groups'])}")
    click.echo(f"{'':14}{'Dice':>8}{'IoU':>8}{'edge F1':>9}")
    there = [sum(row) > 0 for row in report["confusion"]["pixels"]]
    for name in (name for name, is_there in zip(names, there, strict=True) if is_there):
        row = (report["scores"][f"{name}_{kind}"] for kind in ("dice", "iou"))
        cells = "".join(f"{value:8.3f}" for value in row)
        click.echo(f"{name:14}{cells}{report['boundary_f1'][name]:9.3f}")
    error = report["calibration"]["expected_calibration_error"]
    click.echo(f"mIoU {report['scores']['miou']:.3f}, calibration error {error:.3f}")
    click.echo(f"wrote {output / 'evaluation.json'} and {output / 'evaluation.png'}")
