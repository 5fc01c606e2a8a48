"""Masked image modelling: an encoder learns from pictures without labels what patches are hidden.

As SimMIM (arXiv 2111.09886): squares of patches are hidden at random, a learned token marks them,
and one linear map from the encoder's tokens predicts their normalised pixels; the loss is L1 on
the hidden patches.
"""

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from gigavim.model.card import EncoderCard
from gigavim.model.encoder import write_encoder
from gigavim.model.vim import Vim, grid_cells
from gigavim.training import loop
from gigavim.training.encode import encode, random_origin
from gigavim.training.graphs import Batch
from gigavim.training.pack import Picture, split
from gigavim.training.ranks import Ranks
from gigavim.training.recipe import Recipe
from gigavim.training.run import canvases_of, make_folder

if TYPE_CHECKING:
    from gigavim.training.canvas import Canvases

log = logging.getLogger(__name__)

HIDDEN_SHARE = 0.6
SQUARE_TOKENS = 4
"""Side of the squares that are hidden or shown as one."""
VALIDATION_BATCHES = 8


class MaskedImages(nn.Module):
    """An encoder with what masked image modelling adds to it."""

    def __init__(self, encoder: Vim) -> None:
        super().__init__()
        config = encoder.config
        self.encoder = encoder
        self.mask_token = nn.Parameter(torch.zeros(config.d_model))
        self.decoder = nn.Linear(config.d_model, config.in_channels * config.patch_px**2)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def loss(self, images: Tensor, recipe: Recipe, generator: Generator | None) -> Tensor:
        """The mean L1 error on hidden patches of normalised images (B, 3, H, W)."""
        config, order = self.encoder.config, recipe.model.scan_order
        patch, batch = config.patch_px, len(images)
        rows, cols = (side // patch for side in images.shape[2:])
        hidden = _hidden(batch, rows, cols, images.device, generator)  # (B, rows, cols)
        shown = (
            images * (1 - hidden.repeat_interleave(patch, 1).repeat_interleave(patch, 2))[:, None]
        )
        cells = grid_cells(rows, cols, order, images.device)
        marks = hidden.flatten(1)[:, cells, None]  # (B, L, 1), in scan order
        with loop.half_products(images.device):
            origin = random_origin(config, images.device, generator)
            tokens = self.encoder.tokens(shown, order=order, origin_um=origin)
            tokens = tokens + marks * self.mask_token
            encoded = encode(
                self.encoder,
                tokens,
                drop_path=recipe.schedule.drop_path,
                generator=generator,
                recompute=batch * rows * cols > recipe.schedule.recompute_tokens,
                tied=recipe.model.tied_rates,
            )
            predicted = self.decoder(encoded)  # (B, L, 3 * P * P)
        truth = F.unfold(images, patch, stride=patch).transpose(1, 2)[:, cells]
        errors = (predicted.float() - truth).abs().mean(-1, keepdim=True)
        loss: Tensor = (errors * marks).sum() / marks.sum().clamp(min=1)
        return loss


def pretrain(
    recipe: Recipe, pictures: Sequence[Picture], folder: Path, device: torch.device
) -> tuple[EncoderCard | None, list[float]]:
    """Train the encoder of a recipe on its training groups, and write it as an encoder's folder.

    A checkpoint in the folder is continued. The recipe's patches must not overlap.

    Returns:
        The card of `folder`/encoder, None in all but the first of several processes, which alone
        writes; and the errors on held-out groups, there one at least.
    """
    ranks = Ranks(device)
    train, held_out = split(list(pictures), recipe)
    canvases = canvases_of(train, recipe, device)
    unseen = canvases_of(held_out, recipe, device)
    torch.manual_seed(recipe.schedule.seed)
    model = MaskedImages(Vim(recipe.model.encoder)).to(device)
    averaged = MaskedImages(Vim(recipe.model.encoder)).to(device)
    make_folder(folder)
    checkpoint = folder / "checkpoint.pt"
    progress = loop.start(model, recipe)
    if checkpoint.exists():
        progress = loop.resume(checkpoint, model, recipe)
        loop.plan_anew(progress, recipe)
    errors: list[float] = []
    since = time.monotonic()

    def objective(batch: Batch, every: int, generator: Generator | None) -> Tensor:
        return model.loss(batch[0], recipe, generator)

    def on_step(progress: loop.Progress, loss: float, tokens: int) -> bool:
        nonlocal since
        due = progress.step % recipe.schedule.validate_every == 0 or progress.step >= progress.steps
        if due and ranks.rank == 0:
            averaged.load_state_dict(progress.average)
            errors.append(_error(averaged, unseen))
            seconds = time.monotonic() - since
            since = time.monotonic()
            values = {"loss": loss, "val_error": errors[-1], "seconds": seconds}
            with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": progress.step} | values) + "\n")
            log.info("step %d loss %.4f, held out %.4f", progress.step, loss, errors[-1])
            loop.save(checkpoint, model, progress)
        return False

    loop.train(model, canvases, progress, objective, on_step=on_step, ranks=ranks)
    ranks.leave()
    if ranks.rank:
        return None, []
    loop.save(checkpoint, model, progress)
    averaged.load_state_dict(progress.average)
    if not errors:  # time was up before the first validation, or nothing was left to do
        errors.append(_error(averaged, unseen))
    card = write_encoder(
        folder / "encoder",
        averaged.encoder,
        name=f"{recipe.model.name}-pretrained",
        source=f"masked image modelling, {progress.step} steps, on {recipe.data.source}",
        licence=recipe.model.licence,
        mean=recipe.model.mean,
        std=recipe.model.std,
    )
    return card, errors


@torch.no_grad()
def _error(model: MaskedImages, canvases: "Canvases") -> float:
    """The loss on canvases and masks that are the same each time."""
    device, total = canvases.atlas.device, 0.0
    for seed in range(VALIDATION_BATCHES):
        generator = torch.Generator(device).manual_seed(seed)
        images, _ = canvases.draw((2, 2), 4, generator)
        total += float(model.loss(images, canvases.recipe, generator))
    return total / VALIDATION_BATCHES


def _hidden(
    batch: int, rows: int, cols: int, device: torch.device, generator: Generator | None
) -> Tensor:
    """(B, rows, cols) float32: one where a patch is hidden, in squares."""
    coarse = (-(-rows // SQUARE_TOKENS), -(-cols // SQUARE_TOKENS))
    drawn = torch.rand(batch, *coarse, generator=generator, device=device) < HIDDEN_SHARE
    spread = drawn.repeat_interleave(SQUARE_TOKENS, 1).repeat_interleave(SQUARE_TOKENS, 2)
    return spread[:, :rows, :cols].float()
