"""Weights as the CPU kernels want them: transposed to (.., E), padded with zeros, log2(e) in A.

Padded channels and states compute zeros and cost nothing but the arithmetic.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gigavim_kernels.cpu.scan import state_block
from gigavim_kernels.cpu.simd import LANES
from gigavim_kernels.naive import spread_rates
from gigavim_kernels.weights import Branch, Direction

STATE_MULTIPLE = 8


def padded(tensor: Tensor, dim: int, multiple: int) -> Tensor:
    """Return a contiguous float32 copy, its size along a dim raised to a multiple with zeros."""
    dim %= tensor.ndim
    missing = -tensor.shape[dim] % multiple
    widths = [0, 0] * (tensor.ndim - 1 - dim) + [0, missing]
    return F.pad(tensor.detach().float(), widths).contiguous()


def ordered_taps(weight: Tensor, *, reverse: bool) -> np.ndarray:
    """Return weights (E, K), tap K-1 on the token, as (K, E) in the order of the rows they meet."""
    return padded((weight.flip(1) if reverse else weight).T, 1, LANES).numpy()


@dataclass(frozen=True, slots=True)
class CpuDirection:
    """A direction's weights; E and N padded."""

    conv_weight: np.ndarray
    """(K, E), see `ordered_taps`."""
    conv_bias: np.ndarray
    """(1, E)"""
    reverse_conv: bool
    x_proj: Tensor
    """(E, N + N + R): columns of B, C, dt."""
    dt_weight: np.ndarray
    """(R, E)"""
    dt_bias: np.ndarray
    """(1, E)"""
    A2: np.ndarray
    """(N, E), times log2(e)."""
    D: np.ndarray
    """(1, E)"""
    states: int
    """N before padding."""
    state_block: tuple[int, ...]
    """See `gigavim_kernels.cpu.scan.state_block`."""
    reverse: bool


@dataclass(frozen=True, slots=True)
class CpuBranch:
    """A branch's weights; E padded."""

    norm_weight: np.ndarray
    """(D,)"""
    norm_eps: np.float32
    in_proj_x: Tensor
    """(D, E)"""
    in_proj_z: Tensor
    """(D, E)"""
    out_proj: Tensor
    """(E, D), times the branch's scale."""
    directions: tuple[CpuDirection, ...]
    channels: int
    """E before padding."""


def prepare_branch(branch: Branch, product: torch.dtype) -> CpuBranch:
    """Lay a branch out, the operands of matrix products in the dtype `product`."""
    x, z = (padded(half, 0, LANES) for half in branch.in_proj.chunk(2))
    return CpuBranch(
        norm_weight=branch.norm_weight.detach().float().contiguous().numpy(),
        norm_eps=np.float32(branch.norm_eps),
        in_proj_x=x.T.contiguous().to(product),
        in_proj_z=z.T.contiguous().to(product),
        out_proj=(padded(branch.out_proj, 1, LANES) * branch.scale).T.contiguous().to(product),
        directions=tuple(_prepare_direction(d, product) for d in branch.directions),
        channels=branch.out_proj.shape[1],
    )


def _prepare_direction(direction: Direction, product: torch.dtype) -> CpuDirection:
    rank, states = direction.dt_weight.shape[1], direction.states
    dt, B, C = torch.split_with_sizes(direction.x_proj, (rank, states, states))
    rows = [padded(B, 0, STATE_MULTIPLE), padded(C, 0, STATE_MULTIPLE), padded(dt, 0, LANES)]
    x_proj = padded(torch.cat(rows), 1, LANES)
    rates = spread_rates(direction.A, states)
    A2 = padded(padded(rates.T * math.log2(math.e), 1, LANES), 0, STATE_MULTIPLE).numpy()
    return CpuDirection(
        conv_weight=ordered_taps(direction.conv_weight, reverse=direction.reverse_conv),
        conv_bias=padded(direction.conv_bias[None], 1, LANES).numpy(),
        reverse_conv=direction.reverse_conv,
        x_proj=x_proj.T.contiguous().to(product),
        dt_weight=padded(direction.dt_weight.T, 1, LANES).numpy(),
        dt_bias=padded(direction.dt_bias[None], 1, LANES).numpy(),
        A2=A2,
        D=padded(direction.D[None], 1, LANES).numpy(),
        states=states,
        state_block=state_block(A2),
        reverse=direction.reverse,
    )
