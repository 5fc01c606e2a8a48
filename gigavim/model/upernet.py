"""UperNet over a plain encoder: a feature pyramid of four depths and pooling over all tokens."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigavim.model import bins
from gigavim.model.block import RMSNorm
from gigavim.model.config import VimConfig
from gigavim.model.heads import (
    Head,
    Part,
    convolved,
    default_width,
    halvings,
    laid_out_pixels,
    outputs,
    repeat,
    spread,
)


class UperNetHead(Head):
    """The decoder of the paper's segmentation (Xiao et al. 2018, arXiv 1807.10221), streamed.

    The stream after a quarter, a half and three quarters of the blocks and the final-normed token
    become levels of 4, 2, 1 and 1/2 cells per token and side (as in the published code; less where
    a cell would be finer than 2 px). The coarsest is joined with means of the whole slide in
    1, 4, 9 and 36 cells, then added to the finer ones level by level; all are fused at the finest.

    Other than published: a linear map per cell in place of stacked transposed convolutions, means
    in place of maxima for the coarsest level, nearest neighbours between levels, and RMS norms,
    which know no batch. Means are of tokens that are there.
    """

    surveys = True

    def __init__(self, config: VimConfig, classes: int, width: int = 0) -> None:
        super().__init__(config, classes)
        d_model, eps = config.d_model, config.norm_eps
        blocks = config.depth // (2 if config.bidirectional == "layer_pairs" else 1)
        self.width = w = width or default_width(config)
        fine = max(1, w // 2)
        self.depths = tuple(round(blocks * k / 4) for k in (1, 2, 3))
        self.taps = tuple(sorted(set(self.depths)))
        self.side_width, self.feature_width = 3 * w, 4 * w
        self.scale = min(4, 2 ** halvings(config.stride_px))
        self.scales = (self.scale, min(2, self.scale), 1)
        self.halo = 5  # fusion and level 1 see a token each, the coarsest a cell: three tokens
        self.norms = nn.ModuleList(RMSNorm(d_model, eps) for _ in self.depths)
        self.laterals = nn.ModuleList(nn.Linear(d_model, w, bias=False) for _ in self.depths)
        self.last = nn.Linear(d_model, w, bias=False)
        self.grow = nn.ModuleList(nn.Linear(w, w * s * s) for s in self.scales)
        self.pooled = nn.ModuleList(nn.Linear(w, fine) for _ in bins.SIZES)
        self.bottleneck = ConvNorm(w + fine * len(bins.SIZES), w, eps)
        self.smooth = nn.ModuleList(ConvNorm(w, fine, eps) for _ in self.scales)
        self.coarse = nn.Linear(w, fine)
        self.fuse = ConvNorm(4 * fine, fine, eps)
        self.out = outputs(config, fine, self.scale, classes)

    def side(self, place: int, stream: Tensor) -> Tensor:
        """See `Head.side`; every depth has numbers of its own."""
        return torch.cat(
            [
                lateral(norm(stream)) if depth == place else
                stream.new_zeros(*stream.shape[:-1], self.width)
                for depth, norm, lateral in zip(self.depths, self.norms, self.laterals, strict=True)
            ],
            -1,
        )  # fmt: skip

    def features(self, encoded: Tensor, side: Tensor | None) -> Tensor:
        """See `Head.features`."""
        assert side is not None
        last = cast(Tensor, self.last(encoded))
        return torch.cat((side.to(last.dtype), last), -1)

    def survey(
        self, features: Tensor, row: Tensor, col: Tensor, grid_hw: tuple[int, int]
    ) -> Tensor:
        """See `Head.survey`: sums and counts of the coarsest level, (1, BINS, width + 1)."""
        return bins.bin_sums(features[:, 3 * self.width :], row, col, grid_hw)[None]

    def survey_grid(self, grid: Tensor, kept: Tensor | None = None) -> Tensor:
        """See `Head.survey_grid`."""
        return bins.grid_sums(grid[..., 3 * self.width :], kept)

    def decode(
        self, features: Tensor, kept: Tensor | None = None, part: Part | None = None
    ) -> Tensor:
        """See `Head.decode`."""
        rows, cols = features.shape[1:3]
        if part is None:
            part = Part(0, 0, (rows, cols), self.survey_grid(features, kept))
        mask = None if kept is None else kept[..., None].to(features.dtype)  # (B, rows, cols, 1)
        *parts, last = torch.split(features, self.width, -1)
        levels = [spread(grow(x), s) for x, s, grow in zip(parts, self.scales, self.grow,
                                                           strict=True)]  # fmt: skip
        masks = [None if mask is None else repeat(mask, s) for s in self.scales]
        top = self._coarsest(last, mask, part)
        above = repeat(top, 2)[:, part.top % 2 :, part.left % 2 :][:, :rows, :cols]
        fused = [repeat(cast(Tensor, self.coarse(above)), self.scale)]
        before = 1
        for level, scale, there, smooth in reversed(
            list(zip(levels, self.scales, masks, self.smooth, strict=True))
        ):
            above = repeat(above, scale // before) + level
            above, before = above if there is None else above * there, scale
            fused.append(repeat(smooth(above, there), self.scale // scale))
        x = self.fuse(torch.cat(fused, -1), masks[0])
        return laid_out_pixels(self, self.out, x, self.scale)

    def _coarsest(self, last: Tensor, mask: Tensor | None, part: Part) -> Tensor:
        """The level of 2 x 2 tokens per cell, aligned to the whole grid, (B, h, w, width)."""
        batch, rows, cols, _ = last.shape
        ones = last.new_ones(batch, rows, cols, 1) if mask is None else mask
        # The grid's odd last row and column, and a window that begins amid a cell.
        top, left = part.top % 2, part.left % 2
        sides = (0, 0, left, (left + cols) % 2, top, (top + rows) % 2)
        last, ones = F.pad(last * ones, sides), F.pad(ones, sides)
        count = _cell_sums(ones)
        means = _cell_sums(last) / count.clamp(min=1)
        there = (count > 0).to(last.dtype)
        assert part.context is not None
        cells = bins.bin_means(part.context)
        down, across = (
            ((start // 2 + torch.arange(n, device=last.device)) * 2 + 1, length)
            for start, n, length in zip(
                (part.top, part.left), means.shape[1:3], part.grid_hw, strict=True
            )
        )
        parts = torch.split(cells.to(last.dtype), [s * s for s in bins.SIZES], 1)
        pyramid = [
            bins.spread_bins(F.gelu(linear(x)), size, down, across).to(means.dtype)
            for x, size, linear in zip(parts, bins.SIZES, self.pooled, strict=True)
        ]
        joined = torch.cat((means, *pyramid), -1) * there
        return cast(Tensor, self.bottleneck(joined, there))


class ConvNorm(nn.Module):
    """gelu(norm(conv(x))), 3 x 3, on (B, rows, cols, channels)."""

    def __init__(self, channels: int, made: int, eps: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, made, 3, padding=1)
        self.norm = RMSNorm(made, eps)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Outside the mask (B, rows, cols, 1) everything becomes zero."""
        found = F.gelu(self.norm(convolved(self.conv, x)))
        return found if mask is None else found * mask


def _cell_sums(x: Tensor) -> Tensor:
    """(B, 2 h, 2 w, c) to sums (B, h, w, c)."""
    batch, rows, cols, channels = x.shape
    return x.reshape(batch, rows // 2, 2, cols // 2, 2, channels).sum((2, 4))
