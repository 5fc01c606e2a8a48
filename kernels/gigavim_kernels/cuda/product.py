"""The product that ends a branch, added to the float32 stream where it is computed.

Where a program has whole rows of the stream in hand, it can norm them for the block that follows,
which then need not read them again.
"""

import triton
import triton.language as tl
from torch import Tensor

from gigavim_kernels.cuda.arithmetic import multiplied
from gigavim_kernels.cuda.launch import SIZES, on_device_of, options

BLOCK_TOKENS, BLOCK_OUT, BLOCK_IN, WARPS, STAGES = 64, 64, 64, 4, 3
NORMED_OUT, NORMED_TOKENS, NORMED_WARPS = 256, 32, 8
"""Of programs that norm. They take all columns of a row, `NORMED_OUT` at most."""


@triton.jit(do_not_specialize=SIZES)
def _add_product(
    p_sum: tl.tensor,  # (T, D)
    p_y: tl.tensor,  # (T, E)
    p_weight: tl.tensor,  # (D, E)
    p_norm: tl.tensor,  # (D,) or None
    p_normed: tl.tensor,  # (T, D), contiguous
    rows: tl.tensor,
    factor: tl.tensor,
    eps: tl.tensor,
    s_sum: tl.tensor,
    s_y: tl.tensor,
    D: tl.constexpr,
    E: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    i_d = tl.program_id(0) % tl.cdiv(D, BD)
    i_t = (tl.program_id(0) // tl.cdiv(D, BD)).to(tl.int64)
    o_t = i_t * BT + tl.arange(0, BT)
    o_d = i_d * BD + tl.arange(0, BD)
    o_e = tl.arange(0, BE)
    m_t, m_d = o_t < rows, o_d < D
    total = tl.zeros([BT, BD], tl.float32)
    for e in tl.range(0, E, BE, num_stages=STAGES):
        m_e = e + o_e < E
        p_left = p_y + o_t[:, None] * s_y + (e + o_e)[None, :]
        p_right = p_weight + o_d[None, :] * E + (e + o_e)[:, None]
        left = tl.load(p_left, mask=m_t[:, None] & m_e[None, :], other=0.0)
        right = tl.load(p_right, mask=m_d[None, :] & m_e[:, None], other=0.0)
        total = multiplied(left, right, total)
    p_sum += o_t[:, None] * s_sum + o_d[None, :]
    m = m_t[:, None] & m_d[None, :]
    total += tl.load(p_sum, mask=m, other=0.0) * factor
    tl.store(p_sum, total, mask=m)
    if p_norm is not None:
        weight = tl.load(p_norm + o_d, mask=m_d, other=0.0)
        scale = 1.0 / tl.sqrt(tl.sum(total * total, 1) / D + eps)
        normed = total * scale[:, None] * weight[None, :]
        o_normed = o_t[:, None] * D + o_d[None, :]
        tl.store(p_normed + o_normed, normed.to(p_normed.dtype.element_ty), mask=m)


def add_product(
    into: Tensor,
    y: Tensor,
    weight: Tensor,
    *,
    factor: float = 1.0,
    norm: tuple[Tensor, float] | None = None,
) -> Tensor | None:
    """Set `into` (T, D), float32, to factor * into + y (T, E) weight (D, E)^T, in place.

    The product is never stored: it is added as it was summed up, in float32.

    Args:
        y, weight: of 16 bits, weight contiguous; rows of into and y may lie apart.
        norm: weight (D,), float32, and eps of an RMSNorm of the sums; D is `NORMED_OUT` at most.

    Returns:
        With `norm`, the normed sums (T, D) in the dtype of y.
    """
    (count, width), inner = into.shape, y.shape[1]
    tokens, block_out, warps, normed = BLOCK_TOKENS, BLOCK_OUT, WARPS, None
    if norm is not None:
        tokens, warps = NORMED_TOKENS, NORMED_WARPS
        block_out = max(BLOCK_OUT, triton.next_power_of_2(width))
        normed = y.new_empty(count, width)
    if into.numel() == 0:
        return normed
    programs = -(-count // tokens) * -(-width // block_out)
    own, eps = (None, 0.0) if norm is None else norm
    with on_device_of(into):
        _add_product[(programs,)](
            into, y, weight, own, normed, count, factor, eps, into.stride(0), y.stride(0),
            D=width, E=inner, BT=tokens, BD=block_out, BE=BLOCK_IN, STAGES=STAGES,
            **options(warps),
        )  # fmt: skip
    return normed
