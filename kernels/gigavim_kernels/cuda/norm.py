"""RMSNorm from the float32 stream into the dtype of the products."""

import triton
import triton.language as tl
from torch import Tensor

from gigavim_kernels.cuda.launch import SIZES, on_device_of, options

TILE = 4096
"""Elements of a program."""


@triton.jit(do_not_specialize=SIZES)
def _rms_norm(
    p_x: tl.tensor,  # (T, D)
    p_left: tl.tensor,  # (before, D) or None
    p_right: tl.tensor,  # (after, D) or None
    p_weight: tl.tensor,  # (D,)
    p_y: tl.tensor,  # (before + T + after, D)
    rows: tl.tensor,
    before: tl.tensor,
    after: tl.tensor,
    s_xt: tl.tensor,
    s_yt: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
) -> None:
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    m_d = (o_d < D)[None, :]
    o_x = o_t - before
    m = ((o_x >= 0) & (o_x < rows))[:, None] & m_d
    x = tl.load(p_x + o_x[:, None] * s_xt + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    if p_left is not None:
        m = (o_x < 0)[:, None] & m_d
        x += tl.load(p_left + o_t[:, None] * D + o_d[None, :], mask=m, other=0.0)
    if p_right is not None:
        o_right = o_x - rows
        m = ((o_right >= 0) & (o_right < after))[:, None] & m_d
        x += tl.load(p_right + o_right[:, None] * D + o_d[None, :], mask=m, other=0.0)
    weight = tl.load(p_weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps)
    y = x * scale[:, None] * weight[None, :]
    m = (o_t < before + rows + after)[:, None] & m_d
    tl.store(p_y + o_t[:, None] * s_yt + o_d[None, :], y.to(p_y.dtype.element_ty), mask=m)


def rms_norm(
    rows: Tensor,
    weight: Tensor,
    eps: float,
    *,
    out: Tensor,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> None:
    """Write x / sqrt(mean(x^2) + eps) * weight of all rows to `out`.

    Args:
        rows: (T, D), any dtype; left, right: the rows before and after, contiguous float32.
        out: (before + T + after, D), any dtype.
    """
    before, after = (0 if halo is None else len(halo) for halo in (left, right))
    count, width = rows.shape
    if out.numel() == 0:
        return
    block = triton.next_power_of_2(width)
    per_program = max(1, TILE // block)
    with on_device_of(rows):
        _rms_norm[(-(-len(out) // per_program),)](
            rows, left, right, weight, out, count, before, after, rows.stride(0), out.stride(0),
            eps, D=width, BT=per_program, BD=block, **options(4),
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _rms_norm_gradients(
    p_x: tl.tensor,  # (T, D)
    p_weight: tl.tensor,  # (D,)
    p_dy: tl.tensor,  # (T, D)
    p_dx: tl.tensor,  # (T, D), added to
    p_dweight: tl.tensor,  # (programs, D)
    rows: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
) -> None:
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    m = (o_t < rows)[:, None] & (o_d < D)[None, :]
    o = o_t[:, None] * D + o_d[None, :]
    x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
    weight = tl.load(p_weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    dy = tl.load(p_dy + o, mask=m, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps)
    unit = x * scale[:, None]
    tl.store(p_dweight + tl.program_id(0) * D + o_d, tl.sum(dy * unit, 0), mask=o_d < D)
    g = dy * weight[None, :]
    dx = (g - unit * (tl.sum(g * unit, 1) / D)[:, None]) * scale[:, None]
    tl.store(p_dx + o, tl.load(p_dx + o, mask=m, other=0.0) + dx, mask=m)


def rms_norm_gradients(
    rows: Tensor, weight: Tensor, eps: float, grad: Tensor, *, into: Tensor
) -> Tensor:
    """Add the gradient of `rms_norm`'s rows to `into`, and return that of its weight (D,).

    Args:
        rows, grad, into: (T, D), contiguous; grad is that of the normed rows, any dtype; into is
            float32.
    """
    count, width = rows.shape
    if rows.numel() == 0:
        return weight.new_zeros(width)
    block = triton.next_power_of_2(width)
    per_program = max(1, TILE // block)
    programs = -(-count // per_program)
    d_weight = weight.new_empty(programs, width)
    with on_device_of(rows):
        _rms_norm_gradients[(programs,)](
            rows, weight, grad, into, d_weight, count, eps,
            D=width, BT=per_program, BD=block, **options(4),
        )  # fmt: skip
    return d_weight.sum(0)
