"""The depthwise convolution with SiLU, 16 channels by 32 tokens at a time."""

from typing import Any

import numpy as np
from numba import types

from gigavim_kernels.cpu.simd import LANES, Rows, Simd, Value, intrinsic, jit

_TILE = 32


@intrinsic
def _convolve(
    typing: Any, x: Any, weight: Any, bias: Any, window: Any, out: Any,
    first: Any, count: Any, row: Any, column: Any,
) -> Any:  # fmt: skip
    """Write silu(bias + sum over j of weight[j] x[token + start + j]) of a tile of tokens.

    weight: (K, E), as many rows as the tuple `window` has entries. Each row of x is loaded once.
    """
    kinds = (x, weight, bias, window, out, first, count, row, column)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Value:
        simd = Simd(context, builder)
        x, weight, bias, out = (Rows(simd, kinds[i], values[i]) for i in (0, 1, 2, 4))
        first, count, row, column = values[5:]
        width = window.count
        weights = [weight.load(simd.index(j), column) for j in range(width)]
        bias_row = bias.load(simd.index(0), column)
        held = [
            simd.variable(x.load(builder.add(first, simd.index(j)), column))
            for j in range(width - 1)
        ]
        newest = builder.add(first, simd.index(width - 1))
        with simd.loop(count) as i:
            rows = [h.get() for h in held] + [x.load(builder.add(newest, i), column)]
            total = bias_row
            for tap, row_of_x in zip(weights, rows):
                total = simd.fma(tap, row_of_x, total)
            for h, row_of_x in zip(held, rows[1:]):
                h.set(row_of_x)
            out.store(builder.add(row, i), column, simd.silu(total))
        return context.get_dummy_value()

    return types.void(*kinds), generate


@jit
def conv_rows(x: Any, weight: Any, bias: Any, window: Any, first: Any, out: Any) -> None:
    """Convolve rows of x into all rows of `out`; row i of `out` sees x[first + i : ... + K].

    Args:
        x: (rows, E) float32 or bfloat16 bits, E a multiple of 16.
        weight: (K, E), in the order of the rows it meets; bias: (1, E), float32.
        window: a tuple of K entries, from which the kernel learns K.
        out: (T, E), of the kind of x.
    """
    for done in range(0, out.shape[0], _TILE):
        count = min(np.int64(_TILE), out.shape[0] - done)
        for column in range(0, out.shape[1], LANES):
            _convolve(x, weight, bias, window, out, first + done, count, np.int64(done), column)
