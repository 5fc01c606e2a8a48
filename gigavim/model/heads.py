"""The segmentation model: the encoder, and a head that turns each token into its patch's pixels."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigavim.errors import ModelError
from gigavim.model.sequence import without_class_tokens
from gigavim.model.vim import Vim, grid_cells
from gigavim.tokens.order import ScanOrder


class LinearHead(nn.Module):
    """One linear map from a final-normed token to the logits of every pixel of its patch."""

    def __init__(self, d_model: int, classes: int, patch_px: int) -> None:
        super().__init__()
        self.classes, self.patch_px = classes, patch_px
        self.linear = nn.Linear(d_model, classes * patch_px**2)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Decode tokens (..., D): returns logits (..., classes, patch_px, patch_px)."""
        logits: Tensor = self.linear(tokens)
        return logits.reshape(*tokens.shape[:-1], self.classes, self.patch_px, self.patch_px)


class SegmentationModel(nn.Module):
    """Encoder and head; what `gigavim.model.load_model` returns."""

    def __init__(self, encoder: Vim, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = LinearHead(encoder.config.d_model, classes, encoder.config.patch_px)

    def forward(
        self,
        images: Tensor,
        order: ScanOrder | None = None,
        *,
        origin_um: tuple[float, float] = (0.0, 0.0),
    ) -> Tensor:
        """Segment normalised images (B, 3, H, W): returns logits (B, classes, H, W).

        Args:
            images: float; H and W are patch_px plus a multiple of stride_px.
            order: how the patches stand in the sequence; row by row if absent.
            origin_um: (x, y) of the image's corner, for "sincos" positions; random in training.
        """
        config = self.encoder.config
        sides = images.shape[-2:]
        if any(s < config.patch_px or (s - config.patch_px) % config.stride_px for s in sides):
            raise ModelError(
                f"images of {sides[1]} x {sides[0]} px do not fit patches of {config.patch_px} px "
                f"every {config.stride_px} px: pad or crop them"
            )
        rows, cols = ((s - config.patch_px) // config.stride_px + 1 for s in sides)
        encoded = self.encoder.encode(self.encoder.tokens(images, order=order, origin_um=origin_um))
        patches = without_class_tokens(encoded, config.class_token)  # (B, rows * cols, D)
        if order is not None:
            place = torch.argsort(grid_cells(rows, cols, order)).to(patches.device)
            patches = patches[:, place]
        return stitch(cast(Tensor, self.head(patches)), (rows, cols), config.stride_px)


def stitch(patches: Tensor, grid_hw: tuple[int, int], stride_px: int) -> Tensor:
    """Lay patch logits (B, rows * cols, classes, P, P) out as a map (B, classes, H, W).

    Where patches overlap, logits are averaged.
    """
    rows, cols = grid_hw
    batch, _, classes, patch_px, _ = patches.shape
    if stride_px == patch_px:
        grid = patches.view(batch, rows, cols, classes, patch_px, patch_px)
        return grid.permute(0, 3, 1, 4, 2, 5).reshape(
            batch, classes, rows * patch_px, cols * patch_px
        )
    size_hw = tuple((n - 1) * stride_px + patch_px for n in grid_hw)
    columns = patches.flatten(2).transpose(1, 2)  # (B, classes * P * P, rows * cols)
    total = F.fold(columns, size_hw, patch_px, stride=stride_px)
    ones = columns.new_ones(1, patch_px**2, rows * cols)
    return total / F.fold(ones, size_hw, patch_px, stride=stride_px)
