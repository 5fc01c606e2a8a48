"""A Vim block in plain torch for any device: the fallback where no faster backend exists."""

from dataclasses import fields, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gigavim_kernels import chunked, naive
from gigavim_kernels.block import States, apply_each
from gigavim_kernels.weights import BlockWeights, Branch, Direction

CHUNK_CPU, CHUNK_ACCELERATOR = 1024, 16_384


class TorchBlock:
    """`gigavim_kernels.block.BlockKernel` over the chunked scan.

    Products are taken in `dtype`; the stream, the convolution and the scan stay in float32.
    """

    def __init__(
        self, block: BlockWeights, *, device: torch.device, precision: Literal["fp32", "bf16"]
    ) -> None:
        product = torch.bfloat16 if precision == "bf16" else torch.float32
        self._branches = tuple(_branch_to(b, device, product) for b in block.branches)
        self._stream_scale = block.stream_scale
        self._device = device
        directions = [d for b in block.branches for d in b.directions]
        self.halo = max(d.conv_weight.shape[1] for d in directions) - 1
        self.chunk = CHUNK_CPU if device.type == "cpu" else CHUNK_ACCELERATOR

    def zero_states(self, *, reverse: bool) -> States:
        """See `BlockKernel.zero_states`."""
        return tuple(
            d.A.new_zeros(len(d.A), d.states)
            for b in self._branches
            for d in b.directions
            if d.reverse == reverse
        )

    @torch.no_grad()
    def edge_states(self, stream: Tensor, left: Tensor, right: Tensor, states: States) -> States:
        """See `BlockKernel.edge_states`."""
        padded = torch.cat((left, stream, right))  # (halo + T + halo, D)
        given = iter(states)
        carried = []
        for branch in self._branches:
            reverse = [d for d in branch.directions if d.reverse]
            if reverse:
                inner = branch.in_proj[: branch.out_proj.shape[1]]
                x = _linear(_norm(padded, branch), inner)  # (halo + T + halo, E)
                carried += [self._scan(d, x, None, next(given)).state[0] for d in reverse]
        return tuple(carried)

    @torch.no_grad()
    def update(
        self, stream: Tensor, left: Tensor, right: Tensor, forward: States, reverse: States
    ) -> States:
        """See `BlockKernel.update`."""
        padded = torch.cat((left, stream, right))
        given = {False: iter(forward), True: iter(reverse)}
        carried: list[Tensor] = []
        added = []
        for branch in self._branches:
            x, z = _linear(_norm(padded, branch), branch.in_proj).chunk(2, 1)
            z = z[self.halo : self.halo + len(stream)]
            total = torch.zeros_like(z)
            for direction in branch.directions:
                result = self._scan(direction, x, z, next(given[direction.reverse]))
                total += result.y[0]
                if not direction.reverse:
                    carried.append(result.state[0])
            added.append(_linear(total.mul_(branch.scale), branch.out_proj))
        if self._stream_scale != 1:
            stream.mul_(self._stream_scale)
        for rows in added:
            stream.add_(rows)
        return tuple(carried)

    def apply(self, streams: Tensor) -> None:
        """See `BlockKernel.apply`."""
        apply_each(self, streams)

    def _scan(
        self, direction: Direction, x: Tensor, z: Tensor | None, state: Tensor
    ) -> naive.ScanResult:
        """Convolve and scan the rows of x (halo + T + halo, E) without its halos."""
        taps = direction.conv_weight.shape[1] - 1
        start, stop = self.halo, len(x) - self.halo
        beyond = x[stop : stop + taps] if direction.reverse_conv else x[start - taps : start]
        c = naive.causal_conv(
            x[None, start:stop],
            direction.conv_weight,
            direction.conv_bias,
            beyond[None],
            reverse=direction.reverse_conv,
        )
        rank, states = direction.dt_weight.shape[1], direction.states
        dt, B, C = torch.split_with_sizes(
            _linear(c[0], direction.x_proj), (rank, states, states), 1
        )
        return chunked.selective_scan(
            c,
            _linear(dt, direction.dt_weight)[None],
            direction.A,
            B[None],
            C[None],
            direction.D,
            None if z is None else z[None],
            direction.dt_bias,
            state[None],
            reverse=direction.reverse,
        )


def _norm(rows: Tensor, branch: Branch) -> Tensor:
    return F.rms_norm(rows, branch.norm_weight.shape, branch.norm_weight, branch.norm_eps)


def _linear(rows: Tensor, weight: Tensor) -> Tensor:
    return F.linear(rows.to(weight.dtype), weight).float()


def _branch_to(branch: Branch, device: torch.device, product: torch.dtype) -> Branch:
    return replace(
        branch,
        norm_weight=branch.norm_weight.to(device),
        in_proj=branch.in_proj.to(device, product),
        out_proj=branch.out_proj.to(device, product),
        directions=tuple(_direction_to(d, device, product) for d in branch.directions),
    )


def _direction_to(direction: Direction, device: torch.device, product: torch.dtype) -> Direction:
    moved = {
        f.name: getattr(direction, f.name).to(device)
        for f in fields(direction)
        if isinstance(getattr(direction, f.name), Tensor)
    }
    moved["x_proj"] = moved["x_proj"].to(product)
    moved["dt_weight"] = moved["dt_weight"].to(product)
    return replace(direction, **moved)
