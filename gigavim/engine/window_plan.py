"""What it costs to segment windows that are a sequence each, before any work starts."""

import math
from collections.abc import Callable
from pathlib import Path

import torch

from gigavim.engine import memory, plan
from gigavim.engine.memory import format_bytes
from gigavim.engine.sequence import Location
from gigavim.errors import ResourceError
from gigavim.model.segmentation import SegmentationModel
from gigavim_kernels.backends import Precision, prepare_block

BATCH_TOKENS = {"cpu": 1 << 13}
BATCH_TOKENS_ACCELERATOR = 1 << 16
"""Tokens at once: below some 65,000 a GPU waits for its kernels to be launched."""
DECODE_FLOATS_PER_PIXEL = 4
"""Of each class: logits, their probabilities, the averages, and what torch keeps for a moment."""
FEATURES = 6
"""Copies of a head's features, at most, while it decodes."""


def plan_windows(
    count: int,
    grid_hw: tuple[int, int],
    model: SegmentationModel,
    *,
    device: torch.device,
    precision: Precision,
    kept_tokens: int,
    kept_width: int,
    max_memory_bytes: int | None = None,
    max_gpu_memory_bytes: int | None = None,
    scratch_dir: Path | None = None,
    threads: int | None = None,
    other_bytes: int = 0,
) -> plan.Plan:
    """Choose how many windows are segmented at once, and where tokens go that are kept.

    Args:
        count: windows. grid_hw: rows and columns of the patches of one.
        kept_tokens: rows that are kept for embeddings. kept_width: numbers of each; 0: nothing.
        Others: as of `gigavim.engine.plan.plan_sweep`.

    Raises:
        ResourceError: not even one window fits the memory; the message says what would.
    """
    blocks = model.encoder.block_weights()
    tokens = math.prod(grid_hw) + model.encoder.config.class_tokens
    ram_budget = memory.memory_budget(max_memory_bytes)
    ram = max(plan.PROCESS_BYTES + plan.weight_bytes(blocks), memory.resident_bytes())
    ram += other_bytes
    stream = kept_tokens * kept_width * 4
    on_cpu = device.type == "cpu"
    budget = ram_budget if on_cpu else plan.device_budget(device, max_gpu_memory_bytes)
    spent = ram + min(stream, plan.MAPPED_BYTES) if on_cpu else plan.weight_bytes(blocks)

    def needed(batch: int) -> int:
        work = plan.work_bytes(batch * tokens, blocks, batch * tokens, device)
        return spent + work + batch * tokens * 4 * _floats_per_token(model)

    most = max(1, BATCH_TOKENS.get(device.type, BATCH_TOKENS_ACCELERATOR) // tokens)
    batch = _fitting(min(most, max(1, count)), needed, budget)
    if batch is None:
        raise ResourceError(
            f"a window of {tokens:,} tokens needs {format_bytes(needed(1))} of memory, and "
            f"{format_bytes(budget)} is allowed: use a smaller --window-px, or raise "
            f"{'--max-memory' if on_cpu else '--max-gpu-memory'}"
        )
    if on_cpu:
        ram, work = needed(batch) - min(stream, plan.MAPPED_BYTES), 0
    else:
        work = needed(batch)
    location: Location = "ram"
    if ram + stream <= ram_budget:
        ram += stream
    else:
        plan.check_disk(kept_tokens, stream, ram + stream, scratch_dir)
        location, ram = "disk", ram + plan.MAPPED_BYTES
    if ram > ram_budget:
        raise plan.too_little(kept_tokens, ram, "RAM", ram_budget, "memory")
    kernel = prepare_block(blocks[0], device=device, precision=precision, threads=threads)
    streams = torch.zeros(batch, tokens, model.encoder.config.d_model, device=device)
    with torch.no_grad():
        seconds = plan.best_seconds(lambda: kernel.apply(streams), device) * len(blocks)
    return plan.Plan(
        tokens=count * tokens,
        blocks=len(blocks),
        width=kept_width,
        chunk=batch * tokens,
        location=location,
        device=str(device),
        precision=precision,
        ram_bytes=ram,
        device_bytes=work,
        disk_bytes=stream if location == "disk" else 0,
        seconds=seconds * count / batch,
        windows=count,
        kept_bytes=stream,
    )


def _fitting(most: int, needed: Callable[[int], int], budget: int) -> int | None:
    """The largest of most, most / 2, ... windows whose need is within the budget."""
    while most:
        if needed(most) <= budget:
            return most
        most //= 2
    return None


def _floats_per_token(model: SegmentationModel) -> int:
    """Upper bound of what stream, pixels, head and logits take, in floats per token."""
    config, head = model.encoder.config, model.head
    pixels = config.stride_px**2 * (2 * config.in_channels + DECODE_FLOATS_PER_PIXEL * head.classes)
    if config.stride_px != config.patch_px:
        pixels += 2 * config.patch_px**2 * head.classes
    return 5 * config.d_model + FEATURES * (head.feature_width + head.side_width) + pixels
