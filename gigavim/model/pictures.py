"""Pictures through a segmentation model, each as one sequence, and pictures cut into windows.

Evaluation sees pictures so, and segmentation with the context of a window; both use this.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gigavim.model.config import VimConfig
from gigavim.model.segmentation import SegmentationModel, SideSum
from gigavim.model.vim import OnStream
from gigavim.tokens.order import ScanOrder


class Encode(Protocol):
    """What runs the blocks and the final norm over sequences, on kernels of its own."""

    def __call__(self, tokens: Tensor, *, on_stream: OnStream) -> Tensor:
        """(B, L, D) -> (B, L, D); `on_stream` as of `gigavim.model.vim.Vim.encode`."""
        ...


@dataclass(frozen=True, slots=True)
class Features:
    """What an encoder made of pictures of one size."""

    encoded: Tensor
    """(n, L, D) final-normed tokens in scan order, class tokens among them."""
    grid: Tensor
    """(n, rows, cols, feature_width), what the head decodes."""


@dataclass(frozen=True, slots=True)
class Look:
    """How pictures are brought to a model: as it was trained."""

    order: ScanOrder
    mean: Sequence[float]
    std: Sequence[float]
    every_cell: bool = False
    """Let a patch begin at every stride within a picture, where patches overlap at its end too."""

    def grid_hw(self, config: VimConfig, size_hw: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the patches of pictures of (h, w) px: whole blocks of them."""
        block, stride = self.order.block or 1, config.stride_px
        extra = 0 if self.every_cell else config.patch_px - stride
        rows, cols = (block * max(1, -(-(s - extra) // (block * stride))) for s in size_hw)
        return rows, cols

    def features(self, model: SegmentationModel, images: Tensor, encode: Encode) -> Features:
        """Encode pictures (n, 3, h, w) in [0, 1], each in one sequence."""
        config = model.encoder.config
        grid_hw = self.grid_hw(config, (images.shape[2], images.shape[3]))
        height, width = ((n - 1) * config.stride_px + config.patch_px for n in grid_hw)
        mean, std = (
            torch.tensor(v, device=images.device)[:, None, None] for v in (self.mean, self.std)
        )
        normalised = (mirrored_to(images, (height, width)) - mean) / std
        taps = SideSum(model)
        encoded = encode(model.encoder.tokens(normalised, order=self.order), on_stream=taps)
        grid = model.feature_grid(encoded, taps.total, grid_hw, self.order)
        return Features(encoded, grid)


def side_slices(size_hw: tuple[int, int], side_px: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of the windows of `side_px` a side that tile (h, w) px, row by row.

    Those at the right and the lower border are what is left there.
    """
    height, width = size_hw
    for y in range(0, height, side_px):
        for x in range(0, width, side_px):
            yield slice(y, min(y + side_px, height)), slice(x, min(x + side_px, width))


def mirrored(place: Tensor, size: Tensor | int) -> Tensor:
    """Bring places along a side into 0..size-1: beyond its ends it is mirrored."""
    folded = place.remainder(2 * size)
    return torch.minimum(folded, 2 * size - 1 - folded)


def mirrored_to(images: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Extend images (n, c, h, w) to at least a size, mirrored at the right and lower border."""
    for dim, wanted in zip((2, 3), size_hw, strict=True):
        size = images.shape[dim]
        if wanted > size:
            sides = torch.arange(wanted, device=images.device)
            images = images.index_select(dim, mirrored(sides, size))
    return images
