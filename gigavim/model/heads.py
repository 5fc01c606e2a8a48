"""Heads: encoded tokens to the logits of every pixel of their patches.

A head may also read what layers in between say of a token (its taps), and the neighbours of a token
on the grid. Both are said here, so that whatever runs a model, over a picture or strip by strip
over a slide, gives it the same numbers:

- `side` is what the taps leave of a token: numbers that are added up while the blocks run;
- `features` joins it to the final-normed token;
- `survey` is what some tokens add to what a head knows of all of them (its context);
- `decode` turns a window of the grid into logits. Of a window's tokens, those further than `halo`
  from its sides do not depend on where the grid was cut. Cells that are no tokens are to
  their neighbours what the outside of the grid is: nothing.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from gigavim.errors import ModelError
from gigavim.model.block import RMSNorm
from gigavim.model.config import VimConfig

DETAIL_FLOATS = 128
"""Numbers of a token's own pixels that the decoder sees at its finest level."""


@dataclass(frozen=True, slots=True)
class Part:
    """Where a window lies on the whole grid, and what its head knows of all tokens."""

    top: int
    left: int
    grid_hw: tuple[int, int]
    """(rows, cols) of the whole grid."""
    context: Tensor | None = None
    """The sum of what `Head.survey` gave, or what `Head.survey_grid` did."""


class Head(nn.Module, ABC):
    """What all heads have in common.

    Args:
        config: of the encoder.
        classes: of the logits.
    """

    taps: tuple[int, ...] = ()
    """How many blocks the stream has passed where the head reads it; 0 is before the first."""
    side_width: int = 0
    """Numbers that the taps leave of a token."""
    halo: int = 0
    """How many neighbours away, on the grid, a token still matters."""
    surveys: bool = False
    """Whether it knows something of all tokens, which is surveyed before any is decoded."""

    def __init__(self, config: VimConfig, classes: int) -> None:
        super().__init__()
        self.classes, self.patch_px, self.stride_px = classes, config.patch_px, config.stride_px
        self.feature_width = config.d_model

    def side(self, place: int, stream: Tensor) -> Tensor:
        """What the tap at `place` blocks adds: a stream (..., D) to (..., side_width)."""
        raise TypeError(f"{type(self).__name__} has no taps")

    def features(self, encoded: Tensor, side: Tensor | None) -> Tensor:
        """Join final-normed tokens (..., D) and the sum of the taps: (..., feature_width)."""
        return encoded

    def survey(
        self, features: Tensor, row: Tensor, col: Tensor, grid_hw: tuple[int, int]
    ) -> Tensor:
        """What some tokens (n, feature_width) add to the context, float64.

        Args:
            row: (n,) int64 on the grid. col: (n,) int64.
            grid_hw: (rows, cols) of the whole grid.
        """
        raise TypeError(f"{type(self).__name__} surveys nothing")

    def survey_grid(self, grid: Tensor, kept: Tensor | None = None) -> Tensor | None:
        """The context of whole grids (B, rows, cols, feature_width), with gradients."""
        return None

    @abstractmethod
    def decode(
        self, features: Tensor, kept: Tensor | None = None, part: Part | None = None
    ) -> Tensor:
        """Decode a window of the grid.

        Args:
            features: (B, rows, cols, feature_width), zero where no token is.
            kept: (B, rows, cols) bool, where tokens are; everywhere if absent.
            part: which window of the grid; the whole grid if absent.

        Returns:
            (B, rows, cols, classes, patch_px, patch_px) logits.
        """


class LinearHead(Head):
    """One linear map from a final-normed token to the logits of every pixel of its patch."""

    def __init__(self, config: VimConfig, classes: int) -> None:
        super().__init__(config, classes)
        self.linear = nn.Linear(config.d_model, classes * config.patch_px**2)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def decode(
        self, features: Tensor, kept: Tensor | None = None, part: Part | None = None
    ) -> Tensor:
        """See `Head.decode`; any leading dimensions will do."""
        logits: Tensor = self.linear(features)
        return logits.reshape(*features.shape[:-1], self.classes, self.patch_px, self.patch_px)


class FpnHead(Head):
    """A light decoder: layers in between are summed, then refined while tokens become pixels.

    Four layers and the last are projected to `width` channels and added, as the lateral connections
    of a feature pyramid are (Lin et al. 2017; a plain encoder has one scale). Then, by turns,
    convolutions over neighbours and a doubling of the scale at half the channels, down to cells of
    2 px (or of an odd part of the stride), where the token's own pixels, read before the first
    block, come in once more.
    """

    def __init__(self, config: VimConfig, classes: int, width: int = 0) -> None:
        super().__init__(config, classes)
        d_model, blocks = config.d_model, config.depth
        if config.bidirectional == "layer_pairs":
            blocks //= 2
        levels = halvings(config.stride_px)
        self.width = width or default_width(config)
        if self.width % 2**levels:
            raise ModelError(f"a head of {self.width} channels cannot be halved {levels} times")
        self.scale = 2**levels
        self.detail = max(2, DETAIL_FLOATS // self.scale**2)
        self.taps = tuple(sorted({round(blocks * k / 4) for k in range(4)}))
        self.side_width = self.feature_width = self.width + self.scale**2 * self.detail
        self.halo = -(-2 * sum(2 ** (levels - k) for k in range(levels + 1)) // self.scale)
        self.norms = nn.ModuleList(RMSNorm(d_model, config.norm_eps) for _ in self.taps)
        self.laterals = nn.ModuleList(
            nn.Linear(d_model, self.width if place else self.side_width, bias=False)
            for place in self.taps
        )
        self.last = nn.Linear(d_model, self.width, bias=False)
        channels = [self.width >> k for k in range(levels + 1)]
        self.refine = nn.ModuleList(Refine(c, config.norm_eps) for c in channels)
        self.grow = nn.ModuleList(nn.Linear(c, 2 * c, bias=False) for c in channels[:-1])
        fine = channels[-1]
        self.mix = nn.Linear(self.detail, fine, bias=False)
        self.norm = RMSNorm(fine, config.norm_eps)
        self.out = outputs(config, fine, self.scale, classes)

    def side(self, place: int, stream: Tensor) -> Tensor:
        """See `Head.side`."""
        index = self.taps.index(place)
        lateral = cast(Tensor, self.laterals[index](self.norms[index](stream)))
        return F.pad(lateral, (0, self.side_width - lateral.shape[-1]))

    def features(self, encoded: Tensor, side: Tensor | None) -> Tensor:
        """See `Head.features`."""
        assert side is not None
        last = cast(Tensor, self.last(encoded))
        return side + F.pad(last, (0, self.side_width - self.width))

    def decode(
        self, features: Tensor, kept: Tensor | None = None, part: Part | None = None
    ) -> Tensor:
        """See `Head.decode`."""
        x, own = features[..., : self.width], features[..., self.width :]
        mask = None if kept is None else kept[..., None].to(x.dtype)  # (B, rows, cols, 1)
        for level, refine in enumerate(self.refine):
            if level:
                x = spread(self.grow[level - 1](x), 2)
                mask = None if mask is None else repeat(mask, 2)
            if level == len(self.refine) - 1:
                x = x + self.mix(spread(own, self.scale))
            x = refine(x, mask)
        return laid_out_pixels(self, self.out, self.norm(x), self.scale)


class Refine(nn.Module):
    """x + conv(gelu(conv(norm(x)))), 3 x 3 each, on (B, rows, cols, channels)."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, eps)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Refine; outside the mask (B, rows, cols, 1) everything stays zero."""
        inner = F.gelu(convolved(self.first, self.norm(x)))
        if mask is None:
            return x + convolved(self.second, inner)
        return x + convolved(self.second, inner * mask) * mask


def default_width(config: VimConfig) -> int:
    """Channels of a decoder over an encoder: half of its own, in steps of 32, at least 32."""
    return max(32, config.d_model // 2 // 32 * 32)


def outputs(config: VimConfig, channels: int, scale: int, classes: int) -> nn.Linear:
    """The last map of a decoder whose tokens have scale x scale cells; see `laid_out_pixels`."""
    if config.stride_px == config.patch_px:
        out = nn.Linear(channels, classes * (config.stride_px // scale) ** 2)
    else:
        out = nn.Linear(channels * scale**2, classes * config.patch_px**2)
    nn.init.zeros_(out.bias)
    return out


def laid_out_pixels(head: Head, out: nn.Module, x: Tensor, scale: int) -> Tensor:
    """Map cells (B, rows * s, cols * s, channels) to (B, rows, cols, classes, P, P) logits."""
    x = gathered(x, scale)  # (B, rows, cols, s, s, channels)
    if head.stride_px != head.patch_px:
        logits: Tensor = out(x.flatten(3))
        return logits.reshape(*x.shape[:3], head.classes, head.patch_px, head.patch_px)
    rest = head.stride_px // scale
    cells: Tensor = out(x)
    cells = cells.reshape(*x.shape[:5], head.classes, rest, rest)
    laid = cells.permute(0, 1, 2, 5, 3, 6, 4, 7)  # (B, rows, cols, classes, s, r, s, r)
    return laid.flatten(6).flatten(4, 5)


def halvings(stride_px: int) -> int:
    """How often a stride can be halved so that cells of at least 2 px are left."""
    count = 0
    while stride_px % 4 == 0:
        stride_px, count = stride_px // 2, count + 1
    return count


def convolved(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution of (B, rows, cols, channels), which torch calls channels last."""
    return cast(Tensor, conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


def spread(x: Tensor, factor: int) -> Tensor:
    """(B, rows, cols, f * f * c) to (B, rows * f, cols * f, c)."""
    batch, rows, cols, _ = x.shape
    cells = x.reshape(batch, rows, cols, factor, factor, -1).transpose(2, 3)
    return cells.reshape(batch, rows * factor, cols * factor, -1)


def gathered(x: Tensor, factor: int) -> Tensor:
    """(B, rows * f, cols * f, c) to (B, rows, cols, f, f, c)."""
    batch, rows, cols, channels = x.shape
    cells = x.reshape(batch, rows // factor, factor, cols // factor, factor, channels)
    return cells.transpose(2, 3)


def repeat(x: Tensor, factor: int) -> Tensor:
    """(B, rows, cols, c) to (B, rows * factor, cols * factor, c), each cell repeated."""
    return x.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


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
