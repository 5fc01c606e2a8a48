"""The encoder's forward pass for training, on the fastest kernels that have gradients.

On a CPU the decay rates of a channel's states stay tied, A_n = n A_1, as they are initialised: a
single exponential per channel and token then serves all sixteen states.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from gigavim.model.block import Block
from gigavim.model.vim import OnStream, Vim
from gigavim_kernels.backends import backend_name
from gigavim_kernels.naive import spread_rates

log = logging.getLogger(__name__)


class LayerKernel(NamedTuple):
    """What adds a layer to the stream, with gradients."""

    add: Callable[[Block, Tensor, Tensor | None, bool], Tensor]
    """(layer, stream (B, L, D), keep (B,) or None, tied) to the stream with the layer's branch,
    times keep, added."""
    recomputes: bool = False
    """Whether it keeps nothing for the gradients but the stream."""
    ties: bool = False
    """Whether the decay rates of a channel's states are tied, asked or not."""


def encode(
    encoder: Vim,
    tokens: Tensor,
    *,
    every: int = 1,
    drop_path: float = 0.0,
    generator: Generator | None = None,
    recompute: bool = False,
    tied: bool = False,
    on_stream: OnStream | None = None,
) -> Tensor:
    """Return what `encoder.encode` returns for sequences (B, L, D), with gradients.

    Args:
        every: use every n-th layer only, for the cheap first part of a training.
        drop_path: the rate at which a sequence skips the last layer; less for earlier ones.
        generator: draws the layers that are skipped, on the device of the tokens.
        recompute: keep only the stream before each layer, and compute the rest once more in the
            backward pass; GPUs always do.
        tied: keep the decay rates of a channel's states in the ratio 1 : 2 : ... : N, which CPUs
            scan much faster; on a CPU they are always kept so.
        on_stream: as of `encoder.encode`; what layers are left out is not skipped in its count.
    """
    config = encoder.config
    kernel = layer_kernel(tokens.device, config.d_state, config.d_model, tied)

    def added(layer: Block, stream: Tensor, keep: Tensor | None) -> Tensor:
        if recompute and torch.is_grad_enabled() and not kernel.recomputes:
            again = checkpoint(kernel.add, layer, stream, keep, tied, use_reentrant=False)
            return cast(Tensor, again)
        return kernel.add(layer, stream, keep, tied)

    paired = config.bidirectional == "layer_pairs"
    layers = cast(list[Block], list(encoder.layers))
    blocks = len(layers) // (1 + paired)
    firsts = range(0, blocks * (1 + paired), (1 + paired) * every)
    steps = [layers[i : i + 1 + paired] for i in firsts]
    stream = tokens
    if on_stream is not None:
        on_stream(0, stream)
    for place, step in enumerate(steps):
        rate = drop_path * place / max(1, len(steps) - 1)
        keep = None
        if rate > 0 and torch.is_grad_enabled():
            draw = torch.rand(len(tokens), generator=generator, device=tokens.device)
            keep = (draw >= rate) / (1 - rate)
        if paired:  # both see one stream, the second from its end, and their sums are added
            flipped = added(step[1], stream.flip(1), keep).flip(1)
            stream = added(step[0], stream, keep) + flipped
        else:
            stream = added(step[0], stream, keep)
        if on_stream is not None:
            for done in range(place * every, min((place + 1) * every, blocks)):
                on_stream(done + 1, stream)
    return cast(Tensor, encoder.norm_f(stream))


@cache
def layer_kernel(device: torch.device, states: int, d_model: int, tied: bool) -> LayerKernel:
    """Choose the kernels for a device; where there are none, the model's own plain torch."""
    if device.type == "cpu" and states == 16 and d_model % 8 == 0:
        if backend_name(device) == "numba":
            return LayerKernel(_add_on_cpu, ties=True)
    elif device.type == "cuda" and backend_name(device) == "triton":
        from gigavim_kernels import selftest

        check = selftest.check_branch(device, d_model, states, tied=tied)
        if check.ok:
            return LayerKernel(_add_on_gpu, recomputes=True)
        log.warning(
            "%s: off by %.1e on %s: plain torch trains, ten times slower",
            check.name,
            check.error,
            torch.cuda.get_device_name(device),
        )
    return LayerKernel(_add_plainly)


def tied_rate(A: Tensor) -> Tensor:
    """Fit rate (E,) such that A (E, N) is about n * rate; the states share its gradient."""
    ratio = spread_rates(A.new_ones(1), A.shape[1])
    return -torch.exp(torch.log(-A / ratio).mean(1))


@torch.no_grad()
def silence_odd_layers(encoder: Vim) -> None:
    """Let every second layer add nothing at first, so that it can join a trained encoder later."""
    for layer in list(encoder.layers)[1::2]:
        cast(Block, layer).mixer.out_proj.weight.zero_()


def _add_plainly(layer: Block, stream: Tensor, keep: Tensor | None, _tied: bool) -> Tensor:
    branch = cast(Tensor, layer(stream))
    return stream + (branch if keep is None else branch * keep[:, None, None])


def _add_on_gpu(layer: Block, stream: Tensor, keep: Tensor | None, tied: bool) -> Tensor:
    from gigavim_kernels.cuda.branch import vim_branch
    from gigavim_kernels.cuda.directions import stack

    mixer = layer.mixer
    directions = mixer.directions()
    if tied:
        directions = tuple(replace(d, A=tied_rate(d.A)[:, None]) for d in directions)
    out_proj = mixer.out_proj.weight
    return vim_branch(
        stream.float(),
        layer.norm.weight,
        layer.norm.eps,
        mixer.in_proj.weight,
        out_proj * mixer.scale if mixer.scale != 1 else out_proj,
        stack(directions),
        keep=keep,
        half=torch.is_autocast_enabled(stream.device.type),
    )


def _add_on_cpu(layer: Block, stream: Tensor, keep: Tensor | None, _tied: bool) -> Tensor:
    from gigavim_kernels.cpu.training import scan as kernels

    mixer = layer.mixer
    inner, gate = mixer.in_proj(layer.norm(stream)).chunk(2, -1)  # (B, L, E) each
    total = stream.new_zeros(())
    for d in mixer.directions():
        u = kernels.causal_conv(inner, d.conv_weight, d.conv_bias, reverse=d.reverse_conv)
        rank, states = d.dt_weight.shape[1], d.A.shape[1]
        low, B, C = torch.split(F.linear(u, d.x_proj), [rank, states, states], -1)
        dt = F.linear(low, d.dt_weight)
        total = total + kernels.selective_scan(
            u, dt, tied_rate(d.A), B, C, d.D, gate, d.dt_bias, reverse=d.reverse
        )
    branch: Tensor = mixer.out_proj(total * mixer.scale if mixer.scale != 1 else total).to(
        stream.dtype
    )
    return stream + (branch if keep is None else branch * keep[:, None, None])
