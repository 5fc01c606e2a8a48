"""Tokens to labels, streamed in strips of the grid's rows.

Each token decodes to the pixels of its patch. Where patches overlap their logits are averaged; a
strip hands the rows that the next strip's patches still reach to that strip, so the result does not
depend on how many rows a strip holds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from gigavim.tokens.grid import TokenGrid, TokenSelection

BATCH_TOKENS = 8192


class Decoder(Protocol):
    """The head of a model."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """Turn (n, D) float32 encoded tokens into (n, classes, patch, patch) logits."""
        ...


class Gather(Protocol):
    """Encoded tokens by their place among the patches of the sequence."""

    def __call__(self, index: Tensor) -> Tensor:
        """(n,) int64 -> (n, D) float32."""
        ...


@dataclass(frozen=True, slots=True)
class LabelStrip:
    """Labels of whole rows of the map."""

    y: int
    labels: npt.NDArray[np.uint8]
    """(rows_px, width_px)"""
    tokens: int
    """How many tokens were decoded for it."""


def decode_strips(
    gather: Gather, decoder: Decoder, grid: TokenGrid, selection: TokenSelection, *, classes: int
) -> Iterator[LabelStrip]:
    """Yield the label map from top to bottom; pixels of cells that are no tokens have label 0.

    Memory: one strip of at most about 64 map rows across the map, and a batch of logits.
    """
    overlap = grid.patch_px - grid.stride_px
    # Overlapping patches keep all their logits for a while: one row of cells is enough of them.
    step = 1 if overlap else max(1, 64 // grid.stride_px)
    carry: Tensor | None = None
    for row in range(0, grid.rows, step):
        index = selection.index[row : row + step]
        last = row + step >= grid.rows
        if overlap:
            labels, carry = _overlapping(gather, decoder, grid, index, classes, carry, last=last)
        else:
            labels = _adjacent(gather, decoder, grid, index)
        y = row * grid.stride_px
        if y >= grid.frame.height_px:  # what is left only fills the last blocks
            return
        labels = labels[: grid.frame.height_px - y, : grid.frame.width_px]
        yield LabelStrip(y, labels, int((index >= 0).sum()))


def _batches(gather: Gather, decoder: Decoder, slots: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Logits (n, classes, patch, patch) of tokens, a batch at a time."""
    for start in range(0, len(slots), BATCH_TOKENS):
        batch = slice(start, start + BATCH_TOKENS)
        yield batch, decoder(gather(slots[batch]))


def _kept(index: npt.NDArray[np.integer]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns within the strip, and places in the sequence, of its tokens."""
    row, col = np.nonzero(index >= 0)
    slots = index[row, col].astype(np.int64)
    return torch.from_numpy(row), torch.from_numpy(col), torch.from_numpy(slots)


def _adjacent(
    gather: Gather, decoder: Decoder, grid: TokenGrid, index: npt.NDArray[np.integer]
) -> npt.NDArray[np.uint8]:
    """Labels of a strip whose patches do not overlap: each token's own winner."""
    patch = grid.patch_px
    strip = torch.zeros(index.shape[0], index.shape[1], patch, patch, dtype=torch.uint8)
    row, col, slots = _kept(index)
    for batch, logits in _batches(gather, decoder, slots):
        strip[row[batch], col[batch]] = _winners(logits, 1).cpu()
    rows = strip.permute(0, 2, 1, 3)  # (rows, patch, cols, patch)
    return rows.reshape(index.shape[0] * patch, index.shape[1] * patch).numpy()


def _overlapping(
    gather: Gather,
    decoder: Decoder,
    grid: TokenGrid,
    index: npt.NDArray[np.integer],
    classes: int,
    carry: Tensor | None,
    *,
    last: bool,
) -> tuple[npt.NDArray[np.uint8], Tensor]:
    """Labels of the rows that no later patch reaches, and the logit sums of those that one does.

    The winner of a mean is the winner of the sum, so no counts are kept.
    """
    patch, stride = grid.patch_px, grid.stride_px
    overlap = patch - stride
    rows, cols = index.shape
    height, width = rows * stride + overlap, cols * stride + overlap
    sums = torch.zeros(classes, height, width)
    row, col, slots = _kept(index)
    dense = torch.zeros(classes * patch * patch, rows * cols)
    for batch, logits in _batches(gather, decoder, slots):
        dense[:, row[batch] * cols + col[batch]] = logits.flatten(1).T.cpu()
    sums += F.fold(dense[None], (height, width), patch, stride=stride)[0]
    if carry is not None:
        sums[:, :overlap] += carry
    done = height if last else height - overlap
    # Where no token reaches all sums are zero and the first class, the background, wins.
    return _winners(sums[:, :done], 0).numpy(), sums[:, done:]


def _winners(logits: Tensor, dim: int) -> Tensor:
    """The class of the largest logit, uint8; the first one of equals."""
    # `argmax` over an outer dimension takes eight times as long on a CPU.
    return logits.max(dim).indices.to(torch.uint8)
