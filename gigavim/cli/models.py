"""`gigavim models`: what can be run, and encoder weights from elsewhere."""

import json
from pathlib import Path

import click

from gigavim.cli import options


class _Models(click.Group):
    """A group whose first word may also be a model, or nothing: then `show` is meant."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `show` where no command is named."""
        if not args or args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["show", *args]
        return super().parse_args(ctx, args)


@click.group("models", cls=_Models)
def command() -> None:
    """List the shipped models, show the card of one, or import published encoder weights.

    \b
    Examples:
      gigavim models
      gigavim models histo-nuclei-nano
      gigavim models import vim_t_midclstok_76p1acc.pth
    """


@command.command("show")
@click.argument("name", required=False)
@options.as_json
@options.verbosity
def show(name: str | None, as_json: bool) -> None:
    """List the shipped models, or show the card of one (a name or a folder, an encoder's too)."""
    from gigavim.frames import length_text
    from gigavim.model.card import CARD_NAME, is_encoder, read_encoder_card
    from gigavim.model.checkpoint import list_models, load_card

    if name is not None and is_encoder(Path(name)):
        encoder = read_encoder_card(Path(name) / CARD_NAME).model_dump(mode="json")
        if as_json:
            click.echo(json.dumps(encoder))
        else:
            _show(encoder, indent="")
        return
    cards = list_models() if name is None else {name: load_card(name)}
    if as_json:
        import orjson

        facts = {key: card.model_dump(mode="json") for key, card in cards.items()}
        click.echo(orjson.dumps(facts if name is None else facts[name]).decode())
        return
    for key, card in cards.items():
        if name is None:
            classes = ", ".join(spec.name for spec in card.classes)
            size = length_text(card.mpp)
            about = click.wrap_text(
                card.description, 100, initial_indent="  ", subsequent_indent="  "
            )
            click.echo(f"{key}\n{about}\n  {size} per pixel; {classes}")
        else:
            _show(card.model_dump(mode="json"), indent="")


@command.command("import")
@click.argument("weights", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR",
              help="Folder to write. [default: the file's name without its suffix]")  # fmt: skip
@click.option("--ema", is_flag=True, help="Take the averaged weights (model_ema).")
@options.verbosity
def import_(weights: Path, output: Path | None, ema: bool) -> None:
    """Turn encoder WEIGHTS (.pth as published, or safetensors) into safetensors with a card.

    Nothing in the file is executed. `gigavim train --weights DIR` starts from the result; so does a
    recipe whose `model.encoder_weights` names it.

    \b
    Example:
      gigavim models import vim_t_midclstok_76p1acc.pth -o vim-tiny
    """
    from gigavim.model.encoder import import_encoder

    folder = output or Path(weights.stem)
    card = import_encoder(weights, folder, ema=ema)
    config = card.config
    click.echo(
        f"{folder}: Vim of {config.depth} layers x {config.d_model}, "
        f"patches of {config.patch_px} px every {config.stride_px} px, "
        f"positions for {config.grid_hw[0]} x {config.grid_hw[1]}, class token {config.class_token}"
    )
    click.echo(f"licence: {card.licence}")


def _show(values: object, indent: str) -> None:
    """Print nested plain data, one leaf a line."""
    assert isinstance(values, dict)
    for key, value in values.items():
        if isinstance(value, dict):
            click.echo(f"{indent}{key}:")
            _show(value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            click.echo(f"{indent}{key}:")
            for entry in value:
                click.echo(f"{indent}  - " + ", ".join(f"{k} {v}" for k, v in entry.items()))
        else:
            click.echo(f"{indent}{key}: {value}")
