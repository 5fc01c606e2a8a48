"""A branch of a Vim block and its gradients, a chunk at a time, from the stream alone.

Every direction's gradients can be taken by themselves: gate, in_proj and norm, which they share,
are linear in what flows back through them. So a cut sequence is gone through twice, a chunk at a
time: from its end for the directions that scan forward, from its start for the others. A sequence
in one piece is gone through once. A chunk's convolutions reach into its neighbours; what it gives
to their rows is added to the stream's gradient there.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gigavim_kernels.cuda.adjoint import scan_gradients
from gigavim_kernels.cuda.conv_adjoint import convolve_gradients
from gigavim_kernels.cuda.directions import Directions, scan_inputs
from gigavim_kernels.cuda.norm import rms_norm, rms_norm_gradients
from gigavim_kernels.cuda.scan import scan, scan_states


class TrainedBranch(NamedTuple):
    """The weights of a branch as the passes over the chunks use them."""

    norm_weight: Tensor  # (D,)
    norm_eps: float
    in_proj: Tensor  # (2 E, D), in the dtype of products
    out_proj: Tensor  # (D, E), likewise
    directions: Directions

    @property
    def halo(self) -> int:
        """Tokens that a convolution reaches back."""
        return self.directions.conv_weight.shape[2] - 1

    @property
    def width(self) -> int:
        """Channels."""
        return self.out_proj.shape[1]


class _Rows(NamedTuple):
    """The rows of a chunk of T tokens with the halos that its convolutions reach into."""

    span: slice
    """Of the tokens, halos included."""
    before: int
    after: int
    normed: Tensor
    """(B, before + T + after, D), in the dtype of products."""
    xz: Tensor
    """(B, before + T + after, 2 E)"""

    @property
    def tokens(self) -> slice:
        """The chunk among the rows."""
        return slice(self.before, self.normed.shape[1] - self.after)


def prepare(
    weights: Sequence[Tensor],
    norm_eps: float,
    reverse: Sequence[bool],
    reverse_conv: Sequence[bool],
    half: bool,
) -> TrainedBranch:
    """Take the weights (norm_weight, in_proj, out_proj, *`Directions.tensors`), all float32."""
    norm_weight, in_proj, out_proj, *stacked = weights
    product = torch.bfloat16 if half else torch.float32
    directions = Directions.of(stacked, reverse, reverse_conv)
    return TrainedBranch(
        norm_weight, norm_eps, in_proj.to(product), out_proj.to(product),
        directions.to(norm_weight.device, product),
    )  # fmt: skip


def add_branch(
    branch: TrainedBranch, stream: Tensor, keep: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """Return the stream (B, L, D) with the branch, times keep (B,), added.

    Also the states at which the scans enter each chunk, (K, S, B, E, N).
    """
    d = branch.directions
    chunks = _chunks(stream.shape[1], chunk)
    entries = d.A.new_zeros(len(chunks), len(d.reverse), len(stream), d.A.shape[1], d.states)
    forward, backward = _senses(d.reverse)
    if any(d.reverse):
        only = d.only(backward)
        for k in range(len(chunks) - 1, 0, -1):
            rows = _rows(branch, stream, chunks[k], gated=False)
            c, dt, bc, *_ = scan_inputs(only, rows.xz, before=rows.before, after=rows.after)
            entries[k - 1, backward] = scan_states(
                c, dt, only.A, bc, only.dt_bias, entries[k, backward], reverse=only.reverse
            )
    result = torch.empty_like(stream)
    for k, part in enumerate(chunks):
        rows = _rows(branch, stream, part)
        x, z = rows.xz[:, :, : branch.width], rows.xz[:, rows.tokens, branch.width :]
        c, dt, bc, *_ = scan_inputs(d, x, before=rows.before, after=rows.after)
        found = scan(c, dt, d.A, bc, d.D, z, d.dt_bias, entries[k], reverse=d.reverse)
        if k + 1 < len(chunks):
            entries[k + 1, forward] = found.last[forward]
        added = F.linear(found.y, branch.out_proj)
        torch.add(
            stream[:, part],
            added if keep is None else added * keep[:, None, None],
            out=result[:, part],
        )
    return result, entries


def branch_gradients(
    branch: TrainedBranch,
    stream: Tensor,
    keep: Tensor | None,
    entries: Tensor,
    grad: Tensor,
    sums: Sequence[Tensor],
    chunk: int,
) -> Tensor:
    """Gradients of `add_branch`, of whose arguments `entries` is the second result.

    Args:
        grad: (B, L, D), of the first result.
        sums: one tensor for each weight that `prepare` takes; the gradients are added to them.

    Returns:
        The gradient of the stream.
    """
    d_stream = grad.clone(memory_format=torch.contiguous_format)
    chunks = _chunks(stream.shape[1], chunk)
    groups = (
        (slice(0, len(branch.directions.reverse)),)
        if len(chunks) == 1
        else _senses(branch.directions.reverse)
    )
    for group in groups:
        only = branch._replace(directions=branch.directions.only(group))
        if not only.directions.reverse:
            continue
        own = [*sums[:3], *(total[group] for total in sums[3:])]
        exits = entries.new_zeros(entries[:, group].shape[1:])
        order = range(len(chunks))
        for k in order if only.directions.reverse[0] else reversed(order):
            scaled = grad[:, chunks[k]]
            if keep is not None:
                scaled = scaled * keep[:, None, None]
            exits = _chunk_gradients(
                only, stream, chunks[k], entries[k, group], scaled, exits, d_stream, own
            )
    return d_stream


def _chunk_gradients(
    branch: TrainedBranch,
    stream: Tensor,
    chunk: slice,
    entry: Tensor,
    grad: Tensor,
    exits: Tensor,
    d_stream: Tensor,
    sums: Sequence[Tensor],
) -> Tensor:
    """Add a chunk's gradients to `d_stream` and to those of the weights, `sums`.

    Args:
        entry: (S, B, E, N), the states at which the scans enter the chunk.
        grad: (B, T, D), of what the branch adds.
        exits: (S, B, E, N), dL/dh where the scans leave the chunk.

    Returns:
        dL/dh where the scans enter the chunk, (S, B, E, N).
    """
    d, width = branch.directions, branch.width
    rows = _rows(branch, stream, chunk)
    x, z = rows.xz[:, :, :width], rows.xz[:, rows.tokens, width:]
    c, dt, bc, low, _ = scan_inputs(d, x, before=rows.before, after=rows.after, keep_low=True)
    assert low is not None
    found = scan(c, dt, d.A, bc, d.D, z, d.dt_bias, entry, reverse=d.reverse, mark=True)
    grad = grad.to(branch.out_proj.dtype).contiguous()
    d_y = grad @ branch.out_proj  # (B, T, E)
    d_xz = torch.zeros_like(rows.xz)
    d_z = d_xz[:, rows.tokens, width:]
    d_c, d_first = torch.empty_like(c), torch.empty_like(exits)
    (d_norm, d_in, d_out, d_conv, d_conv_bias, d_x_proj, d_dt_weight, d_dt_bias, d_A, d_D) = sums
    d_out += _outer(grad, found.y)
    for s, r in enumerate(d.reverse):
        own = scan_gradients(
            d_y, exits[s], None, c[s], dt[s], d.A[s], bc[s], d.D[s], z, d.dt_bias[s],
            found.decay[s], found.marks[s], reverse=r,
        )  # fmt: skip
        assert own.z is not None
        d_z += own.z
        d_low = own.dt.flatten(0, 1) @ d.dt_weight[s]  # (B T, R)
        d_projected = torch.cat((d_low, own.bc.flatten(0, 1).to(d_low.dtype)), 1)
        torch.addmm(own.x.flatten(0, 1), d_projected, d.x_proj[s], out=d_c[s].view(-1, width))
        d_dt_weight[s] += _outer(own.dt, low[s])
        d_x_proj[s] += _outer(d_projected, c[s])
        d_dt_bias[s] += own.dt_bias
        d_A[s] += own.A
        d_D[s] += own.D
        d_first[s] = own.state
    taps, bias = convolve_gradients(
        d_c, x, d.conv_weight, d.conv_bias, reverse=d.reverse_conv, before=rows.before,
        after=rows.after, out=d_xz[:, :, :width],
    )  # fmt: skip
    d_conv += taps
    d_conv_bias += bias
    d_in += _outer(d_xz, rows.normed)
    d_normed = d_xz @ branch.in_proj  # (B, before + T + after, D)
    whole = d_normed.shape == stream.shape  # then all sequences are one after the other
    pieces = [t.flatten(0, 1)[None] if whole else t[:, rows.span] for t in (stream, d_stream)]
    for own_rows, own_grad, into in zip(pieces[0], d_normed.view(pieces[0].shape), pieces[1]):
        d_norm += rms_norm_gradients(
            own_rows, branch.norm_weight, branch.norm_eps, own_grad, into=into
        )
    return d_first


def _outer(grad: Tensor, rows: Tensor) -> Tensor:
    """The gradient of a product's weight, (..., out) and (..., in) to (out, in)."""
    return grad.flatten(0, -2).T @ rows.flatten(0, -2)


def _rows(branch: TrainedBranch, stream: Tensor, chunk: slice, *, gated: bool = True) -> _Rows:
    """Norm and in_proj of a chunk and its halos; of z only if `gated`."""
    before = min(branch.halo, chunk.start)
    after = min(branch.halo, stream.shape[1] - chunk.stop)
    span = slice(chunk.start - before, chunk.stop + after)
    rows = stream[:, span].contiguous()
    normed = torch.empty(rows.shape, dtype=branch.in_proj.dtype, device=rows.device)
    rms_norm(rows.flatten(0, 1), branch.norm_weight, branch.norm_eps, out=normed.flatten(0, 1))
    weight = branch.in_proj if gated else branch.in_proj[: branch.width]
    return _Rows(span, before, after, normed, F.linear(normed, weight))


def _senses(reverse: Sequence[bool]) -> tuple[slice, slice]:
    """The directions that scan forward, and those that do not: they come in this order."""
    count = list(reverse).count(False)
    assert not any(reverse[:count])
    return slice(0, count), slice(count, len(reverse))


def _chunks(length: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]
