"""The patch embedding: a strided convolution, also as a matrix for raw 8-bit patches."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigavim.model.config import VimConfig


class PatchEmbed(nn.Module):
    """Cut an image into patches and project each to a token."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        channels, patch_px = config.in_channels, config.patch_px
        self.proj = nn.Conv2d(channels, config.d_model, patch_px, stride=config.stride_px)
        # LeCun normal: the variance of a token's channel is that of a pixel
        std = 1 / math.sqrt(channels * patch_px**2)
        nn.init.trunc_normal_(self.proj.weight, std=std / 0.8796, a=-2 * std, b=2 * std)
        assert self.proj.bias is not None
        nn.init.zeros_(self.proj.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Embed (B, C, H, W): returns (B, rows, cols, D); what no whole patch covers is dropped."""
        side_px = self.proj.kernel_size[0]
        if self.proj.stride[0] != side_px:
            tokens: Tensor = self.proj(images)
            return tokens.permute(0, 2, 3, 1)
        # Patches side by side need no convolution, of which libraries make more work on GPUs.
        rows, cols = self.grid_hw(*images.shape[2:])
        whole = images[:, :, : rows * side_px, : cols * side_px]
        if torch.is_autocast_enabled(images.device.type):  # half as much to move
            whole = whole.to(torch.get_autocast_dtype(images.device.type))
        patches = whole.reshape(*whole.shape[:2], rows, side_px, cols, side_px)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, rows, cols, C P P)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)

    def grid_hw(self, height_px: int, width_px: int) -> tuple[int, int]:
        """Return how many whole patches (rows, cols) an image of a size in pixels has."""
        rows, cols = (
            (side_px - patch_px) // stride_px + 1
            for side_px, patch_px, stride_px in zip(
                (height_px, width_px), self.proj.kernel_size, self.proj.stride
            )
        )
        return rows, cols

    @torch.no_grad()
    def fold_normalisation(
        self, mean: Sequence[float], std: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """Return weight (D, P * P * C) and bias (D,), float32, that take raw 8-bit patches.

        `weight @ patch + bias` is the token of a patch flattened in (row, col, channel) order with
        values 0 to 255, where the model wants (value / 255 - mean) / std. Raw values are exact in
        bfloat16, normalised ones are not.
        """
        scale = 1 / (255 * torch.tensor(std, dtype=torch.float64))
        shift = torch.tensor(mean, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
        kernel = self.proj.weight.detach().double().cpu().permute(0, 2, 3, 1)  # (D, P, P, C)
        assert self.proj.bias is not None
        bias = self.proj.bias.detach().double().cpu() - (kernel * shift).sum((1, 2, 3))
        return (kernel * scale).flatten(1).float(), bias.float()
