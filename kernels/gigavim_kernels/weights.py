"""The weights of a Vim block as plain tensors: what every backend of the block receives.

A block adds the output of its branches to the stream. The published block (bidirectional "v2") is
one branch of two directions; "v1" shares all but `A` between its two directions; "none" has one
direction; the "layer pairs" variant is one block of two branches that doubles the stream.

Sizes: D = d_model, E = d_inner = 2 D, N = d_state, R = dt_rank, K = d_conv.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Direction:
    """One direction of the selective scan with what computes its inputs; all tensors float32."""

    conv_weight: Tensor
    """(E, K) depthwise; tap K-1 meets the current token."""
    conv_bias: Tensor
    """(E,)"""
    x_proj: Tensor
    """(R + 2 N, E): rows of dt (R), B (N), C (N)."""
    dt_weight: Tensor
    """(E, R)"""
    dt_bias: Tensor
    """(E,), added before the softplus."""
    A: Tensor
    """(E, N), negative: -exp(A_log); or (E, 1), see `naive.spread_rates`."""
    D: Tensor
    """(E,), the skip."""
    reverse: bool
    """Scan from the last token to the first."""
    reverse_conv: bool
    """Convolve anti-causally (tap K-1-j meets the token j places later)."""

    @property
    def states(self) -> int:
        """N."""
        return (self.x_proj.shape[0] - self.dt_weight.shape[1]) // 2


@dataclass(frozen=True, slots=True)
class Branch:
    """RMSNorm, in_proj, the directions, their sum times `scale`, out_proj."""

    norm_weight: Tensor
    """(D,)"""
    norm_eps: float
    in_proj: Tensor
    """(2 E, D): rows of x (E), z (E)."""
    out_proj: Tensor
    """(D, E)"""
    directions: tuple[Direction, ...]
    scale: float
    """0.5 where the sum of directions is halved (`if_divide_out`), else 1."""


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """stream <- stream_scale * stream + sum over branches of branch(stream)."""

    branches: tuple[Branch, ...]
    stream_scale: float = 1.0
