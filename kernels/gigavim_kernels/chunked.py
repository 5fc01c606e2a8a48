"""The selective scan in plain torch, parallel over chunks of the sequence; differentiable.

The sequence is folded into K chunks of T tokens. Every chunk is scanned from a zero state, side by
side in T vectorised steps; the states at the chunk edges follow from a scan over K; each token then
receives the decayed state of its chunk's left edge. All factors are exp(A * sum of dt) of at most
one: nothing is divided by a cumulative decay, so any dt is stable.

The backward pass saves the inputs and the edge states only. It recomputes the hidden states and
solves the adjoint recurrence the same way, from the other end:

    lambda_t = C_t g_t + exp(dt_{t+1} A) lambda_{t+1}    with g = dL/d(C . h)

Hidden states exist for a group of channels at a time, within a budget of memory.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gigavim_kernels.naive import ScanResult, spread_rates

HIDDEN_BUDGET = {"cpu": 1 << 20}
"""Hidden states held at once, by device type: a CPU keeps them in its cache."""
HIDDEN_BUDGET_ACCELERATOR = 1 << 27
SMALLEST_EXPONENT = -87.0
"""exp of less is subnormal in float32, where a CPU is slow by a factor of 30."""
SHORTEST_CHUNK, LONGEST_CHUNK = 16, 64


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    reverse: bool = False,
) -> ScanResult:
    """Compute what `naive.selective_scan` specifies, with its arguments.

    Half precision inputs are computed in float32: y has the dtype of x, the state that of the
    computation. Gradients flow to every tensor from y, state and decay (once differentiable).
    """
    A = spread_rates(A, B.shape[2])
    apply: Callable[..., tuple[Tensor, Tensor, Tensor]] = _Scan.apply
    return ScanResult(*apply(x, dt, A, B, C, D, z, dt_bias, state, reverse))


def chunk_length(length: int) -> int:
    """Tokens per chunk: few steps in sequence against many chunks to combine."""
    return max(1, min(length, LONGEST_CHUNK, max(SHORTEST_CHUNK, math.isqrt(length))))


class _Folding(NamedTuple):
    """How (B, L, E) becomes (T, B, K, E) in scan order, padded with zeros at its end."""

    length: int
    steps: int  # T
    chunks: int  # K
    reverse: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor, reverse: bool) -> "_Folding":
        length = x.shape[1]
        steps = chunk_length(length)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return cls(length, steps, -(-length // steps), reverse, dtype)

    def fold(self, rows: Tensor) -> Tensor:
        rows = rows.to(self.dtype)
        if self.reverse:
            rows = rows.flip(1)
        rows = F.pad(rows, (0, 0, 0, self.steps * self.chunks - self.length))
        batch, _, width = rows.shape
        chunks = rows.reshape(batch, self.chunks, self.steps, width)
        return chunks.permute(2, 0, 1, 3).contiguous()

    def unfold(self, folded: Tensor, dtype: torch.dtype) -> Tensor:
        rows = folded.permute(1, 2, 0, 3).flatten(1, 2)[:, : self.length]
        return (rows.flip(1) if self.reverse else rows).to(dtype)


def _channel_groups(folding: _Folding, x: Tensor, states: int) -> Iterator[slice]:
    """Slices of the channels whose hidden states fit the budget of the device."""
    budget = HIDDEN_BUDGET.get(x.device.type, HIDDEN_BUDGET_ACCELERATOR)
    tokens = x.shape[0] * folding.steps * folding.chunks
    width = max(1, budget // max(1, tokens * states))
    for start in range(0, x.shape[2], width):
        yield slice(start, min(start + width, x.shape[2]))


def _combine(decay: Tensor, carry: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Scan h_k = decay_k h_{k-1} + carry_k over dim 1 by doubling: log2 K steps.

    Args:
        decay, carry: (B, K, E, N). first: (B, E, N), the state before chunk 0.

    Returns:
        The state before every chunk (B, K, E, N) and after the last one (B, E, N).
    """
    carry = torch.cat((torch.addcmul(carry[:, :1], decay[:, :1], first[:, None]), carry[:, 1:]), 1)
    reach = 1
    while reach < carry.shape[1]:
        gained = torch.addcmul(carry[:, reach:], decay[:, reach:], carry[:, :-reach])
        carry = torch.cat((carry[:, :reach], gained), 1)
        decay = torch.cat((decay[:, :reach], decay[:, reach:] * decay[:, :-reach]), 1)
        reach *= 2
    return torch.cat((first[:, None], carry[:, :-1]), 1), carry[:, -1]


def _decay(sum_dt: Tensor, A: Tensor, out: Tensor | None = None) -> Tensor:
    exponent = torch.mul(sum_dt[..., None], A, out=out)  # (..., E, N)
    if exponent.device.type == "cpu":
        exponent.clamp_(min=SMALLEST_EXPONENT)
    return exponent.exp_()


def _local_states(delta: Tensor, drive: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Decay of every step and the states of every chunk scanned from zero, (T, B, K, E, N)."""
    decay = _decay(delta, A)
    hidden = drive[..., None] * B[..., None, :]
    for t in range(1, len(hidden)):
        hidden[t].addcmul_(decay[t], hidden[t - 1])
    return decay, hidden


def _sum_after(delta: Tensor) -> Tensor:
    """Sum of the steps of the chunk that follow each step, added from the end: no cancellation."""
    after = delta.flip(0).cumsum(0).flip(0)
    return torch.cat((after[1:], torch.zeros_like(after[:1])))


def _delta(dt: Tensor, dt_bias: Tensor | None, folding: _Folding) -> Tensor:
    """Fold softplus(dt + dt_bias); the padding gets steps of zero, which change no state."""
    raw = dt.to(folding.dtype)
    return folding.fold(F.softplus(raw if dt_bias is None else raw + dt_bias))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        state: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        folding = _Folding.of(x, reverse)
        shape = (x.shape[0], x.shape[2], A.shape[1])  # (B, E, N)
        first = A.new_zeros(shape, dtype=folding.dtype) if state is None else state
        first = first.to(folding.dtype)
        with torch.autocast(x.device.type, enabled=False):
            if folding.length == 0:
                y, last, decay, edges = x.clone(), first.clone(), torch.ones_like(first), None
            else:
                y, last, decay, edges = _forward(x, dt, A, B, C, D, z, dt_bias, first, folding)
        ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, edges, decay)
        ctx.folding, ctx.has_state = folding, state is not None
        ctx.state_dtype = None if state is None else state.dtype
        return y, last, decay

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")
        found: dict[str, Tensor | None]
        if ctx.folding.length == 0:
            found = {
                name: None if tensor is None else torch.zeros_like(tensor)
                for name, tensor in zip(names, inputs)
            }
            found["state"] = grads[1]
        else:
            with torch.autocast(inputs[0].device.type, enabled=False):
                found = _backward(inputs, grads, ctx.folding)
        result = [
            None if tensor is None else _as(found[name], tensor.dtype)
            for name, tensor in zip(names, inputs)
        ]
        return (*result, _as(found["state"], ctx.state_dtype) if ctx.has_state else None, None)


def _as(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    first: Tensor,
    folding: _Folding,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, the last state, the total decay, and the states before every chunk (B, K, E, N)."""
    delta = _delta(dt, dt_bias, folding)  # (T, B, K, E)
    xs, Bs, Cs = (folding.fold(rows) for rows in (x, B, C))
    so_far = delta.cumsum(0)
    y = torch.empty_like(xs)
    last = torch.empty_like(first)
    edges = first.new_empty(first.shape[0], folding.chunks, *first.shape[1:])
    for group in _channel_groups(folding, xs[0], A.shape[1]):
        decay, hidden = _local_states(
            delta[..., group], delta[..., group] * xs[..., group], A[group], Bs
        )
        chunk_decay = _decay(so_far[-1, ..., group], A[group])
        edge, last[:, group] = _combine(chunk_decay, hidden[-1], first[:, group])
        edges[:, :, group] = edge
        hidden.addcmul_(_decay(so_far[..., group], A[group], out=decay), edge)
        y[..., group] = torch.einsum("tbken,tbkn->tbke", hidden, Cs)
    if D is not None:
        y.addcmul_(xs, D.to(y.dtype))
    rows = folding.unfold(y, folding.dtype)
    if z is not None:
        rows = rows * F.silu(z.to(folding.dtype))
    total = _decay(so_far[-1].sum(1), A.to(folding.dtype))
    return rows.to(x.dtype).contiguous(), last, total, edges


def _backward(
    inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...], folding: _Folding
) -> dict[str, Tensor | None]:
    x, dt, A, B, C, D, z, dt_bias, edges, total_decay = inputs
    grad_y, grad_last, grad_decay = grads
    delta = _delta(dt, dt_bias, folding)
    xs, Bs, Cs, g = (folding.fold(rows) for rows in (x, B, C, grad_y))  # (T, B, K, E or N)
    if z is not None:
        zs = folding.fold(z)
        gate = zs.sigmoid()
        grad_gate = g * gate * (1 + zs * (1 - gate))  # times the output before the gate, below
        g = g * zs * gate
    so_far, after = delta.cumsum(0), _sum_after(delta)
    d_delta, d_drive = torch.empty_like(delta), torch.empty_like(delta)
    output = torch.empty_like(xs) if z is not None else None
    d_A, d_B, d_C = torch.empty_like(A, dtype=g.dtype), torch.zeros_like(Bs), torch.zeros_like(Cs)
    d_first = torch.empty_like(total_decay)
    for group in _channel_groups(folding, xs[0], A.shape[1]):
        step, a = delta[..., group], A[group]
        drive, edge = step * xs[..., group], edges[:, :, group]
        decay, hidden = _local_states(step, drive, a, Bs)
        hidden.addcmul_(_decay(so_far[..., group], a), edge)
        if output is not None:
            output[..., group] = torch.einsum("tbken,tbkn->tbke", hidden, Cs)
        d_C += torch.einsum("tbken,tbke->tbkn", hidden, g[..., group])

        adjoint = g[..., group, None] * Cs[..., None, :]
        for t in range(len(adjoint) - 2, -1, -1):
            adjoint[t].addcmul_(decay[t + 1], adjoint[t + 1])
        chunk_decay = _decay(so_far[-1, ..., group], a)
        right, d_first[:, group] = _combine(
            chunk_decay.flip(1), (decay[0] * adjoint[0]).flip(1), grad_last[:, group].to(g.dtype)
        )
        adjoint.addcmul_(_decay(after[..., group], a), right.flip(1))
        d_B += torch.einsum("tbken,tbke->tbkn", adjoint, drive)
        d_drive[..., group] = torch.einsum("tbken,tbkn->tbke", adjoint, Bs)

        d_exponent = decay.mul_(adjoint)  # dL/d(dt A), once times the state before the step
        d_exponent[1:].mul_(hidden[:-1])
        d_exponent[0].mul_(edge)
        d_A[group] = torch.mul(d_exponent, step[..., None], out=hidden).sum((0, 1, 2))
        d_delta[..., group] = d_exponent.mul_(a).sum(-1)

    d_total = grad_decay * total_decay  # (B, E, N)
    sum_delta = so_far[-1].sum(1)  # (B, E)
    d_A += torch.einsum("ben,be->en", d_total, sum_delta)
    d_delta += d_drive * xs + (d_total * A).sum(-1)[:, None]
    d_x = d_drive * delta
    skip = None if D is None else D.to(g.dtype)
    if skip is not None:
        d_x.addcmul_(g, skip)
    rows = {"x": d_x, "B": d_B, "C": d_C}
    found: dict[str, Tensor | None] = {k: folding.unfold(v, g.dtype) for k, v in rows.items()}
    if output is not None:
        if skip is not None:
            output.addcmul_(xs, skip)
        found["z"] = folding.unfold(output.mul_(grad_gate), g.dtype)
    raw = dt.to(g.dtype)
    slope = torch.sigmoid(raw if dt_bias is None else raw + dt_bias)
    d_dt = folding.unfold(d_delta, g.dtype) * slope
    d_bias = None if dt_bias is None else d_dt.sum((0, 1))
    d_D = None if D is None else (g * xs).sum((0, 1, 2))
    return {**found, "dt": d_dt, "A": d_A, "D": d_D, "dt_bias": d_bias, "state": d_first}
