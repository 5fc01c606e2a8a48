"""The directions of a branch side by side, and what their scans read of its inner rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gigavim_kernels.cuda.conv import convolve
from gigavim_kernels.cuda.project import project
from gigavim_kernels.naive import spread_rates
from gigavim_kernels.weights import Direction

RATE_ROUNDING = 1e-6
"""Relative; rates go through a logarithm and back."""
RANK_MULTIPLE = 8
"""Columns of dt are padded to 16 bytes in bf16, so that all of x_proj's columns are aligned."""


@dataclass(frozen=True, slots=True)
class Directions:
    """The S directions of a branch, their tensors stacked."""

    conv_weight: Tensor
    """(S, E, K)"""
    conv_bias: Tensor
    """(S, E)"""
    x_proj: Tensor
    """(S, R + 2 N, E), R padded to a multiple of `RANK_MULTIPLE`."""
    dt_weight: Tensor
    """(S, E, R)"""
    dt_bias: Tensor
    """(S, E)"""
    A: Tensor
    """(S, E, N), or (S, E, 1), see `naive.spread_rates`."""
    D: Tensor
    """(S, E)"""
    reverse: tuple[bool, ...]
    reverse_conv: tuple[bool, ...]

    @staticmethod
    def of(
        tensors: Sequence[Tensor], reverse: Sequence[bool], reverse_conv: Sequence[bool]
    ) -> "Directions":
        """Put `tensors` of directions together again."""
        conv_weight, conv_bias, x_proj, dt_weight, dt_bias, A, D = tensors
        senses = tuple(reverse), tuple(reverse_conv)
        return Directions(conv_weight, conv_bias, x_proj, dt_weight, dt_bias, A, D, *senses)

    @property
    def states(self) -> int:
        """N."""
        return (self.x_proj.shape[1] - self.dt_weight.shape[2]) // 2

    def zero_states(self) -> Tensor:
        """States of zero before any token, (S, E, N)."""
        return self.A.new_zeros(*self.A.shape[:2], self.states)

    def only(self, part: slice) -> "Directions":
        """Some of the directions."""
        tensors = [t[part] for t in self.tensors]
        return Directions.of(tensors, self.reverse[part], self.reverse_conv[part])

    def to(self, device: torch.device, product: torch.dtype) -> "Directions":
        """Move all tensors, those of products as `product`, the others as float32."""
        conv_weight, conv_bias, x_proj, dt_weight, *rest = (
            t.to(device, torch.float32) for t in self.tensors
        )
        products = (x_proj.to(product), dt_weight.to(product))
        tensors = (conv_weight, conv_bias, *products, *rest)
        return Directions.of(tensors, self.reverse, self.reverse_conv)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in the order of the fields."""
        return (
            self.conv_weight, self.conv_bias, self.x_proj, self.dt_weight, self.dt_bias, self.A,
            self.D,
        )  # fmt: skip


class ScanInputs(NamedTuple):
    """What the scans of S directions read of a chunk."""

    c: Tensor
    """(S, B, T, E), the convolved rows."""
    dt: Tensor
    """(S, B, T, E), before bias and softplus, or the steps, see `steps`."""
    bc: Tensor
    """(S, B, T, 2 N) float32: B and C of a token, one after the other."""
    low: Tensor | None
    """(S, B, T, R), what dt is a product of, if it was to be kept."""
    steps: bool
    """Whether dt are the steps, softplus(dt + bias)."""


def stack(directions: Sequence[Direction]) -> Directions:
    """Stack the tensors of directions; gradients flow through."""
    x_proj, dt_weight = zip(*(_pad_rank(d) for d in directions))
    return Directions(
        conv_weight=torch.stack([d.conv_weight for d in directions]),
        conv_bias=torch.stack([d.conv_bias for d in directions]),
        x_proj=torch.stack(x_proj),
        dt_weight=torch.stack(dt_weight),
        dt_bias=torch.stack([d.dt_bias for d in directions]),
        A=torch.stack([d.A for d in directions]),
        D=torch.stack([d.D for d in directions]),
        reverse=tuple(d.reverse for d in directions),
        reverse_conv=tuple(d.reverse_conv for d in directions),
    )


def compact_rates(directions: Sequence[Direction]) -> tuple[Direction, ...]:
    """The directions with one rate per channel, if `naive.spread_rates` gives all of theirs."""
    tied = tuple(replace(d, A=d.A[:, :1]) for d in directions)
    for one, d in zip(tied, directions):
        spread = spread_rates(one.A, d.states)
        if not torch.allclose(spread, d.A, rtol=RATE_ROUNDING, atol=0):
            return tuple(directions)
    return tied


def scan_inputs(
    d: Directions,
    x: Tensor,
    *,
    before: int,
    after: int,
    steps: bool = False,
    keep_low: bool = False,
) -> ScanInputs:
    """Convolve and project inner rows x (B, before + T + after, E) for the T tokens in between.

    The weights of the products, x_proj and dt_weight, have the dtype of x. `steps` asks for steps
    in place of dt, which rows of 16 bits come with at no cost; others are left to the scan.
    """
    c = convolve(x, d.conv_weight, d.conv_bias, reverse=d.reverse_conv, before=before, after=after)
    if x.element_size() == 2:
        bias = d.dt_bias if steps else None
        dt, bc, low = project(c, d.x_proj, d.dt_weight, dt_bias=bias, keep_low=keep_low)
        return ScanInputs(c, dt, bc, low, steps)
    projected = torch.bmm(c.flatten(1, 2), d.x_proj.mT).view(*c.shape[:3], -1)
    low, bc = projected.split_with_sizes((d.dt_weight.shape[2], 2 * d.states), -1)
    dt = torch.bmm(low.flatten(1, 2), d.dt_weight.mT)
    return ScanInputs(c, dt.view(c.shape), bc.contiguous(), low, steps=False)


def _pad_rank(direction: Direction) -> tuple[Tensor, Tensor]:
    """x_proj and dt_weight with zero rows and columns up to a multiple of the rank."""
    rank = direction.dt_weight.shape[1]
    more = -rank % RANK_MULTIPLE
    rows_dt, rows_bc = direction.x_proj[:rank], direction.x_proj[rank:]
    x_proj = torch.cat((F.pad(rows_dt, (0, 0, 0, more)), rows_bc))
    return x_proj, F.pad(direction.dt_weight, (0, more))
