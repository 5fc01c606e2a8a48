"""The selective scan and the causal convolution for training on a CPU: numba, forward and backward.

They compute what `gigavim_kernels.naive` specifies in float32 for N = 16, K = 4, channels a
multiple of 16, a zero initial state, and decay rates in the ratio 1 : 2 : ... : 16 as at
initialisation; about twenty times faster than plain torch, on one thread that does not hold the
interpreter lock. The forward pass keeps the hidden state at every sixteenth token; the backward
pass replays the sixteen tokens of a tile from it, tile by tile from the end.
"""

from typing import Any, cast

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from gigavim_kernels.cpu.simd import LANES
from gigavim_kernels.cpu.training import tiles
from gigavim_kernels.cpu.training.tiles import SCRATCH, STATES, TILE

Table = NDArray[np.int64]
SCAN_TOKENS = tiles.SCAN_FIELDS.index("tokens")
CONV_TOKENS = tiles.CONV_FIELDS.index("tokens")
TAPS = 4


@njit(nogil=True, error_model="numpy")
def _scan_forward(
    table: Table, per_tile: Table, per_group: Table, length: int, groups: int
) -> None:
    for c in range((length + TILE - 1) // TILE):
        for g in range(groups):
            here = table + c * per_tile + g * per_group
            here[SCAN_TOKENS] = min(TILE, length - c * TILE)
            tiles.scan_forward(here.ctypes.data)


@njit(nogil=True, error_model="numpy")
def _scan_backward(
    table: Table,
    per_tile: Table,
    per_group: Table,
    sums: Table,
    sums_per_tile: Table,
    acc: NDArray[np.float32],
    length: int,
    groups: int,
) -> None:
    for c in range((length + TILE - 1) // TILE - 1, -1, -1):
        acc[:] = 0
        tokens = min(TILE, length - c * TILE)
        for g in range(groups):
            here = table + c * per_tile + g * per_group
            here[SCAN_TOKENS] = tokens
            tiles.scan_backward(here.ctypes.data)
        reduced = sums + c * sums_per_tile
        reduced[3] = tokens
        tiles.sum_channels(reduced.ctypes.data)


@njit(nogil=True, error_model="numpy")
def _conv_forward(table: Table, per_group: Table, groups: int) -> None:
    for g in range(groups):
        here = table + g * per_group
        tiles.conv_forward(here.ctypes.data)


@njit(nogil=True, error_model="numpy")
def _conv_backward(table: Table, per_group: Table, groups: int) -> None:
    for g in range(groups):
        here = table + g * per_group
        tiles.conv_backward(here.ctypes.data)


class _Layout:
    """Addresses and strides of one sequence's tensors, seen in scan order."""

    def __init__(self, fields: tuple[str, ...], length: int, *, reverse: bool) -> None:
        self.fields, self.length, self.reverse = fields, length, reverse
        self.table, self.per_tile, self.per_group = np.zeros((3, len(fields)), np.int64)

    def rows(
        self, name: str, tensor: Tensor, *, stride: str = "", per_channel: bool = True
    ) -> None:
        """Enter a (L, ...) tensor whose rows are contiguous."""
        place, ld = self.fields.index(name), tensor.stride(0)
        address = tensor.data_ptr()
        if self.reverse:
            address, ld = address + 4 * (self.length - 1) * ld, -ld
        self.table[place] = address
        self.table[self.fields.index(stride or f"ld_{name}")] = ld
        self.per_tile[place] = 4 * TILE * ld
        self.per_group[place] = 4 * LANES if per_channel else 0

    def plain(
        self, name: str, tensor: Tensor, *, per_tile: int = 0, per_channel: bool = True
    ) -> None:
        """Enter a tensor that does not run along the sequence."""
        place = self.fields.index(name)
        self.table[place] = tensor.data_ptr()
        self.per_tile[place] = 4 * per_tile
        self.per_group[place] = 4 * LANES if per_channel else 0

    def number(self, name: str, value: int) -> None:
        self.table[self.fields.index(name)] = value


def _scan_layout(
    fields: tuple[str, ...], inputs: tuple[Tensor, ...], item: int, saved: Tensor, *, reverse: bool
) -> _Layout:
    x, dt, rate, B, C, D, z, dt_bias = inputs
    layout = _Layout(fields, x.shape[1], reverse=reverse)
    layout.rows("x", x[item])
    layout.rows("dt", dt[item])
    layout.rows("z", z[item])
    layout.rows("B", B[item], stride="ld_bc", per_channel=False)
    layout.rows("C", C[item], stride="ld_bc", per_channel=False)
    layout.plain("A", rate)
    layout.plain("D", D)
    layout.plain("bias", dt_bias)
    layout.plain("saved", saved[item], per_tile=saved.stride(1))
    layout.number("ld_h", x.shape[2])
    return layout


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, rate: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
        dt_bias: Tensor, reverse: bool,
    ) -> Tensor:  # fmt: skip
        batch, length, channels = x.shape
        saved = x.new_empty(batch, -(-length // TILE), STATES, channels)
        y, h, scratch = torch.empty_like(x), x.new_empty(STATES, channels), x.new_empty(SCRATCH)
        inputs = (x, dt, rate.contiguous(), B, C, D, z, dt_bias)
        for item in range(batch):
            layout = _scan_layout(tiles.SCAN_FIELDS, inputs, item, saved, reverse=reverse)
            layout.rows("y", y[item])
            layout.number("ahead", TILE)
            layout.plain("h", h.zero_())
            layout.plain("scratch", scratch, per_channel=False)
            _scan_forward(
                layout.table, layout.per_tile, layout.per_group, length, channels // LANES
            )
        ctx.save_for_backward(*inputs, saved)
        ctx.reverse = reverse
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *saved_inputs, saved = ctx.saved_tensors
        inputs = tuple(saved_inputs)
        x, _, rate, _, _, D, _, dt_bias = inputs
        dy = _row_contiguous(grads[0])
        batch, length, channels = x.shape
        dx, ddt, dz = (x.new_empty(x.shape) for _ in range(3))
        dB, dC = (x.new_empty(batch, length, STATES) for _ in range(2))
        d_rate, d_D, d_bias = (torch.zeros_like(t) for t in (rate, D, dt_bias))
        g, scratch = x.new_empty(STATES, channels), x.new_empty(SCRATCH)
        acc = x.new_empty(TILE * 2 * STATES * LANES)
        for item in range(batch):
            layout = _scan_layout(tiles.GRAD_FIELDS, inputs, item, saved, reverse=ctx.reverse)
            for name, tensor in (("dy", dy), ("dx", dx), ("ddt", ddt), ("dz", dz)):
                layout.rows(name, tensor[item])
            for name, tensor in (("g", g.zero_()), ("dA", d_rate), ("dD", d_D), ("dbias", d_bias)):
                layout.plain(name, tensor)
            layout.plain("scratch", scratch, per_channel=False)
            layout.plain("acc", acc, per_channel=False)
            layout.number("ahead", -TILE)
            sums = _Layout(tiles.SUM_FIELDS, length, reverse=ctx.reverse)
            sums.plain("acc", acc)
            sums.rows("dB", dB[item], stride="ld_dbc")
            sums.rows("dC", dC[item], stride="ld_dbc")
            _scan_backward(
                layout.table, layout.per_tile, layout.per_group, sums.table, sums.per_tile,
                acc.numpy(), length, channels // LANES,
            )  # fmt: skip
        return dx, ddt, d_rate, dB, dC, d_D, dz, d_bias, None


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
        taps = weight.t().contiguous()  # (K, E)
        y = x.new_empty(x.shape)
        for item in range(len(x)):
            layout = _conv_layout(tiles.CONV_FIELDS, x[item], taps, bias, reverse=reverse)
            layout.rows("y", y[item])
            _conv_forward(layout.table, layout.per_group, x.shape[2] // LANES)
        ctx.save_for_backward(x, taps, bias)
        ctx.reverse = reverse
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, taps, bias = ctx.saved_tensors
        dy = _row_contiguous(grads[0])
        batch, length, channels = x.shape
        padded = x.new_empty(batch, length + 2 * (TAPS - 1), channels)
        dx = padded[:, TAPS - 1 : TAPS - 1 + length]
        d_taps, d_bias = torch.zeros_like(taps), torch.zeros_like(bias)
        one_taps, one_bias = torch.empty_like(taps), torch.empty_like(bias)
        for item in range(batch):
            layout = _conv_layout(tiles.CONV_GRAD_FIELDS, x[item], taps, bias, reverse=ctx.reverse)
            layout.rows("dy", dy[item])
            layout.rows("dx", dx[item])
            layout.plain("dw", one_taps)
            layout.plain("dbias", one_bias)
            _conv_backward(layout.table, layout.per_group, channels // LANES)
            d_taps += one_taps
            d_bias += one_bias
        return dx, d_taps.t(), d_bias, None


def _conv_layout(
    fields: tuple[str, ...], x: Tensor, taps: Tensor, bias: Tensor, *, reverse: bool
) -> _Layout:
    layout = _Layout(fields, len(x), reverse=reverse)
    layout.rows("x", x)
    layout.plain("w", taps)
    layout.plain("bias", bias)
    layout.number("ld_w", taps.shape[1])
    layout.number("tokens", len(x))
    layout.number("ahead", TILE)
    return layout


def selective_scan(
    x: Tensor, dt: Tensor, rate: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
    dt_bias: Tensor, *, reverse: bool = False,
) -> Tensor:  # fmt: skip
    """Return y of `naive.selective_scan`, with gradients for all its inputs.

    Args:
        x, dt, z: (B, L, E) float32, last dimension contiguous, E a multiple of 16.
        rate: (E,), negative: A of the first state; the n-th state's is n times that.
        B, C: (B, L, 16) of equal strides. D, dt_bias: (E,).
        reverse: scan from the last token to the first.
    """
    if B.shape[2] != STATES or x.shape[2] % LANES or B.stride() != C.stride():
        raise ValueError(f"needs {STATES} states, channels in {LANES}s, B and C of equal strides")
    return cast(Tensor, _Scan.apply(x, dt, rate, B, C, D, z, dt_bias, reverse))  # type: ignore[no-untyped-call]


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, *, reverse: bool = False) -> Tensor:
    """`naive.causal_conv` without a halo, with gradients: (B, L, E) float32, weight (E, 4)."""
    if weight.shape[1] != TAPS or x.shape[2] % LANES:
        raise ValueError(f"needs {TAPS} taps and channels in {LANES}s")
    return cast(Tensor, _Conv.apply(x, weight, bias, reverse))  # type: ignore[no-untyped-call]


def _row_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
