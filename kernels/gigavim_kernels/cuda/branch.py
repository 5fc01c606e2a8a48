"""A whole branch of a Vim block as one torch operator that recomputes instead of storing.

    stream <- stream + keep * out_proj(scale * sum of scans(conv(in_proj(norm(stream)))))

Saved for the gradients are the stream before the branch and, where a sequence is cut, the scans'
states at the cuts. Norm, products, convolution, steps, states and gate are computed once more.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gigavim_kernels.cuda.directions import Directions
from gigavim_kernels.cuda.recompute import add_branch, branch_gradients, prepare

CHUNK_ELEMENTS = 1 << 25
"""Tokens of a batch times channels that are gone through at once: about 2 GB of temporaries."""


def vim_branch(
    stream: Tensor,
    norm_weight: Tensor,
    norm_eps: float,
    in_proj: Tensor,
    out_proj: Tensor,
    directions: Directions,
    *,
    keep: Tensor | None = None,
    half: bool = False,
    chunk: int | None = None,
) -> Tensor:
    """Return the stream with a branch of a Vim block added, with gradients.

    Two runs give the same bits. Once differentiable; `naive.vim_block` is the specification.

    Args:
        stream: (B, L, D) float32, contiguous.
        norm_weight: (D,). in_proj: (2 E, D), rows of x, rows of z. out_proj: (D, E), times the
            branch's scale.
        directions: see `directions.stack`; N a power of two, at least 2.
        keep: (B,), a factor on what is added to each sequence; without a gradient.
        half: multiply matrices in bfloat16; the stream and all sums in the kernels are float32.
        chunk: tokens that are gone through at once; chosen by size if absent.
    """
    if chunk is None:
        chunk = max(1, CHUNK_ELEMENTS // (out_proj.shape[1] * max(1, len(stream))))
    weights = (norm_weight, in_proj, out_proj, *directions.tensors)
    result: Tensor = _forward(
        stream.contiguous(), keep, [w.float().contiguous() for w in weights],
        norm_eps, directions.reverse, directions.reverse_conv, half, chunk,
    )[0]  # fmt: skip
    return result


@torch.library.custom_op("gigavim::vim_branch", mutates_args=())
def _forward(
    stream: Tensor,
    keep: Tensor | None,
    weights: Sequence[Tensor],
    norm_eps: float,
    reverse: Sequence[bool],
    reverse_conv: Sequence[bool],
    half: bool,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Return what `add_branch` returns."""
    with torch.autocast(stream.device.type, enabled=False):
        branch = prepare(weights, norm_eps, reverse, reverse_conv, half)
        return add_branch(branch, stream, keep, chunk)


@_forward.register_fake
def _forward_fake(
    stream: Tensor,
    keep: Tensor | None,
    weights: Sequence[Tensor],
    norm_eps: float,
    reverse: Sequence[bool],
    reverse_conv: Sequence[bool],
    half: bool,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    chunks, d = -(-stream.shape[1] // chunk), Directions.of(weights[3:], reverse, reverse_conv)
    entries = d.A.new_empty(chunks, len(reverse), len(stream), d.A.shape[1], d.states)
    return torch.empty_like(stream), entries


@torch.library.custom_op("gigavim::vim_branch_backward", mutates_args=())
def _backward(
    grad: Tensor,
    stream: Tensor,
    keep: Tensor | None,
    weights: Sequence[Tensor],
    entries: Tensor,
    norm_eps: float,
    reverse: Sequence[bool],
    reverse_conv: Sequence[bool],
    half: bool,
    chunk: int,
) -> list[Tensor]:
    """Return the gradients of the stream and of the weights."""
    sums = [torch.zeros_like(w) for w in weights]
    with torch.autocast(stream.device.type, enabled=False):
        branch = prepare(weights, norm_eps, reverse, reverse_conv, half)
        return [branch_gradients(branch, stream, keep, entries, grad, sums, chunk), *sums]


@_backward.register_fake
def _backward_fake(
    grad: Tensor,
    stream: Tensor,
    keep: Tensor | None,
    weights: Sequence[Tensor],
    entries: Tensor,
    norm_eps: float,
    reverse: Sequence[bool],
    reverse_conv: Sequence[bool],
    half: bool,
    chunk: int,
) -> list[Tensor]:
    return [torch.empty_like(t) for t in (stream, *weights)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    stream, keep, weights, *ctx.settings = inputs
    ctx.save_for_backward(stream, keep, output[1], *weights)


def _differentiate(ctx: Any, grad: Tensor, _entries: Tensor) -> tuple[Any, ...]:
    stream, keep, entries, *weights = ctx.saved_tensors
    d_stream, *rest = _backward(grad, stream, keep, weights, entries, *ctx.settings)
    return (d_stream, None, rest, *(None for _ in ctx.settings))


_forward.register_autograd(_differentiate, setup_context=_save)
