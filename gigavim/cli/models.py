"""`gigavim models`: what can be run."""

import click

from gigavim.cli import options


@click.command("models")
@click.argument("name", required=False)
@options.as_json
@options.verbosity
def command(name: str | None, as_json: bool) -> None:
    """List the shipped models, or show the card of one (a name or a model folder).

    \b
    Examples:
      gigavim models
      gigavim models histo-nuclei-nano
    """
    from gigavim.model.checkpoint import list_models, load_card

    cards = list_models() if name is None else {name: load_card(name)}
    if as_json:
        import orjson

        facts = {key: card.model_dump(mode="json") for key, card in cards.items()}
        click.echo(orjson.dumps(facts if name is None else facts[name]).decode())
        return
    for key, card in cards.items():
        if name is None:
            classes = ", ".join(spec.name for spec in card.classes)
            click.echo(f"{key}\n  {card.description}\n  {card.mpp:g} um per pixel; {classes}")
        else:
            _show(card.model_dump(mode="json"), indent="")


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
