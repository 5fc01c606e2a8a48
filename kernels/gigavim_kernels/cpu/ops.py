"""The CPU kernels behind the signatures of `gigavim_kernels.naive`: float32, no gradients."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gigavim_kernels.cpu.conv import conv_rows
from gigavim_kernels.cpu.layout import STATE_MULTIPLE, ordered_taps, padded
from gigavim_kernels.cpu.scan import scan_channels, state_block
from gigavim_kernels.cpu.simd import LANES
from gigavim_kernels.naive import ScanResult


@torch.no_grad()
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
    """Compute what `naive.selective_scan` specifies, in float32 and without gradients."""
    batch, channels, states = x.shape[0], x.shape[2], A.shape[1]
    bias = torch.zeros(channels) if dt_bias is None else dt_bias.float()
    first = torch.zeros(batch, channels, states) if state is None else state
    A2 = padded(padded(A.T * math.log2(math.e), 1, LANES), 0, STATE_MULTIPLE).numpy()  # (N, E)
    xs, dts, hidden = padded(x, 2, LANES), padded(dt, 2, LANES), first.transpose(1, 2)
    hidden = padded(padded(hidden, 2, LANES), 1, STATE_MULTIPLE)  # (B, N, E)
    zs = None if z is None else padded(z, 2, LANES)
    Bs, Cs = padded(B, 2, STATE_MULTIPLE), padded(C, 2, STATE_MULTIPLE)
    skip = None if D is None else padded(D[None], 1, LANES).numpy()
    y = torch.empty_like(xs)
    for b in range(batch):
        scan_channels(
            xs[b].numpy(), dts[b].numpy(), None, padded(bias[None], 1, LANES).numpy(), A2,
            Bs[b].numpy(), Cs[b].numpy(), skip, None if zs is None else zs[b].numpy(), None,
            y[b].numpy(), hidden[b].numpy(), reverse, state_block(A2), 0, xs.shape[2],
        )  # fmt: skip
    total = F.softplus(dt.float() + bias).sum(1)[..., None]
    last = hidden[:, :states, :channels].transpose(1, 2).contiguous()
    return ScanResult(y[..., :channels].contiguous(), last, torch.exp(A.float() * total))


@torch.no_grad()
def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, halo: Tensor | None = None, *, reverse: bool = False
) -> Tensor:
    """Compute what `naive.causal_conv` specifies, in float32 and without gradients."""
    width = weight.shape[1]
    beyond = x.new_zeros(x.shape[0], width - 1, x.shape[2]) if halo is None else halo
    rows = padded(torch.cat((x, beyond) if reverse else (beyond, x), 1), 2, LANES)
    out = torch.empty(x.shape[0], x.shape[1], rows.shape[2])
    weights, biases = ordered_taps(weight, reverse=reverse), padded(bias[None], 1, LANES).numpy()
    for source, target in zip(rows, out):
        conv_rows(source.numpy(), weights, biases, tuple(range(width)), 0, target.numpy())
    return out[..., : x.shape[2]].contiguous()
