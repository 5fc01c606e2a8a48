"""A Vim block on a CPU: numba kernels around single-threaded matrix products.

A chunk of the stream passes three stages, with a barrier after each. Rows are shared out in tiles
for the norm, the projections and the convolutions; channels are shared out for the scans; rows
again for the output projection. Tiles are cut by the chunk alone and directions are added in
their order, so a result depends on the length of the chunk but not on the number of threads
(`CpuBlock.chunk`, the preferred length, does).
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from gigavim_kernels.block import States, apply_each
from gigavim_kernels.cpu.conv import conv_rows
from gigavim_kernels.cpu.layout import (
    STATE_MULTIPLE,
    CpuBranch,
    CpuDirection,
    padded,
    prepare_branch,
)
from gigavim_kernels.cpu.norm import add_halves, rms_norm, rms_norm_halves
from gigavim_kernels.cpu.scan import scan_channels
from gigavim_kernels.cpu.simd import LANES
from gigavim_kernels.cpu.team import Team, share, team_of
from gigavim_kernels.weights import BlockWeights

TILE_ELEMENTS = 1 << 21
"""Activations (rows x channels) that a thread works on at a time. Caches would like fewer, but each
call from Python holds the interpreter's lock for some microseconds while other threads wait."""
MOST_CHUNK_ROWS = 1 << 15
"""Bounds the buffers where threads are many."""


class CpuBlock:
    """`gigavim_kernels.block.BlockKernel` for the CPU; bf16 products need AMX to be fast."""

    def __init__(
        self,
        block: BlockWeights,
        *,
        precision: Literal["fp32", "bf16"] = "fp32",
        threads: int | None = None,
    ) -> None:
        self._team = team_of(threads)
        self._product = torch.bfloat16 if precision == "bf16" else torch.float32
        with self._team.exclusive():  # threads of torch would spin on for a while
            self._branches = tuple(prepare_branch(b, self._product) for b in block.branches)
        self._stream_scale = block.stream_scale
        widths = [len(d.conv_weight) for b in self._branches for d in b.directions]
        self.halo = max(widths) - 1
        threads = self._team.threads
        self._tile = min(_tile_rows(b.in_proj_x.shape[1], threads) for b in self._branches)
        self.chunk = self._tile * threads

    def zero_states(self, *, reverse: bool) -> States:
        """See `BlockKernel.zero_states`."""
        return tuple(
            torch.zeros(b.channels, d.states)
            for b in self._branches
            for d in b.directions
            if d.reverse == reverse
        )

    @torch.no_grad()
    def edge_states(self, stream: Tensor, left: Tensor, right: Tensor, states: States) -> States:
        """See `BlockKernel.edge_states`."""
        carried: list[Tensor] = []
        given = iter(states)
        with self._team.exclusive():
            rows = (left, stream, right)
            for branch in self._branches:
                directions = tuple(d for d in branch.directions if d.reverse)
                if directions:
                    chunk = _Chunk(self._team, branch, directions, 0, len(stream), self._tile)
                    chunk.project(rows, gated=False)
                    carried += chunk.scan([next(given) for _ in directions], outputs=False)
        return tuple(carried)

    @torch.no_grad()
    def update(
        self, stream: Tensor, left: Tensor, right: Tensor, forward: States, reverse: States
    ) -> States:
        """See `BlockKernel.update`."""
        carried: list[Tensor] = []
        given = {False: iter(forward), True: iter(reverse)}
        with self._team.exclusive():
            rows = (left, stream, right)
            chunks = []
            for number, branch in enumerate(self._branches):
                directions = branch.directions
                chunk = _Chunk(self._team, branch, directions, number, len(stream), self._tile)
                chunk.project(rows, gated=True)
                last = chunk.scan([next(given[d.reverse]) for d in directions], outputs=True)
                carried += [s for s, d in zip(last, directions) if not d.reverse]
                chunks.append(chunk)
            self._add_outputs(stream, chunks)
        return tuple(carried)

    def apply(self, streams: Tensor) -> None:
        """See `BlockKernel.apply`."""
        apply_each(self, streams)

    def _add_outputs(self, stream: Tensor, chunks: list["_Chunk"]) -> None:
        columns = stream.shape[1]
        buffers = [
            self._team.buffer(f"added{w}", self._tile, columns, self._product)
            for w in range(self._team.threads)
        ]

        def work(worker: int) -> None:
            for start, stop in _tiles(len(stream), self._tile, worker, self._team.threads):
                rows = stream[start:stop]
                if self._stream_scale != 1:
                    rows.mul_(self._stream_scale)
                for chunk in chunks:
                    y, weight = chunk.y[start:stop], chunk.branch.out_proj
                    if self._product == torch.float32:
                        torch.addmm(rows, y, weight, out=rows)
                        continue
                    added = buffers[worker][: stop - start]
                    torch.mm(y, weight, out=added)
                    add_halves(rows.numpy(), _bits(added))

        self._team.run(work)


class _Chunk:
    """One branch at work on a chunk of T tokens."""

    def __init__(
        self,
        team: Team,
        branch: CpuBranch,
        directions: tuple[CpuDirection, ...],
        number: int,
        tokens: int,
        tile: int,
    ) -> None:
        self.branch = branch
        self._team, self._directions, self._tokens, self._tile = team, directions, tokens, tile
        product = self._product = branch.in_proj_x.dtype
        self._width = branch.in_proj_x.shape[1]
        rows, width = tokens, self._width
        self.y = team.buffer(f"y{number}", rows, width, product)
        self._z = team.buffer("z", rows, width, product)
        self._c = [team.buffer(f"c{i}", rows, width, product) for i in range(len(directions))]
        self._projected = [
            team.buffer(f"p{i}", rows, d.x_proj.shape[1], torch.float32)
            for i, d in enumerate(directions)
        ]

    def project(self, rows: tuple[Tensor, Tensor, Tensor], *, gated: bool) -> None:
        """Fill the scans' inputs from the stream: left halo, chunk (T, D), right halo."""

        def work(worker: int) -> None:
            for start, stop in _tiles(self._tokens, self._tile, worker, self._team.threads):
                self._project_tile(worker, rows, start, stop, gated)

        self._team.run(work)

    def _project_tile(
        self,
        worker: int,
        rows: tuple[Tensor, Tensor, Tensor],
        start: int,
        stop: int,
        gated: bool,
    ) -> None:
        branch, halo = self.branch, len(rows[0])
        normed = self._normed(worker, rows, start, stop)
        x = self._team.buffer(f"x{worker}", len(normed), self._width, self._product)
        torch.mm(normed, branch.in_proj_x, out=x)
        if gated:
            inner = normed[halo : len(normed) - halo]
            torch.mm(inner, branch.in_proj_z, out=self._z[start:stop])
        for direction, c, projected in zip(self._directions, self._c, self._projected):
            width = len(direction.conv_weight)
            conv_rows(
                _bits(x),
                direction.conv_weight,
                direction.conv_bias,
                tuple(range(width)),
                halo if direction.reverse_conv else halo + 1 - width,
                _bits(c[start:stop]),
            )
            target = projected[start:stop]
            if self._product == torch.float32:
                torch.mm(c[start:stop], direction.x_proj, out=target)
            else:
                halves = self._team.buffer(
                    f"q{worker}", len(target), target.shape[1], self._product
                )
                target.copy_(torch.mm(c[start:stop], direction.x_proj, out=halves))

    def _normed(
        self, worker: int, rows: tuple[Tensor, Tensor, Tensor], start: int, stop: int
    ) -> Tensor:
        """RMSNorm of a tile with its halos, (halo + rows + halo, D), in the products' dtype."""
        halo, branch = len(rows[0]), self.branch
        count, columns = stop - start + 2 * halo, rows[0].shape[1]
        normed = self._team.buffer(f"normed{worker}", count, columns, self._product)
        norm = rms_norm if self._product == torch.float32 else rms_norm_halves
        place = start - halo  # of the tile's first row, counted from that of the chunk
        for source, origin in zip(rows, (-halo, 0, self._tokens)):
            first = max(place, origin)
            last = min(place + count, origin + len(source))
            if first < last:
                norm(
                    source[first - origin : last - origin].numpy(),
                    branch.norm_weight,
                    branch.norm_eps,
                    _bits(normed[first - place : last - place]),
                )
        return normed

    def scan(self, states: list[Tensor], *, outputs: bool) -> list[Tensor]:
        """Scan all directions and return the carried states; y gets the gated sum."""
        hidden = [
            padded(padded(s.T, 1, LANES), 0, STATE_MULTIPLE).numpy() for s in states
        ]  # (N, E)
        groups = self._width // LANES
        y = _bits(self.y) if outputs else None

        def work(worker: int) -> None:
            start, stop = (LANES * g for g in share(groups, worker, self._team.threads))
            last = len(self._directions) - 1
            for i, d in enumerate(self._directions):
                z = _bits(self._z) if outputs and i == last else None
                # y holds the sum of the directions so far: a buffer in float32 would cost some
                # bandwidth, and the products round it to their dtype anyway.
                p, n = self._projected[i].numpy(), len(d.A2)
                scan_channels(
                    _bits(self._c[i]), p[:, 2 * n :], d.dt_weight, d.dt_bias, d.A2,
                    p[:, :n], p[:, n : 2 * n], d.D, z, y if i else None, y,
                    hidden[i], d.reverse, d.state_block, start, stop,
                )  # fmt: skip

        self._team.run(work)
        return [
            torch.from_numpy(h[: d.states, : self.branch.channels].T.copy())
            for h, d in zip(hidden, self._directions)
        ]


def _tile_rows(width: int, threads: int) -> int:
    """Return the rows a thread works on at a time, a power of two."""
    rows = min(TILE_ELEMENTS // width, MOST_CHUNK_ROWS // threads)
    return max(256, 1 << rows.bit_length() - 1)


def _tiles(tokens: int, rows: int, worker: int, workers: int) -> Iterator[tuple[int, int]]:
    """Yield the pieces of a chunk that fall to a worker; their bounds do not depend on workers."""
    for start in range(worker * rows, tokens, workers * rows):
        yield start, min(start + rows, tokens)


def _bits(tensor: Tensor) -> Any:
    """Return a view as numpy: float32, or the bits of bfloat16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.numpy()
