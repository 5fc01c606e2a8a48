"""The encoder's forward pass for training, on the fastest kernels that have gradients.

On a CPU the decay rates of a channel's states stay tied, A_n = n A_1, as they are initialised: a
single exponential per channel and token then serves all sixteen states.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from gigavim.model.block import Block
from gigavim.model.vim import Vim
from gigavim_kernels.backends import backend_name

log = logging.getLogger(__name__)

RANK_MULTIPLE = 8


class Operators(NamedTuple):
    """What the mixer of a block needs, with gradients."""

    conv: Callable[..., Tensor]
    """(x, weight, bias, *, reverse) as `gigavim_kernels.naive.causal_conv`."""
    scan: Callable[..., Tensor]
    """(x, dt, A, B, C, D, z, dt_bias, *, reverse) to y, as `naive.selective_scan`."""


def encode(
    encoder: Vim,
    tokens: Tensor,
    *,
    every: int = 1,
    drop_path: float = 0.0,
    generator: Generator | None = None,
    recompute: bool = False,
    tied: bool = False,
) -> Tensor:
    """Return what `encoder.encode` returns for sequences (B, L, D), with gradients.

    Args:
        every: use every n-th layer only, for the cheap first part of a training.
        drop_path: the rate at which a sequence skips the last layer; less for earlier ones.
        generator: draws the layers that are skipped, on the device of the tokens.
        recompute: keep only the stream before each layer, and compute the rest once more in the
            backward pass.
        tied: keep the decay rates of a channel's states in the ratio 1 : 2 : ... : N, which CPUs
            scan much faster; on a CPU they are always kept so.
    """
    operators = training_operators(tokens.device, encoder.config.d_state, encoder.config.d_inner)
    if encoder.config.bidirectional == "layer_pairs":
        return encoder.encode(tokens)
    stream = tokens
    layers = cast(list[Block], list(encoder.layers))[::every]
    for place, layer in enumerate(layers):
        if recompute and torch.is_grad_enabled():
            branch = checkpoint(_branch, layer, stream, operators, tied, use_reentrant=False)
        else:
            branch = _branch(layer, stream, operators, tied)
        rate = drop_path * place / max(1, len(layers) - 1)
        if rate > 0 and torch.is_grad_enabled():
            draw = torch.rand(len(tokens), 1, 1, generator=generator, device=tokens.device)
            branch = branch * ((draw >= rate) / (1 - rate))
        stream = stream + branch
    return cast(Tensor, encoder.norm_f(stream))


@cache
def training_operators(device: torch.device, states: int, channels: int) -> Operators | None:
    """Choose the kernels for a device; None where only the model's own plain torch will do."""
    if device.type == "cpu" and states == 16 and channels % 16 == 0:
        if backend_name(device) == "numba":
            return _numba_operators()
    elif device.type == "cuda" and backend_name(device) == "triton":
        operators = _triton_operators()
        error = scan_error(operators, device, states, channels)
        if error < 5e-3:
            return operators
        log.warning(
            "the Triton scan is off by %.1e on %s: plain torch trains, ten times slower",
            error,
            torch.cuda.get_device_name(device),
        )
    return None


def scan_error(operators: Operators, device: torch.device, states: int, channels: int) -> float:
    """The largest relative error of outputs and gradients against plain torch in float64."""
    from gigavim_kernels import chunked, naive

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    length = 300
    rows = [draw(2, length, channels) for _ in range(4)]
    sides = [draw(2, length, states) for _ in range(2)]
    rates = -torch.rand(channels, states, generator=generator) - 0.05
    scan = [rows[0], rates, *sides, draw(channels), rows[1], draw(channels)]
    inputs = [rows[2], draw(channels, 4), draw(channels), *scan]
    weights = rows[3].to(device)
    worst = 0.0
    for reverse in (False, True):
        found = [t.to(device, copy=True).requires_grad_() for t in inputs]
        expected = [t.to(device, torch.float64).requires_grad_() for t in inputs]
        y = operators.scan(operators.conv(*found[:3], reverse=reverse), *found[3:], reverse=reverse)
        plain = chunked.selective_scan(
            naive.causal_conv(*expected[:3], reverse=reverse), *expected[3:], reverse=reverse
        ).y
        torch.autograd.backward((y * weights).sum())
        torch.autograd.backward((plain * weights).sum())
        pairs = [(y, plain), *((f.grad, e.grad) for f, e in zip(found, expected, strict=True))]
        for one, other in pairs:
            assert one is not None
            assert other is not None
            difference = (one.detach() - other.detach()).norm()
            worst = max(worst, float(difference / other.detach().norm().clamp(min=1e-6)))
    return worst


def tied_rate(A: Tensor) -> Tensor:
    """Fit rate (E,) such that A (E, N) is about n * rate; the states share its gradient."""
    return -torch.exp(torch.log(-A / spread_rate(A.new_ones(1), A.shape[1])).mean(1))


def spread_rate(rate: Tensor, states: int) -> Tensor:
    """The rates (E, N) of states that share a rate (E,): n * rate."""
    return rate[:, None] * torch.arange(1, states + 1, dtype=rate.dtype, device=rate.device)


@torch.no_grad()
def silence_odd_layers(encoder: Vim) -> None:
    """Let every second layer add nothing at first, so that it can join a trained encoder later."""
    for layer in list(encoder.layers)[1::2]:
        cast(Block, layer).mixer.out_proj.weight.zero_()


def _numba_operators() -> Operators:
    from gigavim_kernels.cpu.training import scan as cpu_scan

    def scan(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
        dt_bias: Tensor, *, reverse: bool,
    ) -> Tensor:  # fmt: skip
        return cpu_scan.selective_scan(x, dt, tied_rate(A), B, C, D, z, dt_bias, reverse=reverse)

    return Operators(cpu_scan.causal_conv, scan)


def _triton_operators() -> Operators:
    from gigavim_kernels.cuda import conv_adjoint, ops

    def scan(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
        dt_bias: Tensor, *, reverse: bool,
    ) -> Tensor:  # fmt: skip
        return ops.selective_scan(x, dt, A, B, C, D, z, dt_bias, reverse=reverse).y

    return Operators(conv_adjoint.causal_conv, scan)


def _branch(block: Block, stream: Tensor, operators: Operators | None, tied: bool) -> Tensor:
    """Norm, in_proj, scans, out_proj: (B, L, D) to (B, L, D) in the stream's dtype."""
    if operators is None:
        return cast(Tensor, block(stream))
    mixer = block.mixer
    inner, gate = mixer.in_proj(block.norm(stream)).chunk(2, -1)  # (B, L, E) each
    outputs = []
    for direction in mixer.directions():
        u = operators.conv(
            inner, direction.conv_weight, direction.conv_bias, reverse=direction.reverse_conv
        )
        rank, states = direction.dt_weight.shape[1], direction.A.shape[1]
        # Aligned to 16 bytes in bfloat16, without which matrix products are slow.
        more = -rank % RANK_MULTIPLE
        rows_dt, rows_bc = torch.split(direction.x_proj, [rank, 2 * states])
        x_proj = torch.cat((F.pad(rows_dt, (0, 0, 0, more)), rows_bc)) if more else direction.x_proj
        low, B, C = torch.split(F.linear(u, x_proj), [rank + more, states, states], -1)
        y = operators.scan(
            u,
            F.linear(low, F.pad(direction.dt_weight, (0, more))),
            spread_rate(tied_rate(direction.A), states) if tied else direction.A,
            B,
            C,
            direction.D,
            gate,
            direction.dt_bias,
            reverse=direction.reverse,
        )
        outputs.append(y)
    total = outputs[0] if len(outputs) == 1 else outputs[0] + outputs[1]
    branch: Tensor = mixer.out_proj(total * mixer.scale if mixer.scale != 1 else total)
    return branch.to(stream.dtype)
