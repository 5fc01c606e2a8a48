"""Segmenter's mask transformer, in windows that lie at the same places of any grid."""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigavim.errors import ModelError
from gigavim.model.block import RMSNorm
from gigavim.model.config import VimConfig
from gigavim.model.heads import Head, Part, default_width

WINDOW = 16
"""Side, in tokens, of the squares within which tokens attend to each other."""
LAYERS = 2
HEAD_CHANNELS = 32


class SegmenterHead(Head):
    """Class tokens attend together with patch tokens; masks are their products (arXiv 2105.05633).

    Attention over everything is quadratic (Strudel et al. 2021 have some thousand tokens), so it is
    among the tokens of a square of 16 x 16, and a set of class tokens of its own. Squares
    begin at multiples of 16 on the whole grid, in training and on slides alike: that, and not how
    a slide is cut to be decoded, is the model. What lies beyond a square is known to a token from
    the encoder alone. Masks of a number per token become pixels bilinearly between tokens.
    """

    def __init__(self, config: VimConfig, classes: int, width: int = 0) -> None:
        super().__init__(config, classes)
        self.width = w = width or default_width(config)
        self.heads = max(1, w // HEAD_CHANNELS)
        if w % self.heads:
            raise ModelError(f"a head of {w} channels: a multiple of {HEAD_CHANNELS} is wanted")
        self.feature_width = w
        self.reach = math.ceil((self.patch_px - 1) / 2 / self.stride_px)
        """Tokens on either side that a patch's pixels lie between."""
        self.halo = WINDOW - 1 + self.reach
        self.last = nn.Linear(config.d_model, w)
        self.class_tokens = nn.Parameter(torch.empty(classes, w))
        nn.init.trunc_normal_(self.class_tokens, std=0.02)
        self.layers = nn.ModuleList(Layer(w, self.heads, config.norm_eps) for _ in range(LAYERS))
        self.norm = RMSNorm(w, config.norm_eps)
        self.of_patch = nn.Linear(w, w, bias=False)
        self.of_class = nn.Linear(w, w, bias=False)
        self.mask_norm = nn.LayerNorm(classes)

    def features(self, encoded: Tensor, side: Tensor | None) -> Tensor:
        """See `Head.features`."""
        return cast(Tensor, self.last(encoded))

    def decode(
        self, features: Tensor, kept: Tensor | None = None, part: Part | None = None
    ) -> Tensor:
        """See `Head.decode`."""
        batch, rows, cols, _ = features.shape
        top, left = (0, 0) if part is None else (part.top % WINDOW, part.left % WINDOW)
        bottom, right = -(top + rows) % WINDOW, -(left + cols) % WINDOW
        if kept is None:
            kept = torch.ones(batch, rows, cols, dtype=torch.bool, device=features.device)
        sides = (left, right, top, bottom)
        there = _squares(F.pad(kept, sides)[..., None])[..., 0]  # (n, WINDOW ** 2)
        masks = self._masks(_squares(F.pad(features, (0, 0, *sides))), there)
        down, across = (top + rows + bottom) // WINDOW, (left + cols + right) // WINDOW
        grid = masks.view(batch, down, across, WINDOW, WINDOW, self.classes)
        grid = grid.transpose(2, 3).reshape(batch, down * WINDOW, across * WINDOW, self.classes)
        return self._pixels(grid[:, top : top + rows, left : left + cols], kept)

    def _masks(self, tokens: Tensor, there: Tensor) -> Tensor:
        """Squares (n, WINDOW ** 2, width) to a number per class (n, WINDOW ** 2, classes)."""
        own = self.class_tokens.to(tokens.dtype).expand(len(tokens), -1, -1)
        x = torch.cat((tokens, own), 1)
        mask = F.pad(there, (0, self.classes), value=True)
        for layer in self.layers:
            x = layer(x, mask)
        x = self.norm(x)
        patches, classes = x[:, : -self.classes], x[:, -self.classes :]
        patches, classes = (
            F.normalize(linear(y).to(x.dtype), dim=-1)
            for linear, y in ((self.of_patch, patches), (self.of_class, classes))
        )
        return cast(Tensor, self.mask_norm(patches @ classes.transpose(1, 2)))

    def _pixels(self, grid: Tensor, kept: Tensor) -> Tensor:
        """(B, rows, cols, classes) to (B, rows, cols, classes, P, P), between tokens that are."""
        reach, side = self.reach, 2 * self.reach + 1
        pixel = torch.arange(self.patch_px, device=grid.device, dtype=grid.dtype)
        place = (pixel - (self.patch_px - 1) / 2) / self.stride_px
        near = torch.arange(-reach, reach + 1, device=grid.device, dtype=grid.dtype)
        weights = (1 - (place[:, None] - near).abs()).clamp(min=0)  # (P, side)
        there = kept[..., None].to(grid.dtype)
        values = torch.cat((grid * there, there), -1)
        values = F.pad(values, (0, 0, reach, reach, reach, reach))
        around = values.unfold(1, side, 1).unfold(2, side, 1)  # (B, rows, cols, classes + 1, s, s)
        found = torch.einsum("brckuv,yu,xv->brckyx", around, weights, weights)
        # Weights of tokens that are there; none need be where patches reach beyond neighbours.
        return found[:, :, :, :-1] / found[:, :, :, -1:].clamp(min=1e-3)


class Layer(nn.Module):
    """A transformer layer with norms first, on (n, tokens, channels)."""

    def __init__(self, channels: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = RMSNorm(channels, eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.mlp_norm = RMSNorm(channels, eps)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Attend to tokens where the mask (n, tokens) is true."""
        qkv = cast(Tensor, self.qkv(self.norm(x))).reshape(*x.shape[:2], 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        x = x + self.proj(found.transpose(1, 2).flatten(2))
        return x + cast(Tensor, self.mlp(self.mlp_norm(x)))


def _squares(grid: Tensor) -> Tensor:
    """(B, h * WINDOW, w * WINDOW, c) to (B * h * w, WINDOW ** 2, c)."""
    batch, rows, cols, channels = grid.shape
    cut = grid.reshape(batch, rows // WINDOW, WINDOW, cols // WINDOW, WINDOW, channels)
    return cut.transpose(2, 3).reshape(-1, WINDOW**2, channels)
