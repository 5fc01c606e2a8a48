"""Convolution and the products behind it in one pass over the inner rows, for rows of 16 bits.

A program takes a tile of tokens of one direction through all channels: the convolved rows are
stored for the scan, and while they are in registers multiplied with x_proj. What dt is a product of
never leaves the program. By count 4.2 KB a token of Vim-Ti and two directions are moved, of which
a convolution and three products of their own would move 2.3 KB once or twice more.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gigavim_kernels.cuda.arithmetic import multiplied
from gigavim_kernels.cuda.conv import convolved
from gigavim_kernels.cuda.launch import SIZES, on_device_of, options, reverse_bits

BLOCK_TOKENS, BLOCK_CHANNELS, WARPS, STAGES = 64, 64, 4, 2
SMALLEST_PRODUCT = 16
"""Rows and columns that the matrix units take at least."""


@triton.jit(do_not_specialize=SIZES)
def _project(
    p_x: tl.tensor,
    p_weight: tl.tensor,  # (S, E, K)
    p_bias: tl.tensor,  # (S, E)
    p_x_proj: tl.tensor,  # (S, R + 2 N, E)
    p_dt_weight: tl.tensor,  # (S, E, R)
    p_c: tl.tensor,  # (S, B, L, E)
    p_dt: tl.tensor,  # (S, B, L, E)
    p_bc: tl.tensor,  # (S, B, L, 2 N)
    p_low: tl.tensor,  # (S, B, L, R) or None
    batch: tl.tensor,
    length: tl.tensor,
    before: tl.tensor,
    after: tl.tensor,
    s_xb: tl.tensor,
    s_xt: tl.tensor,
    reverse: tl.tensor,
    S: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    N2: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
    BP: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    i_s = tl.program_id(0) % S
    i_tile = tl.program_id(0) // S  # over (B, tiles of tokens)
    i_t = (i_tile % tl.cdiv(length, BT)).to(tl.int64)
    i_b = (i_tile // tl.cdiv(length, BT)).to(tl.int64)
    sense = 1 - 2 * ((reverse >> i_s) & 1)
    o_t = i_t * BT + tl.arange(0, BT)
    m_t = o_t < length
    o_p = tl.arange(0, BP)
    o_row = (i_s * batch + i_b) * length + o_t
    p_x_proj += i_s * (R + N2) * E
    projected = tl.zeros([BP, BT], tl.float32)
    for e in tl.range(0, E, BE, num_stages=STAGES):
        o_e = e + tl.arange(0, BE)
        m_e = o_e < E
        c = convolved(
            p_x + i_b * s_xb, p_weight + i_s * E * K, p_bias + i_s * E, o_t, o_e, m_e,
            -before, length + after, sense, s_xt, K,
        ).to(p_c.dtype.element_ty)  # fmt: skip
        tl.store(p_c + o_row[:, None] * E + o_e[None, :], c, mask=m_t[:, None] & m_e[None, :])
        m = (o_p < R + N2)[:, None] & m_e[None, :]
        w = tl.load(p_x_proj + o_p[:, None] * E + o_e[None, :], mask=m, other=0.0)
        # As the right operand, c comes from shared memory. As the left one it would be convolved
        # twice, since the store wants it in other lanes than the product.
        projected = multiplied(w, tl.trans(c), projected)
    m = ((o_p >= R) & (o_p < R + N2))[:, None] & m_t[None, :]
    tl.store(p_bc + o_row[None, :] * N2 + (o_p - R)[:, None], projected, mask=m)
    low = tl.where((o_p < R)[:, None], projected, 0.0).to(p_dt.dtype.element_ty)
    if p_low is not None:
        m = (o_p < R)[:, None] & m_t[None, :]
        tl.store(p_low + o_row[None, :] * R + o_p[:, None], low, mask=m)
    low = tl.trans(low)
    for e in range(0, E, BE):
        o_e = e + tl.arange(0, BE)
        m_e = (o_e < E)[None, :]
        p_w = p_dt_weight + (i_s * E + o_e)[None, :] * R + o_p[:, None]
        w = tl.load(p_w, mask=m_e & (o_p < R)[:, None], other=0.0)
        dt = multiplied(low, w, tl.zeros([BT, BE], tl.float32)).to(p_dt.dtype.element_ty)
        tl.store(p_dt + o_row[:, None] * E + o_e[None, :], dt, mask=m_t[:, None] & m_e)


def convolve_and_project(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_proj: Tensor,
    dt_weight: Tensor,
    *,
    reverse: Sequence[bool],
    before: int,
    after: int,
    keep_low: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return `conv.convolve`'s result c and what it is multiplied to.

    Args:
        rows, weight, bias, reverse, before, after: see `conv.convolve`; rows of 16 bits.
        x_proj: (S, R + 2 N, E); dt_weight: (S, E, R). Contiguous, in the dtype of the rows.
        keep_low: whether the last result is wanted.

    Returns:
        c and dt (S, B, L, E), bc (S, B, L, 2 N) float32, and what dt is a product of,
        (S, B, L, R).
    """
    batch, padded, channels = rows.shape
    length = padded - before - after
    count, _, taps = weight.shape
    rank = dt_weight.shape[2]
    both = x_proj.shape[1] - rank
    shape = (count, batch, length)
    c, dt = (rows.new_empty(*shape, channels) for _ in range(2))
    bc = rows.new_empty(*shape, both, dtype=torch.float32)
    low = rows.new_empty(*shape, rank) if keep_low else None
    if c.numel() == 0:
        return c, dt, bc, low
    tiles = count * batch * -(-length // BLOCK_TOKENS)
    with on_device_of(rows):
        _project[(tiles,)](
            rows[:, before:], weight, bias, x_proj, dt_weight, c, dt, bc, low,
            batch, length, before, after, *rows.stride()[:2], reverse_bits(reverse),
            S=count, E=channels, R=rank, N2=both, K=taps, BT=BLOCK_TOKENS, BE=BLOCK_CHANNELS,
            BP=max(SMALLEST_PRODUCT, triton.next_power_of_2(rank + both)), STAGES=STAGES,
            **options(WARPS),
        )  # fmt: skip
    return c, dt, bc, low
