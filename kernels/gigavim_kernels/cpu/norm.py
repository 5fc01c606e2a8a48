"""Row-wise helpers around the matrix products; numba's own vectorisation does well here."""

import functools
from typing import Any

import numpy as np

from gigavim_kernels.cpu.simd import jit

_NAN_HALF = np.uint16(0x7FC0)
_sums_in_any_order = functools.partial(jit, fastmath=("reassoc", "contract", "nsz"))


@_sums_in_any_order  # lets the sum be vectorised
def rms_norm(rows: Any, weight: Any, eps: Any, out: Any) -> None:
    """Write rows / sqrt(mean(rows^2) + eps) * weight; rows, out (T, D), weight (D,), float32."""
    width = rows.shape[1]
    for t in range(rows.shape[0]):
        total = np.float32(0)
        for i in range(width):
            total += rows[t, i] * rows[t, i]
        scale = np.float32(1) / np.sqrt(total / np.float32(width) + eps)
        for i in range(width):
            out[t, i] = rows[t, i] * scale * weight[i]


@_sums_in_any_order
def rms_norm_halves(rows: Any, weight: Any, eps: Any, out: Any) -> None:
    """Write what `rms_norm` writes as bfloat16 bits, rounded to the nearest, ties to even."""
    width = rows.shape[1]
    normed = np.empty(width, np.float32)
    bits = normed.view(np.uint32)
    for t in range(rows.shape[0]):
        total = np.float32(0)
        for i in range(width):
            total += rows[t, i] * rows[t, i]
        scale = np.float32(1) / np.sqrt(total / np.float32(width) + eps)
        for i in range(width):
            normed[i] = rows[t, i] * scale * weight[i]
        if total != total:
            out[t] = _NAN_HALF  # rounding could carry a NaN's bits over into a number
            continue
        for i in range(width):
            odd = (bits[i] >> np.uint32(16)) & np.uint32(1)
            out[t, i] = (bits[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16)


@jit
def add_halves(rows: Any, halves: Any) -> None:
    """Add bfloat16 bits (T, D) to float32 rows in place."""
    wide = np.empty(rows.shape[1], np.uint32)
    values = wide.view(np.float32)
    for t in range(rows.shape[0]):
        for i in range(rows.shape[1]):
            wide[i] = np.uint32(halves[t, i]) << np.uint32(16)
        for i in range(rows.shape[1]):
            rows[t, i] += values[i]
