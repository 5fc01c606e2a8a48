"""The encoder's forward pass for training: the model's own on a GPU, the numba scan on a CPU.

On a CPU the decay rates of a channel's states stay tied, A_n = n A_1, as they are initialised: a
single exponential per channel and token then serves all sixteen states.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from gigavim.model.block import Block
from gigavim.model.vim import Vim
from gigavim_kernels.cpu.training import scan as cpu_scan


def encode(encoder: Vim, tokens: Tensor, *, every: int = 1) -> Tensor:
    """Return what `encoder.encode` returns for sequences (B, L, D), with gradients.

    Args:
        every: use every n-th layer only, for the cheap first part of a training (CPU only).
    """
    config = encoder.config
    fits = config.d_state == 16 and config.d_conv == 4 and config.d_inner % 16 == 0
    if tokens.device.type != "cpu" or not fits or config.bidirectional == "layer_pairs":
        return encoder.encode(tokens)
    stream = tokens
    for layer in list(encoder.layers)[::every]:
        stream = stream + _branch(cast(Block, layer), stream)
    return cast(Tensor, encoder.norm_f(stream))


def tied_rate(A: Tensor) -> Tensor:
    """Fit rate (E,) such that A (E, N) is about n * rate; the states share its gradient."""
    multiples = torch.arange(1, A.shape[1] + 1, dtype=A.dtype, device=A.device)
    return -torch.exp(torch.log(-A / multiples).mean(1))


@torch.no_grad()
def silence_odd_layers(encoder: Vim) -> None:
    """Let every second layer add nothing at first, so that it can join a trained encoder later."""
    for layer in list(encoder.layers)[1::2]:
        cast(Block, layer).mixer.out_proj.weight.zero_()


@torch.no_grad()
def tie_rates(encoder: Vim) -> None:
    """Undo the rounding drift of training with tied rates."""
    for name, parameter in encoder.named_parameters():
        if name.endswith(("A_log", "A_b_log")):
            states = torch.arange(1, parameter.shape[1] + 1, dtype=torch.float32).log()
            parameter.copy_((parameter - states).mean(1, keepdim=True) + states)


def _branch(block: Block, stream: Tensor) -> Tensor:
    """Norm, in_proj, scans, out_proj: (B, L, D) to (B, L, D)."""
    mixer = block.mixer
    inner, gate = mixer.in_proj(block.norm(stream)).chunk(2, -1)  # (B, L, E) each
    outputs = []
    for direction in mixer.directions():
        u = cpu_scan.causal_conv(
            inner, direction.conv_weight, direction.conv_bias, reverse=direction.reverse_conv
        )
        rank, states = direction.dt_weight.shape[1], direction.A.shape[1]
        low, B, C = torch.split(F.linear(u, direction.x_proj), [rank, states, states], -1)
        y = cpu_scan.selective_scan(
            u,
            F.linear(low, direction.dt_weight),
            tied_rate(direction.A),
            B,
            C,
            direction.D,
            gate,
            direction.dt_bias,
            reverse=direction.reverse,
        )
        outputs.append(y)
    total = outputs[0] if len(outputs) == 1 else outputs[0] + outputs[1]
    return cast(Tensor, mixer.out_proj(total * mixer.scale if mixer.scale != 1 else total))
