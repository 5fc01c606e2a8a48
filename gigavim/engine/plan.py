"""What a sweep will cost, and where its stream goes, before any work starts."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir

import torch

from gigavim.engine import memory
from gigavim.engine.memory import format_bytes
from gigavim.engine.sequence import RELEASE_BYTES, Location
from gigavim.engine.sweep import edge_state_bytes
from gigavim.errors import ResourceError
from gigavim_kernels.backends import Precision, backend_name, prepare_block
from gigavim_kernels.block import BlockKernel
from gigavim_kernels.chunked import HIDDEN_BUDGET, HIDDEN_BUDGET_ACCELERATOR
from gigavim_kernels.weights import BlockWeights

PROCESS_BYTES = 520_000_000
"""RSS of Python with torch, numba and the image libraries loaded and warm: 0.51 GB measured."""
MAPPED_BYTES = 2 * RELEASE_BYTES
"""RAM that a mapped stream takes at most."""
CHUNK_FLOATS_PER_CHANNEL = 16
"""Upper bound on the temporaries of a kernel, in floats per token and inner channel."""
SMALLEST_CHUNK = 64
DISK_BYTES_PER_S = 1e9
"""A solid state disk's; for the estimate only."""
PASSES = 3
"""Times a block moves the stream: read right to left, read and written left to right."""
LINK_BYTES_PER_S = 20e9
"""Between page-locked RAM and a GPU; for the estimate only."""
CALIBRATION_TOKENS = 4096
"""Tokens on which a CPU is timed; a GPU is timed on a whole chunk."""
MOST_ELEMENTS = 1 << 31
"""Of a matrix that a product on a GPU makes at once."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a sequence will be swept, and what that takes."""

    tokens: int
    blocks: int
    width: int
    """Numbers kept of a token, those for the head among them."""
    chunk: int
    """Tokens per step."""
    location: Location
    device: str
    precision: Precision
    ram_bytes: int
    """Peak of the whole process: what is there already, other stages, stream, chunk workspace."""
    device_bytes: int
    disk_bytes: int
    seconds: float | None
    """Of the sweep alone; None if not estimated."""
    windows: int = 0
    """Sequences, where each window is one of its own; 0: all tokens are one."""
    kept_bytes: int | None = None
    """Of the tokens that are kept; all of the stream if absent."""

    def describe(self) -> list[str]:
        """Plain English, a line per matter."""
        homes = {"device": f"in the memory of {self.device}", "ram": "in RAM", "disk": "on disk"}
        stream = self.tokens * self.width * 4 if self.kept_bytes is None else self.kept_bytes
        windows = f" of {self.windows:,} windows" if self.windows else ""
        lines = [
            f"{self.tokens:,} tokens{windows} through {self.blocks} blocks, {self.chunk:,} at a "
            f"time, on {self.device} in {self.precision}",
            f"token stream: {format_bytes(stream)}, {homes[self.location]}"
            if stream
            else "token stream: none",
            f"RAM: at most {format_bytes(self.ram_bytes)}",
        ]
        if self.device_bytes:
            lines.append(f"device memory: at most {format_bytes(self.device_bytes)}")
        if self.disk_bytes:
            lines.append(f"scratch disk: {format_bytes(self.disk_bytes)}")
        if self.seconds is not None:
            lines.append(f"time: about {format_seconds(self.seconds)} for the encoder")
        return lines


def plan_sweep(
    length: int,
    blocks: Sequence[BlockWeights],
    *,
    device: torch.device | str,
    precision: Precision,
    max_memory_bytes: int | None = None,
    max_gpu_memory_bytes: int | None = None,
    scratch_dir: Path | None = None,
    chunk: int | None = None,
    threads: int | None = None,
    other_bytes: int = 0,
    side_width: int = 0,
    estimate: bool = True,
) -> Plan:
    """Choose where the stream lives and the chunk length, within the memory allowed.

    The stream goes to the device's memory if it fits, else to RAM, else to a scratch file.

    Args:
        length: tokens of the sequence.
        max_memory_bytes: RAM for the process as a whole, if there is as much; 80 % of what it could
            have if absent.
        max_gpu_memory_bytes: device memory; 80 % of what is free if absent.
        scratch_dir: for the scratch file; the system's temporary folder if absent.
        chunk: tokens per step at most; if absent the kernel's choice, or as many as a GPU holds.
        other_bytes: RAM that other stages hold at the same time (decoded pixels, masks, maps).
        side_width: numbers per token that are kept beside the stream, where it is kept.
        estimate: time one block on a few thousand random tokens to tell how long it will take.

    Raises:
        ResourceError: no arrangement fits; the message says what would.
    """
    device = torch.device(device)
    kernel = prepare_block(blocks[0], device=device, precision=precision, threads=threads)
    width = blocks[0].branches[0].in_proj.shape[1]
    stream = length * (width + side_width) * 4
    ram_budget = memory.memory_budget(max_memory_bytes)
    process = PROCESS_BYTES + weight_bytes(blocks)
    ram = max(process, memory.resident_bytes()) + other_bytes
    on_disk = min(
        stream, MAPPED_BYTES * (2 if side_width else 1)
    )  # RAM taken by the stream at least

    if device.type == "cpu":
        budget = work = 0
        chunk, ram = _fit_chunk(
            length, blocks, chunk or kernel.chunk, device, ram_budget, ram + on_disk
        )
        ram -= on_disk
    else:
        budget = device_budget(device, max_gpu_memory_bytes)
        if chunk is None and backend_name(device) == "triton":
            chunk = _longest_chunk(length, blocks, kernel, device, budget - stream)
        chunk, work = _fit_chunk(length, blocks, chunk or kernel.chunk, device, budget, 0)
    location: Location
    if device.type != "cpu" and work + stream <= budget:
        location, work = "device", work + stream
    elif ram + stream <= ram_budget:
        location, ram = "ram", ram + stream
    else:
        check_disk(length, stream, ram + stream, scratch_dir)
        location, ram = "disk", ram + on_disk
    if ram > ram_budget:
        raise too_little(length, ram, "RAM", ram_budget, "memory")
    seconds = None
    if estimate:
        seconds = estimate_seconds(length, len(blocks), kernel, width, device=device, chunk=chunk)
        seconds += _transfer_seconds(length * width * 4 * PASSES * len(blocks), location, device)
    return Plan(
        tokens=length,
        blocks=len(blocks),
        width=width + side_width,
        chunk=chunk,
        location=location,
        device=str(device),
        precision=precision,
        ram_bytes=ram,
        device_bytes=work,
        disk_bytes=stream if location == "disk" else 0,
        seconds=seconds,
    )


def estimate_seconds(
    length: int, depth: int, kernel: BlockKernel, width: int, *, device: torch.device, chunk: int
) -> float:
    """Time of `depth` blocks like `kernel` over `length` tokens, from a run on random rows.

    Each of the two calls of a block is timed on one chunk of the kernel's choice (at most 4,096
    tokens on a CPU), the best of three after one to warm up. Other work on the machine and slow
    memory are not in it.
    """
    tokens = min(chunk, length, CALIBRATION_TOKENS if device.type == "cpu" else kernel.chunk)
    if tokens == 0:
        return 0.0
    rows = torch.randn(tokens, width, device=device)
    halo = torch.zeros(kernel.halo, width, device=device)
    forward, reverse = kernel.zero_states(reverse=False), kernel.zero_states(reverse=True)
    update = best_seconds(lambda: kernel.update(rows, halo, halo, forward, reverse), device)
    seconds = update * length / tokens
    if reverse and length > chunk:
        edge = best_seconds(lambda: kernel.edge_states(rows, halo, halo, reverse), device)
        seconds += edge * (length - chunk) / tokens
    return seconds * depth


def work_bytes(
    length: int, blocks: Sequence[BlockWeights], chunk: int, device: torch.device
) -> int:
    """Memory of a sweep besides the stream: a chunk's temporaries and the states at chunk edges."""
    tokens = min(chunk, length)
    branch = blocks[0].branches[0]
    d_model, d_inner = branch.out_proj.shape
    floats = tokens * (CHUNK_FLOATS_PER_CHANNEL * d_inner + 4 * d_model)
    if backend_name(device) == "torch":
        hidden = tokens * d_inner * branch.directions[0].states
        floats += 3 * min(hidden, HIDDEN_BUDGET.get(device.type, HIDDEN_BUDGET_ACCELERATOR))
    return floats * 4 + edge_state_bytes(length, blocks, chunk)


def format_seconds(seconds: float) -> str:
    """A duration for people: "45 s", "12 min", "3.2 h"."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _fit_chunk(
    length: int,
    blocks: Sequence[BlockWeights],
    chunk: int,
    device: torch.device,
    budget: int,
    spent: int,
) -> tuple[int, int]:
    """The longest of chunk, chunk / 2, ... that fits the budget, and the memory then used.

    Raises:
        ResourceError: none does. Shorter chunks take less room, but have more edges.
    """
    options: list[tuple[int, int]] = []
    while not options or chunk >= SMALLEST_CHUNK:
        used = spent + work_bytes(length, blocks, chunk, device)
        if used <= budget:
            return chunk, used
        options.append((used, chunk))
        chunk //= 2
    where, option = ("RAM", "memory") if device.type == "cpu" else (str(device), "gpu-memory")
    raise too_little(length, min(options)[0], where, budget, option)


def _longest_chunk(
    length: int,
    blocks: Sequence[BlockWeights],
    kernel: BlockKernel,
    device: torch.device,
    budget: int,
) -> int:
    """The fewest equal pieces whose temporaries fit, not shorter than the kernel's own chunk.

    Each cut has the reverse directions compute the chunk left of it twice: on an H100 a block of
    Vim-Ti takes 15 ns a token in one piece, 24 in chunks of 131,072.
    """
    columns = blocks[0].branches[0].in_proj.shape[0]
    pieces = max(1, -(-length * columns // MOST_ELEMENTS))
    while (chunk := -(-length // pieces)) > kernel.chunk:
        if work_bytes(length, blocks, chunk, device) <= budget:
            return chunk
        pieces += 1
    return kernel.chunk


def too_little(length: int, needed: int, where: str, budget: int, option: str) -> ResourceError:
    """The error where a budget is too small, with the ways out; `option` ends a flag's name."""
    return ResourceError(
        f"{length:,} tokens need at least {format_bytes(needed)} of {where} even with the token "
        f"stream elsewhere, and {format_bytes(budget)} is allowed: raise --max-{option}, use a "
        "smaller model or a larger mpp, or close other programs"
    )


def weight_bytes(blocks: Sequence[BlockWeights]) -> int:
    """The projections, which are nearly all of it."""
    return sum(
        4 * weight.numel()
        for block in blocks
        for branch in block.branches
        for weight in (branch.in_proj, branch.out_proj, *(d.x_proj for d in branch.directions))
    )


def device_budget(device: torch.device, given: int | None) -> int:
    """Bytes of a device that may be used: those given, if they are free, else 80 % of the free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:  # such as Apple's, whose GPU shares the RAM
        free = memory.available_memory()
    return int(memory.DEFAULT_SHARE * free) if given is None else min(given, free)


def check_disk(length: int, stream: int, ram_needed: int, scratch_dir: Path | None) -> None:
    """Raise `ResourceError` where a scratch file of `stream` bytes cannot be."""
    folder = scratch_dir if scratch_dir is not None else Path(gettempdir())
    free = memory.free_disk(folder)
    if memory.is_memory_backed(folder):
        reason = f"{folder} is no disk but RAM"
    elif free < stream:
        reason = f"{folder} has {format_bytes(free)} free"
    else:
        return
    raise ResourceError(
        f"{length:,} tokens need {format_bytes(ram_needed)} of RAM, or {format_bytes(stream)} of "
        f"disk, but {reason}: raise --max-memory, set --scratch-dir to a disk with room, or use a "
        "larger mpp or a tissue mask"
    )


def _transfer_seconds(size: int, location: Location, device: torch.device) -> float:
    """Time to move `size` bytes of the stream in all, where they are not beside the compute."""
    if location == "disk" and size > PASSES * memory.available_memory():
        return size / DISK_BYTES_PER_S
    return size / LINK_BYTES_PER_S if location != "device" and device.type == "cuda" else 0.0


def best_seconds(call: Callable[[], object], device: torch.device) -> float:
    """The least wall time of three calls, after one to warm up."""
    times = []
    for _ in range(4):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])
