"""A Vim block on a GPU: Triton kernels between cuBLAS products."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gigavim_kernels.block import States
from gigavim_kernels.cuda.directions import Directions, compact_rates, scan_inputs, stack
from gigavim_kernels.cuda.norm import rms_norm
from gigavim_kernels.cuda.product import add_product
from gigavim_kernels.cuda.scan import Scanned, scan, scan_states
from gigavim_kernels.weights import BlockWeights, Branch

CHUNK_ELEMENTS = 1 << 26
"""Tokens times channels of a call: about 1.2 GB of temporaries in bf16."""


class CudaBlock:
    """`gigavim_kernels.block.BlockKernel` for GPUs that Triton supports.

    In "bf16" the products and what lies between them are bfloat16; the stream, the states and all
    sums inside the kernels are float32.
    """

    def __init__(
        self, block: BlockWeights, *, device: torch.device, precision: Literal["fp32", "bf16"]
    ) -> None:
        self._product = torch.bfloat16 if precision == "bf16" else torch.float32
        self._branches = tuple(_prepare(b, device, self._product) for b in block.branches)
        self._stream_scale = block.stream_scale
        self.halo = max(b.directions.conv_weight.shape[2] for b in self._branches) - 1
        width = max(b.out_proj.shape[1] for b in self._branches)
        self.chunk = 1 << (CHUNK_ELEMENTS // width).bit_length() - 1

    def zero_states(self, *, reverse: bool) -> States:
        """See `BlockKernel.zero_states`."""
        return tuple(
            state
            for b in self._branches
            for state, r in zip(b.directions.zero_states(), b.directions.reverse)
            if r == reverse
        )

    @torch.no_grad()
    def edge_states(self, stream: Tensor, left: Tensor, right: Tensor, states: States) -> States:
        """See `BlockKernel.edge_states`."""
        given = iter(states)
        carried: list[Tensor] = []
        for branch in self._branches:
            d = branch.reversed_directions
            if d is None:
                continue
            inner = branch.in_proj[: branch.out_proj.shape[1]]
            x = F.linear(self._norm(branch, stream, left, right), inner)
            own = scan_inputs(d, x, before=self.halo, after=self.halo, steps=True)
            first = torch.stack([next(given) for _ in d.reverse])[:, None]  # (S, 1, E, N)
            last = scan_states(
                own.c, own.dt, d.A, own.bc, d.dt_bias, first, reverse=d.reverse, steps=own.steps
            )
            carried += last[:, 0].unbind()
        return tuple(carried)

    @torch.no_grad()
    def update(
        self, stream: Tensor, left: Tensor, right: Tensor, forward: States, reverse: States
    ) -> States:
        """See `BlockKernel.update`."""
        given = {False: iter(forward), True: iter(reverse)}
        carried: list[Tensor] = []
        outputs = []
        for branch in self._branches:
            sense = branch.directions.reverse
            first = torch.stack([next(given[r]) for r in sense])[:, None]  # (S, 1, E, N)
            xz = F.linear(self._norm(branch, stream, left, right), branch.in_proj)
            scanned = self._scan(branch, xz, self.halo, first)
            carried += [s[0] for s, r in zip(scanned.last, sense) if not r]
            outputs.append(scanned.y[0])
        self._add(stream, outputs)
        return tuple(carried)

    @torch.no_grad()
    def apply(self, streams: Tensor) -> None:
        """See `BlockKernel.apply`."""
        rows = streams.view(-1, streams.shape[2])
        outputs = []
        for branch in self._branches:
            xz = F.linear(self._norm(branch, rows)[0], branch.in_proj)
            xz = xz.view(*streams.shape[:2], -1)
            outputs.append(self._scan(branch, xz, 0, None).y.flatten(0, 1))
        self._add(rows, outputs)

    def _norm(self, branch: "_Branch", stream: Tensor, *halos: Tensor) -> Tensor:
        """The normed rows between their halos, (1, halo + T + halo, D), in the products' dtype."""
        rows = len(stream) + sum(len(halo) for halo in halos)
        normed = stream.new_empty(rows, stream.shape[1], dtype=self._product)
        own = dict(zip(("left", "right"), (halo.contiguous() for halo in halos)))
        rms_norm(stream, branch.norm_weight, branch.norm_eps, out=normed, **own)
        return normed[None]

    def _scan(self, branch: "_Branch", xz: Tensor, halo: int, first: Tensor | None) -> Scanned:
        """All directions of a branch over in_proj's rows (B, halo + T + halo, 2 E).

        The outputs are where x was.
        """
        d, width = branch.directions, branch.out_proj.shape[1]
        own = scan_inputs(d, xz[:, :, :width], before=halo, after=halo, steps=True)
        x, z = torch.split(xz[:, halo : xz.shape[1] - halo], width, 2)  # (B, T, E) each
        return scan(
            own.c, own.dt, d.A, own.bc, d.D, z, d.dt_bias, first, reverse=d.reverse,
            steps=own.steps, out=x,
        )  # fmt: skip

    def _add(self, stream: Tensor, outputs: list[Tensor]) -> None:
        """Add what the branches give, each (T, E), to the stream (T, D), in place."""
        factor = self._stream_scale
        for y, branch in zip(outputs, self._branches):
            if self._product == stream.dtype:
                stream.addmm_(y, branch.out_proj.T, beta=factor)
            else:
                add_product(stream, y, branch.out_proj, factor=factor)
            factor = 1


@dataclass(frozen=True, slots=True)
class _Branch:
    norm_weight: Tensor
    norm_eps: float
    in_proj: Tensor  # (2 E, D)
    out_proj: Tensor  # (D, E), times the branch's scale
    directions: Directions
    reversed_directions: Directions | None


def _prepare(branch: Branch, device: torch.device, product: torch.dtype) -> _Branch:
    directions = stack(compact_rates(branch.directions)).to(device, product)
    forward = directions.reverse.count(False)
    return _Branch(
        norm_weight=branch.norm_weight.to(device),
        norm_eps=branch.norm_eps,
        in_proj=branch.in_proj.to(device, product),
        out_proj=(branch.out_proj * branch.scale).to(device, product),
        directions=directions,
        reversed_directions=directions.only(slice(forward, None))
        if any(directions.reverse)
        else None,
    )
