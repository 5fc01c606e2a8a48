"""Encoders on disk, without a head: published weights made ours, and the start of a training."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gigavim.errors import ModelError
from gigavim.model.card import (
    CARD_NAME,
    WEIGHTS_NAME,
    EncoderCard,
    is_encoder,
    read_card,
    read_encoder_card,
)
from gigavim.model.config import VimConfig
from gigavim.model.position import grid_position, split_table
from gigavim.model.published import load_encoder_weights
from gigavim.model.vim import Vim


def import_encoder(source: Path, folder: Path, *, ema: bool = False) -> EncoderCard:
    """Read encoder weights of any origin and write them as safetensors with a card.

    Args:
        source: as for `gigavim.model.published.load_encoder_weights`.
        folder: made if need be; must hold no encoder yet.
        ema: take the averaged weights.

    Raises:
        ModelError: the file holds no Vim, or would run code.
        OutputError: the folder holds an encoder already, or cannot be written.
    """
    encoder = load_encoder_weights(source, ema=ema)
    try:
        with source.open("rb") as file:
            origin = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{source}: cannot be read again ({error.strerror})") from error
    return write_encoder(
        folder,
        encoder,
        overwrite=False,
        name=source.stem,
        source=f"{source.name} ({'model_ema' if ema else 'model'})",
        source_sha256=origin,
    )


def write_encoder(
    folder: Path, encoder: Vim, *, overwrite: bool = True, **facts: Any
) -> EncoderCard:
    """Write an encoder and its card, both or neither.

    Args:
        facts: fields of the card, but for the configuration and the weights' SHA-256.
    """
    from safetensors.torch import save

    from gigavim.outputs.atomic import OutputSet

    state = {name: t.detach().cpu().contiguous() for name, t in encoder.state_dict().items()}
    blob = save(state, metadata={"format": "pt"})
    sha256 = hashlib.sha256(blob).hexdigest()
    card = EncoderCard(config=encoder.config, sha256=sha256, **facts)
    with OutputSet(overwrite=overwrite) as outputs:
        outputs.path(folder / WEIGHTS_NAME).write_bytes(blob)
        outputs.path(folder / CARD_NAME).write_text(card.model_dump_json(indent=2) + "\n")
    return card


def read_encoder(path: Path) -> Vim:
    """Load an imported folder, that of a model, or any file that `load_encoder_weights` takes.

    Raises `ModelError` where it cannot be read or the folder's weights are not its card's.
    """
    if not path.is_dir():
        return load_encoder_weights(path)
    card = (read_encoder_card if is_encoder(path) else read_card)(path / CARD_NAME)
    try:
        found = hashlib.sha256((path / WEIGHTS_NAME).read_bytes()).hexdigest()
    except OSError as error:
        raise ModelError(f"{path}: no imported encoder ({error.strerror})") from error
    if found != card.sha256:
        raise ModelError(f"{path / WEIGHTS_NAME}: not the weights that the card names")
    return load_encoder_weights(path / WEIGHTS_NAME, config=card.config)


@torch.no_grad()
def start_from(source: Vim, config: VimConfig) -> Vim:
    """A new encoder of another configuration with the weights that carry over.

    Class tokens and the classification head are left behind. A learned position table is cut free
    of the class token's slot where the token stands, and resized (bicubic) to the new grid.

    Raises `ModelError` where the sizes of the blocks or patches differ.
    """
    sizes = ("d_model", "depth", "d_state", "d_conv", "expand", "rank", "patch_px", "in_channels")
    for name in (*sizes, "bidirectional", "divide_out"):
        old, new = getattr(source.config, name), getattr(config, name)
        if old != new:
            raise ModelError(
                f"weights of an encoder with {name} {old} cannot start one with {new}: the "
                "recipe's model.encoder has to say the same"
            )
    target = Vim(config)
    state = target.state_dict()
    for name, tensor in source.state_dict().items():
        if name.startswith(("layers.", "patch_embed.", "norm_f.")):
            state[name] = tensor
    if "pos_embed" in state and source.config.position in ("grid", "block"):
        state["pos_embed"][0] = _with_slots(state["pos_embed"][0], _resized(source, config), config)
    target.load_state_dict(state)
    return target


def _resized(source: Vim, config: VimConfig) -> Tensor:
    """The source's patch positions on the grid of `config`, (rows * cols, D)."""
    table, _ = split_table(source.pos_embed, source.config.class_token)
    rows, cols = config.grid_hw
    cells = torch.arange(rows * cols)
    return grid_position(table, source.config.grid_hw, cells // cols, cells % cols, (rows, cols))


def _with_slots(own: Tensor, patches: Tensor, config: VimConfig) -> Tensor:
    """Lay patch positions around the class tokens' own."""
    from gigavim.model.sequence import patch_slots

    found = own.clone()
    found[patch_slots(torch.arange(len(patches)), len(patches), config.class_token)] = patches
    return found
