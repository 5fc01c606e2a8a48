"""Depthwise causal and anti-causal convolution with SiLU, token-major, several at once."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gigavim_kernels.cuda.arithmetic import sigmoid
from gigavim_kernels.cuda.launch import SIZES, on_device_of, options, reverse_bits

BLOCK_TOKENS, BLOCK_CHANNELS = 16, 128


@triton.jit
def convolved(
    p_x: tl.tensor,  # of a sequence, at token 0 of those convolved
    p_weight: tl.tensor,  # (E, K)
    p_bias: tl.tensor,  # (E,)
    o_t: tl.tensor,
    o_e: tl.tensor,
    m_e: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    sense: tl.tensor,
    s_xt: tl.tensor,
    K: tl.constexpr,
) -> tl.tensor:
    """A tile of tokens o_t and channels o_e, with SiLU; tokens before first and from end are 0."""
    bias = tl.load(p_bias + o_e, mask=m_e, other=0.0).to(tl.float32)
    y = tl.zeros([o_t.shape[0], o_e.shape[0]], tl.float32) + bias[None, :]
    for k in tl.static_range(K):
        o_in = o_t + sense * (k - (K - 1))
        m = ((o_in >= first) & (o_in < end))[:, None] & m_e[None, :]
        weight = tl.load(p_weight + o_e * K + k, mask=m_e, other=0.0).to(tl.float32)
        x = tl.load(p_x + o_in[:, None] * s_xt + o_e[None, :], mask=m, other=0.0)
        y += x.to(tl.float32) * weight[None, :]
    return y * sigmoid(y)


@triton.jit(do_not_specialize=SIZES)
def _conv(
    p_x: tl.tensor,
    p_weight: tl.tensor,  # (S, E, K)
    p_bias: tl.tensor,  # (S, E)
    p_y: tl.tensor,  # (S, B, L, E)
    batch: tl.tensor,
    length: tl.tensor,
    before: tl.tensor,
    after: tl.tensor,
    E: tl.tensor,
    s_xb: tl.tensor,
    s_xt: tl.tensor,
    reverse: tl.tensor,
    S: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
) -> None:
    i_e = tl.program_id(0) % tl.cdiv(E, BE)
    i_tile = tl.program_id(0) // tl.cdiv(E, BE)  # over (B, tiles of tokens)
    i_t = (i_tile % tl.cdiv(length, BT)).to(tl.int64)
    i_b = (i_tile // tl.cdiv(length, BT)).to(tl.int64)
    o_e = i_e * BE + tl.arange(0, BE)
    m_e = o_e < E
    o_t = i_t * BT + tl.arange(0, BT)
    m_out = (o_t < length)[:, None] & m_e[None, :]
    for i_s in tl.static_range(S):
        sense = 1 - 2 * ((reverse >> i_s) & 1)
        y = convolved(
            p_x + i_b * s_xb, p_weight + i_s * E * K, p_bias + i_s * E, o_t, o_e, m_e,
            -before, length + after, sense, s_xt, K,
        )  # fmt: skip
        o_out = ((i_s * batch + i_b) * length + o_t) * E
        tl.store(p_y + o_out[:, None] + o_e[None, :], y.to(p_y.dtype.element_ty), mask=m_out)


def convolve(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    reverse: Sequence[bool],
    before: int = 0,
    after: int = 0,
) -> Tensor:
    """Apply S convolutions to the same tokens: see `naive.causal_conv` for the terms.

    Args:
        rows: (B, before + L + after, E), any strides with a contiguous last dimension. The tokens
            before and after those convolved are read only; beyond all of them there are zeros.
        weight: (S, E, K); bias: (S, E). Contiguous.
        reverse: for each convolution, whether it is anti-causal.

    Returns:
        (S, B, L, E) in the dtype of the rows.
    """
    batch, padded, channels = rows.shape
    length = padded - before - after
    count, _, taps = weight.shape
    y = torch.empty(count, batch, length, channels, dtype=rows.dtype, device=rows.device)
    if y.numel() == 0:
        return y
    tiles = batch * -(-length // BLOCK_TOKENS) * -(-channels // BLOCK_CHANNELS)
    with on_device_of(rows):
        _conv[(tiles,)](
            rows[:, before:], weight, bias, y, batch, length, before, after, channels,
            *rows.stride()[:2], reverse_bits(reverse),
            S=count, K=taps, BT=BLOCK_TOKENS, BE=BLOCK_CHANNELS, **options(4),
        )  # fmt: skip
    return y
