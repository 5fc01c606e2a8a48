"""Numbers that stay the same, on the device that computes with them."""

from functools import cache

import torch
from torch import Tensor


@cache
def constant(values: Tensor | tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers on a device, sent there once: sending them waits for all that is queued there."""
    return (values if isinstance(values, Tensor) else torch.tensor(values)).to(device)
