"""The specification of the scan, the convolution and the block: plain torch, one token a step.

Every other backend is tested against these functions. They follow the dtype of their inputs
(float64 gives a reference) and are differentiable. Sizes: B batch, L tokens, E channels, N states.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gigavim_kernels.weights import BlockWeights


class ScanResult(NamedTuple):
    """What a scan returns."""

    y: Tensor
    """(B, L, E) output, gated where z was given."""
    state: Tensor
    """(B, E, N) hidden state after the last token in scan order."""
    decay: Tensor
    """(B, E, N) factor by which the initial state entered `state`: exp(A * sum of dt)."""


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    reverse: bool = False,
) -> ScanResult:
    """Selective state space scan with softplus, skip and gate (arXiv 2312.00752, as in Vim's code).

        dt'_t = softplus(dt_t + dt_bias)
        h_t   = exp(dt'_t A) h_{t-1} + dt'_t B_t x_t
        y_t   = (C_t . h_t + D x_t) * silu(z_t)

    Args:
        x: (B, L, E) input; dt: (B, L, E) before bias and softplus; z: (B, L, E) gate.
        A: (E, N), negative, or (E, 1), see `spread_rates`. B, C: (B, L, N), shared by all channels.
        D, dt_bias: (E,).
        state: (B, E, N) initial hidden state, zero if absent.
        reverse: scan from token L-1 to token 0; y stays in token order.
    """
    A = spread_rates(A, B.shape[2])
    delta = F.softplus(dt if dt_bias is None else dt + dt_bias)  # (B, L, E)
    batch, length, channels = x.shape
    h = x.new_zeros(batch, channels, A.shape[1]) if state is None else state
    outputs: list[Tensor] = [x.new_zeros(0)] * length
    for t in reversed(range(length)) if reverse else range(length):
        decay_t = torch.exp(delta[:, t, :, None] * A)  # (B, E, N)
        h = decay_t * h + (delta[:, t] * x[:, t])[..., None] * B[:, t, None, :]
        outputs[t] = (h * C[:, t, None, :]).sum(-1)  # (B, E)
    y = torch.stack(outputs, 1) if length else x
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * F.silu(z)
    return ScanResult(y, h, torch.exp(A * delta.sum(1)[..., None]))


def spread_rates(A: Tensor, states: int) -> Tensor:
    """The rates of all states, (..., E, N), of A (..., E, N) or (..., E, 1).

    A single rate is state 0's; state n decays n + 1 times as fast, the ratio that Mamba starts
    from. Where it is kept, one exponential makes the decays of all states by products.
    """
    if A.shape[-1] == states:
        return A
    return A * torch.arange(1, states + 1, dtype=A.dtype, device=A.device)


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, halo: Tensor | None = None, *, reverse: bool = False
) -> Tensor:
    """Depthwise causal convolution followed by SiLU, token-major.

    Args:
        x: (B, L, E). weight: (E, K), tap K-1 meets the current token. bias: (E,).
        halo: (B, K-1, E) the tokens before x (after x if `reverse`), in token order; zeros if
            absent.
        reverse: anti-causal: the taps reach to later tokens.

    Returns:
        (B, L, E).
    """
    width = weight.shape[1]
    if halo is None:
        halo = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    padded = torch.cat((x, halo) if reverse else (halo, x), 1).transpose(1, 2)  # (B, E, L + K - 1)
    taps = weight.flip(1) if reverse else weight
    return F.silu(F.conv1d(padded, taps[:, None], bias, groups=x.shape[2]).transpose(1, 2))


def vim_block(block: BlockWeights, stream: Tensor) -> Tensor:
    """Return the stream (L, D) after a block, computed in float64."""
    stream = stream.double()
    result = block.stream_scale * stream
    for branch in block.branches:
        normed = F.rms_norm(stream, stream.shape[-1:], branch.norm_weight.double(), branch.norm_eps)
        x, z = (normed @ branch.in_proj.double().T)[None].chunk(2, 2)  # (1, L, E)
        total = torch.zeros_like(x)
        for d in branch.directions:
            c = causal_conv(x, d.conv_weight.double(), d.conv_bias.double(), reverse=d.reverse_conv)
            projected = c @ d.x_proj.double().T
            rank, states = d.dt_weight.shape[1], d.states
            dt, B, C = torch.split(projected, [rank, states, states], 2)
            dt = dt @ d.dt_weight.double().T
            sides = (d.D.double(), z, d.dt_bias.double())
            total += selective_scan(c, dt, d.A.double(), B, C, *sides, reverse=d.reverse).y
        result = result + (branch.scale * total[0]) @ branch.out_proj.double().T
    return result
