"""The depthwise convolution with SiLU, 16 channels by 32 tokens at a time."""

from typing import Any

import numpy as np
from numba import types

from gigavim_kernels.cpu.simd import LANES, Rows, Simd, Value, intrinsic, jit

_TILE = 32


@intrinsic
def _convolve(
    typing: Any, x: Any, weight: Any, bias: Any, taps: Any, out: Any,
    first: Any, count: Any, row: Any, column: Any,
) -> Any:  # fmt: skip
    """Write silu(bias + sum over j of weight[j] x[token + taps[j]]) of a tile of tokens."""
    kinds = (x, weight, bias, taps, out, first, count, row, column)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Value:
        simd = Simd(context, builder)
        x, weight, bias, out = (Rows(simd, kinds[i], values[i]) for i in (0, 1, 2, 4))
        first, count, row, column = values[5:]
        places = [builder.extract_value(values[3], j) for j in range(taps.count)]
        weights = [weight.load(simd.index(j), column) for j in range(taps.count)]
        bias_row = bias.load(simd.index(0), column)
        with simd.loop(count) as i:
            token, total = builder.add(first, i), bias_row
            for place, tap in zip(places, weights):
                total = simd.fma(tap, x.load(builder.add(token, place), column), total)
            out.store(builder.add(row, i), column, simd.silu(total))
        return context.get_dummy_value()

    return types.void(*kinds), generate


@jit
def conv_rows(x: Any, weight: Any, bias: Any, taps: Any, first: Any, out: Any) -> None:
    """Convolve the rows of x that begin at `first` into all rows of `out`.

    Args:
        x: (rows, E) float32 or bfloat16 bits, E a multiple of 16; every tap must fall inside.
        weight: (K, E); bias: (1, E), float32.
        taps: K offsets in rows from the current token, see `tap_offsets`.
        out: (T, E), its row 0 belongs to row `first` of x.
    """
    for done in range(0, out.shape[0], _TILE):
        count = min(np.int64(_TILE), out.shape[0] - done)
        for column in range(0, out.shape[1], LANES):
            _convolve(x, weight, bias, taps, out, first + done, count, np.int64(done), column)


def tap_offsets(width: int, *, reverse: bool) -> tuple[int, ...]:
    """Where the taps of a (anti-)causal kernel fall; the last one meets the current token."""
    causal = range(1 - width, 1)
    return tuple(-offset for offset in causal) if reverse else tuple(causal)
