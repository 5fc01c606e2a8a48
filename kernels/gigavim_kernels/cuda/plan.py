"""How a scan is cut into programs."""

from dataclasses import dataclass

import torch

REGISTERS = 168
"""Per thread, at most, in the forward scan: the compiler would take more to load further ahead."""
RESIDENT_WARPS = 12
"""Warps per multiprocessor that fit then: 65,536 registers for threads of `REGISTERS`."""
SHORTEST_CHUNK = 64
"""Below, the states at chunk edges cost more traffic than the tokens."""
LANES = 32
INTERPRETED_MULTIPROCESSORS = 2
"""Enough for several chunks where Triton's interpreter runs the kernels on a CPU."""


@dataclass(frozen=True, slots=True)
class ScanPlan:
    """The launch parameters of a scan."""

    chunk: int
    """Tokens that a program scans one after the other."""
    chunks: int
    block_e: int
    """Channels of a program: lanes of one warp, times channels per lane."""
    blocks_e: int
    unroll: int


def plan_scan(
    batch: int,
    length: int,
    channels: int,
    states: int,
    *,
    multiprocessors: int,
    chunk: int | None = None,
) -> ScanPlan:
    """Choose a plan in which all programs are resident at once and end at the same time.

    A scan of one chunk needs a single pass, so a sequence is cut only if that occupies the chip at
    least twice as well.

    Args:
        batch: independent sequences, directions included where they run side by side.
        chunk: tokens per chunk, chosen by size if absent.
    """
    block_e = LANES * (2 if states <= 16 and channels > LANES else 1)
    blocks_e = -(-channels // block_e)
    chains = max(1, batch * blocks_e)
    wave = multiprocessors * RESIDENT_WARPS
    if chunk is None:
        cuts = wave // chains if wave >= 2 * chains else 1
        chunk = max(-(-length // cuts), SHORTEST_CHUNK if cuts > 1 else 1)
    chunk = max(1, min(chunk, length))
    return ScanPlan(chunk, max(1, -(-length // chunk)), block_e, blocks_e, 4 if chunk >= 4 else 1)


def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors (compute units) of a GPU."""
    if device.type == "cpu":
        return INTERPRETED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
