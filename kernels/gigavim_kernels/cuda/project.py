"""The two products between convolution and scan in one pass, for rows of 16 bits.

A program multiplies a tile of convolved tokens of one direction with x_proj; B and C leave it in
float32, as the scan reads them, and what dt is a product of never leaves it. By count 3.3 KB a
token of Vim-Ti and two directions are moved. Where no gradient is wanted it makes steps of dt: the
scan, which the arithmetic holds up, would do so in each of its passes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gigavim_kernels.cuda.arithmetic import multiplied, softplus
from gigavim_kernels.cuda.launch import SIZES, on_device_of, options

BLOCK_TOKENS, BLOCK_CHANNELS, WARPS, STAGES = 64, 64, 4, 3
SMALLEST_PRODUCT = 16
"""Columns that the matrix units take at least."""


@triton.jit(do_not_specialize=SIZES)
def _project(
    p_c: tl.tensor,  # (S, T, E)
    p_x_proj: tl.tensor,  # (S, R + 2 N, E)
    p_dt_weight: tl.tensor,  # (S, E, R)
    p_dt: tl.tensor,  # (S, T, E)
    p_bc: tl.tensor,  # (S, T, 2 N)
    p_low: tl.tensor,  # (S, T, R) or None
    p_bias: tl.tensor,  # (S, E) or None: p_dt receives dt itself, not the steps
    length: tl.tensor,
    S: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    N2: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
    BP: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    i_s = tl.program_id(0) % S
    o_t = (tl.program_id(0) // S).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = (o_t < length)[:, None]
    o_t = (i_s * length + o_t)[:, None]
    o_p, o_e = tl.arange(0, BP), tl.arange(0, BE)
    p_x_proj += i_s * (R + N2) * E
    p_dt_weight += i_s * E * R
    projected = tl.zeros([BT, BP], tl.float32)
    for e in tl.range(0, E, BE, num_stages=STAGES):
        m_e = e + o_e < E
        c = tl.load(p_c + o_t * E + (e + o_e)[None, :], mask=m_t & m_e[None, :], other=0.0)
        p_w = p_x_proj + o_p[None, :] * E + (e + o_e)[:, None]
        w = tl.load(p_w, mask=(o_p < R + N2)[None, :] & m_e[:, None], other=0.0)
        projected = multiplied(c, w, projected)
    o_n = (o_p - R)[None, :]
    tl.store(p_bc + o_t * N2 + o_n, projected, mask=m_t & (o_n >= 0) & (o_n < N2))
    m_r = o_p < R
    low = tl.where(m_r[None, :], projected, 0.0).to(p_dt.dtype.element_ty)
    if p_low is not None:
        tl.store(p_low + o_t * R + o_p[None, :], low, mask=m_t & m_r[None, :])
    for e in tl.range(0, E, BE, num_stages=STAGES):
        m_e = (e + o_e < E)[None, :]
        p_w = p_dt_weight + (e + o_e)[None, :] * R + o_p[:, None]
        w = tl.load(p_w, mask=m_e & m_r[:, None], other=0.0)
        dt = multiplied(low, w, tl.zeros([BT, BE], tl.float32))
        if p_bias is not None:
            bias = tl.load(p_bias + i_s * E + e + o_e, mask=e + o_e < E, other=0.0)
            dt = softplus(dt + bias[None, :])
        tl.store(p_dt + o_t * E + (e + o_e)[None, :], dt.to(p_dt.dtype.element_ty), mask=m_t & m_e)


def project(
    c: Tensor,
    x_proj: Tensor,
    dt_weight: Tensor,
    *,
    dt_bias: Tensor | None = None,
    keep_low: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return dt, B and C of convolved rows.

    Args:
        c: (S, B, T, E) of 16 bits, contiguous.
        x_proj: (S, R + 2 N, E); dt_weight: (S, E, R). Contiguous, in the dtype of the rows.
        dt_bias: (S, E) float32; if given, softplus(dt + dt_bias) is returned in place of dt.
        keep_low: whether the last result is wanted.

    Returns:
        dt (S, B, T, E), bc (S, B, T, 2 N) float32, and what dt is a product of, (S, B, T, R).
    """
    directions, batch, length, channels = c.shape
    rank = dt_weight.shape[2]
    both = x_proj.shape[1] - rank
    dt = torch.empty_like(c)
    bc = c.new_empty(*c.shape[:3], both, dtype=torch.float32)
    low = c.new_empty(*c.shape[:3], rank) if keep_low else None
    if c.numel() == 0:
        return dt, bc, low
    with on_device_of(c):
        _project[(directions * -(-batch * length // BLOCK_TOKENS),)](
            c, x_proj, dt_weight, dt, bc, low, dt_bias, batch * length,
            S=directions, E=channels, R=rank, N2=both, BT=BLOCK_TOKENS, BE=BLOCK_CHANNELS,
            BP=max(SMALLEST_PRODUCT, triton.next_power_of_2(rank + both)), STAGES=STAGES,
            **options(WARPS),
        )  # fmt: skip
    return dt, bc, low
