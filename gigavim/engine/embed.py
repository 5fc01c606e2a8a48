"""Pixels to tokens: blocks of the slide, embedded and scattered to their places in the sequence."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gigavim.engine.sequence import TokenSequence
from gigavim.errors import CorruptSlideError
from gigavim.model.sequence import class_slots, patch_slots
from gigavim.model.vim import Vim
from gigavim.tokens.grid import TokenGrid, TokenSelection
from gigavim.tokens.stream import PatchBlock, block_patches

BATCH_PATCHES = 8192


class PatchProjection:
    """The patch embedding as one product with raw 8-bit patches.

    In bf16 the pixels are exact and only the weights are rounded; the bias is computed from the
    rounded weights, so that a patch of the mean colour keeps its exact token.
    """

    def __init__(
        self,
        encoder: Vim,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        device: torch.device,
        precision: Literal["fp32", "bf16"],
    ) -> None:
        weight, bias = encoder.patch_embed.fold_normalisation(mean, std)  # (D, P * P * 3), (D,)
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        rounded = weight.to(self._dtype)
        mean_patch = 255 * torch.tensor(mean).repeat(weight.shape[1] // len(mean))
        bias = bias + (weight - rounded.float()) @ mean_patch
        # Pixels are centred before the product: they stay exact, and its sums stay small.
        self._bias = (bias + 128 * rounded.float().sum(1)).to(device)
        self._weight = rounded.T.contiguous().to(device)  # (P * P * 3, D)
        self._device = device

    def __call__(self, patches: npt.NDArray[np.uint8]) -> Tensor:
        """(n, P * P * 3) uint8 -> (n, D) float32 on the device."""
        pixels = torch.from_numpy(patches).to(self._device).to(self._dtype) - 128
        return (pixels @ self._weight).float() + self._bias


def embed_slide(
    blocks: Iterable[PatchBlock],
    sequence: TokenSequence,
    encoder: Vim,
    projection: PatchProjection,
    grid: TokenGrid,
    selection: TokenSelection,
    *,
    source: Path,
    max_unreadable: float = 0.01,
    progress: Callable[[int], None] = lambda pixels: None,
) -> npt.NDArray[np.bool_]:
    """Fill the sequence with the tokens of a slide.

    Args:
        blocks: of `gigavim.tokens.stream_blocks`.
        sequence: (L, D) with a row for each token and each class token.
        source: the slide's file, for the message of an error.
        max_unreadable: share of tokens that may lie on unreadable pixels.
        progress: called with the number of pixels embedded.

    Returns:
        (rows, cols) which tokens lie on pixels that could not be read.

    Raises:
        CorruptSlideError: more than `max_unreadable` of the tokens cannot be read.
    """
    count = len(selection.cells)
    kind = encoder.config.class_token
    unreadable: npt.NDArray[np.bool_] = np.zeros((grid.rows, grid.cols), np.bool_)
    with torch.inference_mode():
        if own := class_slots(count, kind):
            sequence.scatter(torch.tensor(own), encoder.class_rows().float())
        for block in blocks:
            index = block.rect.of(selection.index)
            kept = index >= 0
            _embed_block(block, index, kept, sequence, encoder, projection, grid, count)
            if block.unreadable is not None:
                touched = touched_cells(block.unreadable, grid, block.rows, block.cols)
                block.rect.of(unreadable)[:] = touched & kept
                check_unreadable(source, int(unreadable.sum()), count, max_unreadable)
            progress(int(kept.sum()) * grid.stride_px**2)
    return unreadable


def _embed_block(
    block: PatchBlock,
    index: npt.NDArray[np.integer],
    kept: npt.NDArray[np.bool_],
    sequence: TokenSequence,
    encoder: Vim,
    projection: PatchProjection,
    grid: TokenGrid,
    count: int,
) -> None:
    row, col = (torch.from_numpy(places) for places in np.nonzero(kept))
    slots = patch_slots(
        torch.from_numpy(index[kept].astype(np.int64)), count, encoder.config.class_token
    )
    patches = block_patches(block, kept)
    for start in range(0, len(slots), BATCH_PATCHES):
        batch = slice(start, start + BATCH_PATCHES)
        tokens = projection(patches[batch])
        tokens += encoder.position(
            row[batch] + block.row, col[batch] + block.col, (grid.rows, grid.cols)
        ).to(tokens.device)
        sequence.scatter(slots[batch], tokens)


def touched_cells(
    pixels: npt.NDArray[np.bool_], grid: TokenGrid, rows: int, cols: int
) -> npt.NDArray[np.bool_]:
    """(rows, cols): whose patch holds a marked pixel."""
    patches = np.lib.stride_tricks.sliding_window_view(pixels, (grid.patch_px, grid.patch_px))
    stepped = patches[:: grid.stride_px, :: grid.stride_px][:rows, :cols]
    return np.asarray(stepped.any((2, 3)))


def check_unreadable(source: Path, unreadable: int, count: int, limit: float) -> None:
    """Raise `CorruptSlideError` where more than a share `limit` of `count` tokens is unreadable."""
    if unreadable > limit * count:
        raise CorruptSlideError(
            f"{source}: more than {limit:.1%} of the tissue cannot be decoded ({unreadable:,} of"
            f" {count:,} patches so far): the file is damaged. Copy it again from its source, or"
            " raise max_unreadable in gigavim.toml to go on without those parts."
        )
