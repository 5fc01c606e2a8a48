"""Depthwise causal and anti-causal convolution with SiLU, token-major, several at once."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gigavim_kernels.cuda.arithmetic import channels, sigmoid
from gigavim_kernels.cuda.launch import SIZES, on_device_of, options, reverse_bits

BLOCK_TOKENS, BLOCK_CHANNELS = 16, 64


@triton.jit(do_not_specialize=SIZES)
def _conv(
    p_x: tl.tensor,  # at token 0 of those convolved
    p_weight: tl.tensor,  # (S, E, K)
    p_bias: tl.tensor,  # (S, E)
    p_y: tl.tensor,  # (S, B, L, E)
    batch: tl.tensor,
    length: tl.tensor,
    before: tl.tensor,
    after: tl.tensor,
    s_xb: tl.tensor,
    s_xt: tl.tensor,
    REVERSED: tl.constexpr,
    S: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
) -> None:
    """Each row is loaded once for all convolutions: K of them in a row give a causal one's last
    token and an anti-causal one's first."""
    i_e = tl.program_id(0) % tl.cdiv(E, BE)
    i_tile = tl.program_id(0) // tl.cdiv(E, BE)  # over (B, tiles of tokens)
    tiles = tl.cdiv(length + K - 1, BT)
    first = (i_tile % tiles).to(tl.int64) * BT
    i_b = (i_tile // tiles).to(tl.int64)
    o_e = channels(i_e, E, BE)
    whole = tl.full([BE], 1, tl.int1)
    rows = ()
    for j in tl.static_range(BT + K - 1):
        t = first + j - (K - 1)
        p = p_x + i_b * s_xb + t * s_xt + o_e
        m = whole & (t >= -before) & (t < length + after)
        rows = rows + (tl.load(p, mask=m, other=0.0),)  # noqa: RUF005
    for i_s in tl.static_range(S):
        bias = tl.load(p_bias + i_s * E + o_e).to(tl.float32)
        taps = ()
        for k in tl.static_range(K):
            p = p_weight + (i_s * E + o_e) * K + ((K - 1 - k) if (REVERSED >> i_s) & 1 else k)
            taps = taps + (tl.load(p).to(tl.float32),)  # noqa: RUF005
        p_out = p_y + (i_s * batch + i_b) * length * E + o_e
        for j in tl.static_range(BT):
            t = first + j - ((K - 1) if (REVERSED >> i_s) & 1 else 0)
            y = bias
            for k in tl.static_range(K):
                y += rows[j + k].to(tl.float32) * taps[k]
            y *= sigmoid(y)
            m = whole & (t >= 0) & (t < length)
            tl.store(p_out + t * E, y.to(p_y.dtype.element_ty), mask=m)


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
    batch, padded, width = rows.shape
    length = padded - before - after
    count, _, taps = weight.shape
    y = torch.empty(count, batch, length, width, dtype=rows.dtype, device=rows.device)
    if y.numel() == 0:
        return y
    tiles = batch * -(-(length + taps - 1) // BLOCK_TOKENS)
    with on_device_of(rows):
        _conv[(tiles * -(-width // BLOCK_CHANNELS),)](
            rows[:, before:], weight, bias, y, batch, length, before, after, *rows.stride()[:2],
            REVERSED=reverse_bits(reverse), S=count, E=width, K=taps, BT=BLOCK_TOKENS,
            BE=BLOCK_CHANNELS, **options(1),
        )  # fmt: skip
    return y
