"""The gradients of the depthwise convolutions of `conv`."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gigavim_kernels.cuda.arithmetic import sigmoid
from gigavim_kernels.cuda.launch import SIZES, on_device_of, options, reverse_bits

BLOCK_TOKENS, BLOCK_CHANNELS = 32, 64


@triton.jit(do_not_specialize=SIZES)
def _conv_gradients(
    p_dy: tl.tensor,  # (S, B, L, E)
    p_x: tl.tensor,  # at token 0 of those convolved
    p_weight: tl.tensor,  # (S, E, K)
    p_bias: tl.tensor,  # (S, E)
    p_dx: tl.tensor,  # at token 0 of those convolved
    p_dweight: tl.tensor,  # (S, tiles, K, E)
    p_dbias: tl.tensor,  # (S, tiles, E)
    batch: tl.tensor,
    length: tl.tensor,
    before: tl.tensor,
    after: tl.tensor,
    E: tl.tensor,
    s_xb: tl.tensor,
    s_xt: tl.tensor,
    s_dxb: tl.tensor,
    s_dxt: tl.tensor,
    reverse: tl.tensor,
    S: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
) -> None:
    i_e = tl.program_id(0) % tl.cdiv(E, BE)
    i_tile = tl.program_id(0) // tl.cdiv(E, BE)  # over (B, tiles of tokens, halos included)
    tiles = tl.cdiv(before + length + after, BT)
    i_t = (i_tile % tiles).to(tl.int64)
    i_b = (i_tile // tiles).to(tl.int64)
    o_e = i_e * BE + tl.arange(0, BE)
    m_e = o_e < E
    o_t = i_t * BT + tl.arange(0, BT) - before
    dx = tl.zeros([BT, BE], tl.float32)
    for i_s in tl.static_range(S):
        sense = 1 - 2 * ((reverse >> i_s) & 1)
        bias = tl.load(p_bias + i_s * E + o_e, mask=m_e, other=0.0).to(tl.float32)
        for j in tl.static_range(K):  # the output j tokens on in scan order
            o_out = o_t + sense * j
            m_out = ((o_out >= 0) & (o_out < length))[:, None] & m_e[None, :]
            convolved = tl.zeros([BT, BE], tl.float32) + bias[None, :]
            for k in tl.static_range(K):
                o_in = o_out + sense * (k - (K - 1))
                m_in = ((o_in >= -before) & (o_in < length + after))[:, None] & m_e[None, :]
                p = p_x + i_b * s_xb + o_in[:, None] * s_xt + o_e[None, :]
                weight = tl.load(p_weight + (i_s * E + o_e) * K + k, mask=m_e, other=0.0)
                x = tl.load(p, mask=m_in, other=0.0).to(tl.float32)
                convolved += x * weight.to(tl.float32)[None, :]
            o_dy = ((i_s * batch + i_b) * length + o_out) * E
            dy = tl.load(p_dy + o_dy[:, None] + o_e[None, :], mask=m_out, other=0.0)
            share = sigmoid(convolved)
            g = dy.to(tl.float32) * share * (1 + convolved * (1 - share))
            tap = tl.load(p_weight + (i_s * E + o_e) * K + (K - 1 - j), mask=m_e, other=0.0)
            dx += g * tap.to(tl.float32)[None, :]
            if j == 0:
                o_sum = i_s * (tl.num_programs(0) // tl.cdiv(E, BE)) + i_tile
                tl.store(p_dbias + o_sum * E + o_e, tl.sum(g, 0), mask=m_e)
                for k in tl.static_range(K):
                    o_in = o_t + sense * (k - (K - 1))
                    m_in = ((o_in >= -before) & (o_in < length + after))[:, None] & m_e[None, :]
                    p = p_x + i_b * s_xb + o_in[:, None] * s_xt + o_e[None, :]
                    x = tl.load(p, mask=m_in, other=0.0).to(tl.float32)
                    tl.store(p_dweight + (o_sum * K + k) * E + o_e, tl.sum(g * x, 0), mask=m_e)
    p = p_dx + i_b * s_dxb + o_t[:, None] * s_dxt + o_e[None, :]
    tl.store(p, dx.to(p_dx.dtype.element_ty), mask=(o_t < length + after)[:, None] & m_e[None, :])


def convolve_gradients(
    grad: Tensor,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    reverse: Sequence[bool],
    before: int = 0,
    after: int = 0,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of `convolve`, with its arguments.

    Args:
        grad: (S, B, L, E) contiguous, of what `convolve` returns.
        out: (B, before + L + after, E), any strides with a contiguous last dimension; takes the
            gradient of the rows, the tokens before and after included.

    Returns:
        The gradients of weight (S, E, K) and bias (S, E), float32; sums in a fixed order.
    """
    count, batch, length, channels = grad.shape
    taps = weight.shape[2]
    tiles = batch * -(-(before + length + after) // BLOCK_TOKENS)
    d_weight = torch.empty(count, tiles, taps, channels, device=rows.device)
    d_bias = torch.empty(count, tiles, channels, device=rows.device)
    if grad.numel():
        with on_device_of(rows):
            _conv_gradients[(tiles * -(-channels // BLOCK_CHANNELS),)](
                grad, rows[:, before:], weight, bias, out[:, before:], d_weight, d_bias,
                batch, length, before, after, channels,
                *rows.stride()[:2], *out.stride()[:2], reverse_bits(reverse),
                S=count, K=taps, BT=BLOCK_TOKENS, BE=BLOCK_CHANNELS, **options(4),
            )  # fmt: skip
    return d_weight.sum(1).mT.contiguous(), d_bias.sum(1)
