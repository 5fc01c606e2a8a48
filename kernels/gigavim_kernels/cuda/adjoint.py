"""The gradients of the scan of one direction: what launches the kernels of `adjoint_kernels`."""

from typing import NamedTuple

import torch
from torch import Tensor

from gigavim_kernels.cuda import adjoint_kernels
from gigavim_kernels.cuda.launch import on_device_of, options
from gigavim_kernels.cuda.plan import (
    FORWARD,
    FORWARD_TIED,
    GRADIENT,
    GRADIENT_TIED,
    LANES,
    multiprocessors,
    plan_scan,
)
from gigavim_kernels.cuda.scan import MARK, STAGES, UNROLL, combine, is_tied, marked_chunk
from gigavim_kernels.naive import spread_rates

GRADIENT_STAGES = 4
"""As `scan.STAGES`, of the pass with all gradients."""


class Gradients(NamedTuple):
    """Gradients by the names of the scan's arguments; those of the rows in the rows' dtypes."""

    x: Tensor
    dt: Tensor
    A: Tensor
    bc: Tensor
    D: Tensor
    z: Tensor | None
    dt_bias: Tensor
    state: Tensor


def scan_gradients(
    grad_y: Tensor,
    grad_last: Tensor,
    grad_decay: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    bc: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    decay: Tensor,
    marks: Tensor,
    *,
    reverse: bool,
    chunk: int | None = None,
) -> Gradients:
    """Gradients of `scan` for one direction, L and E at least one.

    Args:
        grad_y: (B, L, E) contiguous; grad_last, grad_decay, decay: (B, E, N) contiguous float32.
        x, dt, z: (B, L, E); bc: (B, L, 2 N); A: (E, N) or (E, 1); D, dt_bias: (E,): as the scan's.
        marks: (B, ceil(L / MARK), N, E), see `Scanned`.
        chunk: tokens per chunk, as it was given to the scan that marked.
    """
    batch, length, channels = x.shape
    states = bc.shape[2] // 2
    tied = is_tied(A, states)
    kernel = GRADIENT_TIED if tied else GRADIENT
    plan = plan_scan(
        batch, length, channels, states,
        multiprocessors=multiprocessors(x.device), kernel=kernel, multiple=MARK,
        chunk=marked_chunk(x, states, tied=tied) if chunk is None else chunk,
    )  # fmt: skip
    chunks, blocks, width = plan.chunks, plan.blocks_e, plan.block_e
    if chunks > 1:
        exits, d_first, sums = _chunk_exits(
            grad_y, grad_last, dt, A, bc, z, dt_bias, plan.chunk, chunks, reverse
        )
    else:
        exits, d_first = grad_last.mT.contiguous()[:, None], torch.empty_like(grad_last)
    each = None
    if grad_decay is not None:
        each = (grad_decay * decay * spread_rates(A, states)).sum(-1)  # (B, E)
    d_x, d_dt = (torch.empty(x.shape, dtype=t.dtype, device=x.device) for t in (x, dt))
    d_z = None if z is None else torch.empty(x.shape, dtype=z.dtype, device=x.device)
    d_bc = A.new_empty(blocks, batch, length, 2 * states)
    d_a = A.new_empty(batch, chunks, A.shape[1], channels)
    d_d, d_bias = (A.new_empty(batch, chunks, channels) for _ in range(2))
    programs = batch * chunks * blocks
    half = max(t.element_size() for t in (x, dt)) == 2 and width > LANES
    scratch = torch.empty(
        programs, MARK, states, width,
        dtype=torch.bfloat16 if half else torch.float32, device=x.device,
    )  # fmt: skip
    with on_device_of(x):
        adjoint_kernels.chunk_gradients[(programs,)](
            grad_y, x, z, dt, bc, A, D, dt_bias, marks, exits, each, scratch,
            d_x, d_dt, d_z, d_bc, d_a, d_d, d_bias, d_first,
            length, batch, plan.chunk, chunks,
            *x.stride()[:2], *((0, 0) if z is None else z.stride()[:2]), *dt.stride()[:2],
            int(reverse),
            E=channels, N=states, TIED=tied, BE=width, MARK=MARK, STAGES=GRADIENT_STAGES,
            WHOLE=chunks == 1, **options(1, registers=kernel.registers),
        )  # fmt: skip
    d_A = d_a.sum((0, 1)).T  # (E, N)
    if grad_decay is not None:
        steps = _steps(dt, dt_bias) if chunks == 1 else sums.sum(1)  # (B, E)
        d_total = (grad_decay * decay * steps[..., None]).sum(0)  # (E, N)
        if tied:
            d_total = spread_rates(d_total.new_ones(1), states) @ d_total.T
            d_total = d_total[:, None]
        d_A = d_A + d_total
    return Gradients(
        d_x, d_dt, d_A.contiguous(), d_bc.sum(0), d_d.sum((0, 1)), d_z, d_bias.sum((0, 1)), d_first
    )


def _chunk_exits(
    grad_y: Tensor,
    grad_last: Tensor,
    dt: Tensor,
    A: Tensor,
    bc: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    chunk: int,
    chunks: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dL/dh at the exits of all chunks (B, K, N, E), at the scan's entry, and sums (B, K, E)."""
    batch, length, channels = grad_y.shape
    states = bc.shape[2] // 2
    tied = is_tied(A, states)
    kernel = FORWARD_TIED if tied else FORWARD
    exits = A.new_empty(batch, chunks, states, channels)
    sums = A.new_empty(batch, chunks, channels)
    d_first = torch.empty_like(grad_last)
    width = kernel.block_e(channels, states)
    with on_device_of(grad_y):
        adjoint_kernels.chunk_adjoints[(batch * chunks * -(-channels // width),)](
            grad_y, z, dt, bc, A, dt_bias, exits, sums, length, chunk, chunks,
            *((0, 0) if z is None else z.stride()[:2]), *dt.stride()[:2], int(reverse),
            E=channels, N=states, TIED=tied, BE=width, STAGES=STAGES, UNROLL=UNROLL,
            **options(1, registers=kernel.registers),
        )  # fmt: skip
    combine(exits[None], sums[None], A[None], grad_last[None], d_first[None], None, [not reverse])
    return exits, d_first, sums


def _steps(dt: Tensor, dt_bias: Tensor | None) -> Tensor:
    raw = dt.float() if dt_bias is None else dt.float() + dt_bias
    return torch.nn.functional.softplus(raw).sum(1)
