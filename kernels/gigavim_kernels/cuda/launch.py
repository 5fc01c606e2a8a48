"""What every kernel launch needs."""

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

SIZES = ("length", "batch", "chunk", "chunks", "before", "after", "rows", "reverse")
"""Integers that vary from call to call: a kernel is not compiled anew for their values.

Strides are not among them: where they are multiples of 16, several numbers are loaded at once.
"""


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's GPU the current one: Triton launches there."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def options(warps: int, *, registers: int | None = None) -> dict[str, Any]:
    """Launch options: products and sums may fuse; registers per thread, where that can be said."""
    found: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": True}
    if registers is not None and torch.version.hip is None:
        found["maxnreg"] = registers
    return found


def reverse_bits(reverse: Sequence[bool]) -> int:
    """Bit s is set if direction s is reversed."""
    return sum(1 << s for s, r in enumerate(reverse) if r)
