"""How a scan is cut into programs."""

from dataclasses import dataclass

import torch

LANES = 32
REGISTER_FILE = 65_536
"""32-bit registers of a multiprocessor."""
SHORTEST_CHUNK = 64
"""Below, the states at chunk edges cost more traffic than the tokens."""
GOOD_CHUNK = 240
"""Below, starting a chunk and handing its states on cost more than a chip that is not full."""
INTERPRETED_MULTIPROCESSORS = 2
"""Enough for several chunks where Triton's interpreter runs the kernels on a CPU."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """What a family of kernels takes of a multiprocessor; a program is one warp."""

    registers: int
    """Per thread, at most."""
    wide: int
    """Channels per lane, where up to 16 states of each fit the registers."""

    @property
    def resident(self) -> int:
        """Programs that a multiprocessor holds at once."""
        return REGISTER_FILE // (self.registers * LANES)

    def block_e(self, channels: int, states: int) -> int:
        """Channels of a program: as many as leave the fewest lanes without one."""
        width = LANES * (self.wide if states <= 16 else 1)
        while width > LANES and -channels % width >= LANES:
            width //= 2
        return width


FORWARD = Kernel(registers=128, wide=2)
"""The passes with one tile of states."""
FORWARD_TIED = Kernel(registers=128, wide=4)
"""Of one rate per channel, where no states are marked: what held the rates holds more states."""
GRADIENT = Kernel(registers=168, wide=1)
"""The pass with all gradients, which keeps three tiles."""
GRADIENT_TIED = Kernel(registers=160, wide=2)
"""The same of one rate per channel."""


@dataclass(frozen=True, slots=True)
class ScanPlan:
    """The launch parameters of a scan."""

    chunk: int
    """Tokens that a program scans one after the other."""
    chunks: int
    block_e: int
    """Channels of a program."""
    blocks_e: int


def plan_scan(
    batch: int,
    length: int,
    channels: int,
    states: int,
    *,
    multiprocessors: int,
    kernel: Kernel = FORWARD,
    chunk: int | None = None,
    multiple: int = 1,
) -> ScanPlan:
    """Choose a plan in which all programs are resident at once and end at the same time.

    A scan of one chunk needs a single pass, so a sequence is cut only if that occupies the chip at
    least twice as well. Short ones are cut into fewer chunks: three quarters or half of the
    programs that the chip holds, which all of its schedulers share alike.

    Args:
        batch: independent sequences, directions included where they run side by side.
        kernel: what will run.
        chunk: tokens per chunk, chosen by size if absent.
        multiple: the chunk is rounded up to a multiple of this.
    """
    block_e = kernel.block_e(channels, states)
    blocks_e = -(-channels // block_e)
    chains = max(1, batch * blocks_e)
    wave = multiprocessors * kernel.resident
    if chunk is None:
        cuts = wave // chains if wave >= 2 * chains else 1
        for quarters in (3, 2):
            if cuts > 1 and length < cuts * GOOD_CHUNK * (quarters + 1) // 4:
                cuts = max(1, wave * quarters // 4 // chains)
        chunk = max(-(-length // cuts), SHORTEST_CHUNK if cuts > 1 else 1)
    chunk = -(-max(1, min(chunk, length)) // multiple) * multiple
    return ScanPlan(chunk, max(1, -(-length // chunk)), block_e, blocks_e)


def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors (compute units) of a GPU."""
    if device.type == "cpu":
        return INTERPRETED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
