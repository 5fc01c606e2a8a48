"""The depthwise convolution of `conv` with gradients, for training."""

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from gigavim_kernels.cuda.arithmetic import sigmoid
from gigavim_kernels.cuda.conv import convolve
from gigavim_kernels.cuda.launch import SIZES, on_device_of, options

BLOCK_TOKENS, BLOCK_CHANNELS = 32, 64


@triton.jit(do_not_specialize=SIZES)
def _conv_gradients(
    p_dy: tl.tensor,  # (B, L, E)
    p_x: tl.tensor,
    p_weight: tl.tensor,  # (E, K)
    p_bias: tl.tensor,
    p_dx: tl.tensor,  # (B, L, E)
    p_dweight: tl.tensor,  # (tiles, K, E)
    p_dbias: tl.tensor,  # (tiles, E)
    length: tl.tensor,
    E: tl.tensor,
    s_xb: tl.tensor,
    s_xt: tl.tensor,
    reverse: tl.tensor,
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
    sense = 1 - 2 * reverse
    bias = tl.load(p_bias + o_e, mask=m_e, other=0.0).to(tl.float32)
    dx = tl.zeros([BT, BE], tl.float32)
    for j in tl.static_range(K):  # the output j tokens on in scan order
        o_out = o_t + sense * j
        m_out = ((o_out >= 0) & (o_out < length))[:, None] & m_e[None, :]
        before = tl.zeros([BT, BE], tl.float32) + bias[None, :]
        for k in tl.static_range(K):
            o_in = o_out + sense * (k - (K - 1))
            m_in = ((o_in >= 0) & (o_in < length))[:, None] & m_e[None, :]
            x = tl.load(
                p_x + i_b * s_xb + o_in[:, None] * s_xt + o_e[None, :], mask=m_in, other=0.0
            )
            weight = tl.load(p_weight + o_e * K + k, mask=m_e, other=0.0).to(tl.float32)
            before += x.to(tl.float32) * weight[None, :]
        dy = tl.load(
            p_dy + (i_b * length + o_out[:, None]) * E + o_e[None, :], mask=m_out, other=0.0
        )
        share = sigmoid(before)
        g = dy.to(tl.float32) * share * (1 + before * (1 - share))
        tap = tl.load(p_weight + o_e * K + (K - 1 - j), mask=m_e, other=0.0).to(tl.float32)
        dx += g * tap[None, :]
        if j == 0:
            tl.store(p_dbias + i_tile * E + o_e, tl.sum(g, 0), mask=m_e)
            for k in tl.static_range(K):
                o_in = o_t + sense * (k - (K - 1))
                m_in = ((o_in >= 0) & (o_in < length))[:, None] & m_e[None, :]
                p = p_x + i_b * s_xb + o_in[:, None] * s_xt + o_e[None, :]
                x = tl.load(p, mask=m_in, other=0.0).to(tl.float32)
                tl.store(p_dweight + (i_tile * K + k) * E + o_e, tl.sum(g * x, 0), mask=m_e)
    p = p_dx + (i_b * length + o_t[:, None]) * E + o_e[None, :]
    tl.store(p, dx.to(p_dx.dtype.element_ty), mask=(o_t < length)[:, None] & m_e[None, :])


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.reverse = reverse
        return convolve(x, weight[None], bias[None], reverse=[reverse])[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, bias = ctx.saved_tensors
        batch, length, channels = x.shape
        taps = weight.shape[1]
        tiles = batch * -(-length // BLOCK_TOKENS)
        d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        d_weight = torch.empty(tiles, taps, channels, device=x.device)
        d_bias = torch.empty(tiles, channels, device=x.device)
        with on_device_of(x):
            _conv_gradients[(tiles * -(-channels // BLOCK_CHANNELS),)](
                grad.contiguous(), x, weight, bias, d_x, d_weight, d_bias, length, channels,
                *x.stride()[:2], int(ctx.reverse),
                K=taps, BT=BLOCK_TOKENS, BE=BLOCK_CHANNELS, **options(4),
            )  # fmt: skip
        return d_x, d_weight.sum(0).T.to(weight.dtype), d_bias.sum(0).to(bias.dtype), None


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, *, reverse: bool = False) -> Tensor:
    """Compute what `naive.causal_conv` specifies without a halo, with gradients.

    Args:
        x: (B, L, E) with a contiguous last dimension, L and E at least one; the answer and its
            gradient have its dtype, sums are float32.
        weight: (E, K). bias: (E,).
    """
    if x.stride(-1) != 1:
        x = x.contiguous()
    found = _Conv.apply(x, weight.contiguous(), bias, reverse)  # type: ignore[no-untyped-call]
    return cast(Tensor, found)
