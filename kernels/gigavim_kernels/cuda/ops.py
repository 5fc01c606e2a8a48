"""The scan as torch operators, differentiable and known to `torch.compile`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gigavim_kernels.cuda.adjoint import scan_gradients
from gigavim_kernels.cuda.scan import MARK, join, scan
from gigavim_kernels.naive import ScanResult


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

    y has the dtype of x; the state and everything summed are float32. Gradients flow to every
    tensor from y, state and decay, once differentiable, and two runs give the same bits. Saved for
    them are the arguments and one state for every `scan.MARK` tokens.
    """
    states = B.shape[2]
    more = max(2, 1 << (states - 1).bit_length()) - states
    if more:  # the kernels take powers of two: states that nothing enters change nothing
        A, B, C = (t if t.shape[-1] < states else F.pad(t, (0, more)) for t in (A, B, C))
        state = None if state is None else F.pad(state, (0, more))
    rows = [t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (x, dt, z)]
    whole = [None if t is None else t.float().contiguous() for t in (A, D, dt_bias, state)]
    given = (*rows[:2], whole[0], join(B, C), whole[1], rows[2], *whole[2:])
    mark = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    y, last, decay, _ = _scan(*given, reverse, mark)
    return ScanResult(y, last[..., :states], decay[..., :states])


@torch.library.custom_op("gigavim::selective_scan", mutates_args=())
def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    bc: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    reverse: bool,
    mark: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, the last state, the total decay, and the marks (none unless asked for)."""
    found = scan(
        x[None],
        dt[None],
        A[None],
        bc[None],
        None if D is None else D[None],
        z,
        None if dt_bias is None else dt_bias[None],
        None if state is None else state[None],
        reverse=[reverse],
        mark=mark,
    )
    marks = found.marks[0] if mark else A.new_empty(0)
    return found.y, found.last[0], found.decay[0], marks


@_scan.register_fake
def _scan_fake(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    bc: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    reverse: bool,
    mark: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, channels = x.shape
    states = bc.shape[2] // 2
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    last = A.new_empty(batch, channels, states)
    marks = A.new_empty(batch, -(-length // MARK), states, channels) if mark else A.new_empty(0)
    return y, last, torch.empty_like(last), marks


@torch.library.custom_op("gigavim::selective_scan_backward", mutates_args=())
def _scan_backward(
    grad_y: Tensor,
    grad_last: Tensor,
    grad_decay: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    bc: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    decay: Tensor,
    marks: Tensor,
    reverse: bool,
) -> list[Tensor]:
    """Return the gradients of x, dt, A, bc, D, z (empty if there is none), dt_bias, state."""
    if x.numel() == 0:
        zeros = [torch.zeros_like(t) for t in (x, dt, A, bc)]
        edge = [A.new_zeros(x.shape[2]), torch.zeros_like(x), A.new_zeros(x.shape[2])]
        return [*zeros, *edge, grad_last.clone()]
    found = scan_gradients(
        grad_y.contiguous(), grad_last.contiguous(), grad_decay.contiguous(),
        x, dt, A, bc, D, z, dt_bias, decay, marks, reverse=reverse,
    )  # fmt: skip
    return [torch.empty(0, device=x.device) if t is None else t for t in found]


@_scan_backward.register_fake
def _scan_backward_fake(
    grad_y: Tensor,
    grad_last: Tensor,
    grad_decay: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    bc: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    decay: Tensor,
    marks: Tensor,
    reverse: bool,
) -> list[Tensor]:
    def like(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    channels = A.new_empty(x.shape[2])
    d_z = torch.empty(0, device=x.device) if z is None else like(z)
    row_gradients = [like(x), like(dt), like(A), like(bc)]
    return [*row_gradients, channels, d_z, torch.empty_like(channels), like(grad_last)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.reverse, _ = inputs
    ctx.absent = [t is None for t in tensors]
    ctx.save_for_backward(*tensors[:-1], *output[2:])
    ctx.set_materialize_grads(True)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    found = _scan_backward(*grads[:3], *ctx.saved_tensors, ctx.reverse)
    kept = (None if absent else t for t, absent in zip(found, ctx.absent))
    return (*kept, None, None)


_scan.register_autograd(_backward, setup_context=_save)
