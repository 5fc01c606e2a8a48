"""The scan on a GPU: what launches the kernels of `scan_kernels`."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gigavim_kernels.cuda import scan_kernels
from gigavim_kernels.cuda.launch import on_device_of, options, reverse_bits
from gigavim_kernels.cuda.plan import (
    FORWARD,
    FORWARD_TIED,
    GRADIENT,
    GRADIENT_TIED,
    Kernel,
    ScanPlan,
    multiprocessors,
    plan_scan,
)

COMBINE_CHANNELS = 128
COMBINE_UNROLL = 32
"""Chunks whose states are on their way at once: a round waits for memory as a whole."""
STAGES = 4
"""Tokens on their way to shared memory while one is computed, and that one."""
UNROLL = 2
"""Tokens whose exponentials are evaluated side by side."""
MARK = 8
"""Tokens between two states kept for the gradients: 3 KB a token and direction for Vim-Ti. What is
computed again between two of them should stay in the second-level cache."""


class Scanned(NamedTuple):
    """What `scan` returns."""

    y: Tensor
    """(B, L, E) in the dtype of x: the sum over the directions, gated where z was given."""
    last: Tensor
    """(S, B, E, N) float32, the state after the last token in scan order."""
    decay: Tensor
    """(S, B, E, N) float32, exp(A * sum of steps)."""
    marks: list[Tensor]
    """Per direction (B, ceil(L / MARK), N, E) float32, the states every MARK tokens, or empty."""


def join(B: Tensor, C: Tensor) -> Tensor:
    """B and C (..., L, N) as the kernels read them: one row (..., L, 2 N), contiguous float32."""
    return torch.cat((B, C), -1).float()


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    bc: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    first: Tensor | None = None,
    *,
    reverse: Sequence[bool],
    steps: bool = False,
    chunk: int | None = None,
    mark: bool = False,
    out: Tensor | None = None,
) -> Scanned:
    """Scan S directions and add their outputs: see `naive.selective_scan` for the terms.

    Args:
        x, dt: (S, B, L, E); z: (B, L, E), the gate of the sum. Any floating dtype, any strides as
            long as the last dimension is contiguous.
        bc: (S, B, L, 2 N), see `join`. N is a power of two, at least 2.
        A: (S, E, N), or (S, E, 1), see `naive.spread_rates`; D, dt_bias: (S, E);
            first: (S, B, E, N). Contiguous float32.
        reverse: for each direction, whether it scans from the last token to the first.
        steps: dt are the steps, softplus(dt + dt_bias): they are taken as they are.
        chunk: tokens per chunk, chosen by size if absent; with marks rounded up to whole ones, and
            to be given to `scan_gradients` too.
        mark: keep states for the gradients.
        out: receives y; any strides as long as the last dimension is contiguous.
    """
    directions, batch, length, channels = x.shape
    states = bc.shape[-1] // 2
    tied = is_tied(A, states)
    y = x.new_empty(x.shape[1:]) if out is None else out
    last = A.new_empty(directions, batch, channels, states)
    marks = [
        A.new_empty(batch, -(-length // MARK), states, channels)
        for _ in range(directions if mark else 0)
    ]
    if last.numel() == 0 or length == 0:
        last = last.zero_() if first is None else first.clone()
        return Scanned(y, last, torch.ones_like(last), marks)
    decay = torch.empty_like(last)
    kernel = FORWARD_TIED if tied and not mark else FORWARD
    if mark and chunk is None:
        chunk = marked_chunk(x[0], states, tied=tied)
    plan = _plan(x, states, kernel, chunk, MARK if mark else 1)
    starts = None
    if plan.chunks > 1:
        starts = enter_chunks(x, dt, A, bc, dt_bias, first, last, decay, reverse, steps, plan)
    for i in range(directions):
        final = i == directions - 1
        with on_device_of(x):
            scan_kernels.chunk_outputs[(batch * plan.chunks * plan.blocks_e,)](
                x[i], dt[i], bc[i], A[i], _at(D, i), z if final else None, _at(dt_bias, i),
                _at(starts, i), _at(first, i), last[i], decay[i], marks[i] if mark else None, y,
                length, plan.chunk, plan.chunks,
                *x.stride()[1:3], *dt.stride()[1:3], *((0, 0) if z is None else z.stride()[:2]),
                *y.stride()[:2], int(reverse[i]),
                E=channels, N=states, TIED=tied, STEPS=steps, BE=plan.block_e,
                STAGES=STAGES, UNROLL=1 if mark else UNROLL, MARK=MARK, ADD=i > 0,
                **options(1, registers=kernel.registers),
            )  # fmt: skip
    return Scanned(y, last, decay, marks)


def scan_states(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    bc: Tensor,
    dt_bias: Tensor | None = None,
    first: Tensor | None = None,
    *,
    reverse: Sequence[bool],
    steps: bool = False,
) -> Tensor:
    """Return the last states of `scan`, (S, B, E, N), without its outputs."""
    directions, batch, length, channels = x.shape
    states = bc.shape[-1] // 2
    last = A.new_empty(directions, batch, channels, states)
    if last.numel() == 0 or length == 0:
        return last.zero_() if first is None else first.clone()
    plan = _plan(x, states, FORWARD_TIED if is_tied(A, states) else FORWARD, None, 1)
    enter_chunks(x, dt, A, bc, dt_bias, first, last, None, reverse, steps, plan)
    return last


def enter_chunks(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    bc: Tensor,
    dt_bias: Tensor | None,
    first: Tensor | None,
    last: Tensor,
    decay: Tensor | None,
    reverse: Sequence[bool],
    steps: bool,
    plan: ScanPlan,
) -> Tensor:
    """Return the states at which all chunks are entered (S, B, K, N, E); fill last and decay."""
    directions, batch, length, channels = x.shape
    states = bc.shape[-1] // 2
    ends = A.new_empty(directions, batch, plan.chunks, states, channels)
    sums = A.new_empty(directions, batch, plan.chunks, channels)
    with on_device_of(x):
        scan_kernels.chunk_ends[(directions * batch * plan.chunks * plan.blocks_e,)](
            x, dt, bc, A, dt_bias, ends, sums,
            length, batch, plan.chunk, plan.chunks, *x.stride()[:3], *dt.stride()[:3],
            reverse_bits(reverse),
            E=channels, N=states, TIED=is_tied(A, states), STEPS=steps, BE=plan.block_e,
            STAGES=STAGES, UNROLL=UNROLL, **options(1, registers=FORWARD.registers),
        )  # fmt: skip
    combine(ends, sums, A, first, last, decay, reverse)
    return ends


def combine(
    ends: Tensor,
    sums: Tensor,
    A: Tensor,
    first: Tensor | None,
    last: Tensor,
    decay: Tensor | None,
    reverse: Sequence[bool],
) -> None:
    """Turn the chunks' end states into the states at which they are entered, in place."""
    directions, batch, chunks, states, channels = ends.shape
    blocks = -(-channels // COMBINE_CHANNELS)
    with on_device_of(ends):
        scan_kernels.combine[(directions * batch * states * blocks,)](
            ends, sums, A, first, last, decay, batch, chunks, reverse_bits(reverse),
            E=channels, N=states, TIED=is_tied(A, states), BE=COMBINE_CHANNELS, U=COMBINE_UNROLL,
            **options(4),
        )  # fmt: skip


def marked_chunk(x: Tensor, states: int, *, tied: bool) -> int:
    """Tokens per chunk of a marked scan over x (B, L, E), and of the gradients from its marks.

    A reversed chunk is marked from its end, so that marks are found again only by the same cuts.
    They suit the gradients, which take longest.
    """
    kernel = GRADIENT_TIED if tied else GRADIENT
    return _plan(x[None], states, kernel, None, MARK).chunk


def is_tied(A: Tensor, states: int) -> bool:
    """Whether A (..., N or 1) holds one rate for all states of a channel."""
    return A.shape[-1] == 1 and states > 1


def _plan(x: Tensor, states: int, kernel: Kernel, chunk: int | None, multiple: int) -> ScanPlan:
    _, batch, length, channels = x.shape
    return plan_scan(
        batch,
        length,
        channels,
        states,
        multiprocessors=multiprocessors(x.device),
        kernel=kernel,
        chunk=chunk,
        multiple=multiple,
    )


def _at(tensor: Tensor | None, direction: int) -> Tensor | None:
    return None if tensor is None else tensor[direction]
