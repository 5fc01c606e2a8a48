"""The product that ends a branch, added to the float32 stream where it is computed."""

import triton
import triton.language as tl
from torch import Tensor

from gigavim_kernels.cuda.arithmetic import multiplied
from gigavim_kernels.cuda.launch import SIZES, on_device_of, options

BLOCK_TOKENS, BLOCK_OUT, BLOCK_IN, WARPS, STAGES = 64, 64, 64, 4, 3


@triton.jit(do_not_specialize=SIZES)
def _add_product(
    p_sum: tl.tensor,  # (T, D)
    p_y: tl.tensor,  # (T, E)
    p_weight: tl.tensor,  # (D, E)
    rows: tl.tensor,
    factor: tl.tensor,
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
    tl.store(p_sum, tl.load(p_sum, mask=m, other=0.0) * factor + total, mask=m)


def add_product(into: Tensor, y: Tensor, weight: Tensor, *, factor: float = 1.0) -> None:
    """Set `into` (T, D), float32, to factor * into + y (T, E) weight (D, E)^T, in place.

    The product is never stored: it is added as it was summed up, in float32.

    Args:
        y, weight: of 16 bits, weight contiguous; rows of into and y may lie apart.
    """
    if into.numel() == 0:
        return
    (count, width), inner = into.shape, y.shape[1]
    programs = -(-count // BLOCK_TOKENS) * -(-width // BLOCK_OUT)
    with on_device_of(into):
        _add_product[(programs,)](
            into, y, weight, count, factor, into.stride(0), y.stride(0),
            D=width, E=inner, BT=BLOCK_TOKENS, BD=BLOCK_OUT, BE=BLOCK_IN, STAGES=STAGES,
            **options(WARPS),
        )  # fmt: skip
