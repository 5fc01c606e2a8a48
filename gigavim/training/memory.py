"""How a batch is worked through so that the memory allowed is kept.

A batch takes its canvases, the stream before every layer, what the head and the loss keep for
their gradients, and what one layer needs at work. In order of what they cost in time, the ways to
need less are: layers that are computed once more in the backward pass (GPUs always do); canvases
one after the other, their gradients added up; layers gone through a chunk of the sequence at a
time; a head that is computed once more, strip by strip; and groups of layers of which only the
first stream is kept, which costs a forward pass more. The quickest way that fits is taken.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gigavim.engine.memory import format_bytes
from gigavim.errors import ResourceError
from gigavim.model.segmentation import SegmentationModel
from gigavim.training.encode import layer_kernel
from gigavim.training.losses import segmentation_loss
from gigavim.training.recipe import Recipe

if TYPE_CHECKING:
    from gigavim.training.atlas import Atlas

log = logging.getLogger(__name__)

CONTEXT_BYTES = 600_000_000
"""A GPU's memory that the driver and compiled kernels take beside torch's own."""
STATES = 8
"""Copies of the weights: trained, averaged, best and validated, gradients twice, AdamW's two."""
WORK_BYTES = 72
"""Of a layer at work, gradients included, per token gone through at once and channel (E of them).

A count of the tensors alive at once on GPUs (tests/kernels/cuda/test_triton_branch.py): 23 forward,
59 to 70 for the gradients, 16 of them states at marks.
"""
SHORTEST_CHUNK = 8192
STRIP_ROWS = 16
"""Rows of tokens that a head decodes at once, where it is computed once more."""
SLACK = 1.25
"""What backward passes hold beside what was saved for them, and what allocation wastes."""
STREAMS_AT_WORK = 4
"""Streams beside those kept: the result, its gradient, and copies on the way."""
GROUPS = (2, 3, 4, 6)
GROWTH = 1.3
RECORDED_SHARE = 4
"""Only batches of less than a 4th of the memory become CUDA graphs, whose memory is not shared."""


@dataclass(frozen=True, slots=True)
class Split:
    """How a batch is worked through."""

    parts: int = 1
    """Canvases are shared out to so many batches, one after the other."""
    recompute: bool = False
    """Keep only the stream before each layer."""
    chunk: int | None = None
    """Tokens of a layer at once; None: the kernel's own choice."""
    strip_rows: int | None = None
    """Rows of tokens that the head decodes at once; None: all, and nothing is computed again."""
    group: int = 1
    """Layers of which only the first stream is kept."""


@dataclass
class Budget:
    """The memory of a training, and how batches are split to keep it.

    Args:
        limit: bytes of the device that may be used; None: as much as there is, nothing is split.
        taken: bytes that data and weights take.
    """

    model: SegmentationModel
    recipe: Recipe
    device: torch.device
    limit: int | None = None
    taken: int = 0
    factor: float = 1.0
    """On what a batch is thought to take; grows where it was too little."""

    @classmethod
    def of(
        cls, model: SegmentationModel, recipe: Recipe, atlas: "Atlas", limit: int | None
    ) -> "Budget":
        """The budget of a training on the device of its pictures.

        Raises:
            ResourceError: the largest canvases of the recipe cannot be had within the limit.
        """
        taken = STATES * sum(p.nbytes for p in model.parameters())
        taken += atlas.nbytes + (CONTEXT_BYTES if atlas.device.type == "cuda" else 0)
        budget = cls(model, recipe, atlas.device, limit, taken)
        if limit is not None:
            budget.check()
            if atlas.device.type == "cuda":  # a guard, should the estimate be wrong
                total = torch.cuda.get_device_properties(atlas.device).total_memory
                share = min(1.0, max(1, limit - CONTEXT_BYTES) / total)
                torch.cuda.set_per_process_memory_fraction(share, atlas.device.index)
        return budget

    def check(self) -> None:
        """Raise `ResourceError` where the largest canvases do not fit; say how they do."""
        side = self._tokens(1)
        largest = 1 << (self.recipe.schedule.largest_blocks.bit_length() - 1)
        count = self._count(largest)
        split = self.split(largest * side, count)
        peak = self.taken + self.needed(largest * side, count, split)
        log.info(
            "%s of device memory: %d x %s tokens a batch take about %s of it (%s)",
            *(format_bytes(self.limit or 0), count, f"{largest * side:,}"),
            *(format_bytes(peak), _in_words(split)),
        )

    def split(self, tokens: int, count: int) -> Split:
        """How `count` canvases of so many tokens are worked through.

        Raises:
            ResourceError: not even one fits; the message says what would.
        """
        first = Split(recompute=count * tokens > self.recipe.schedule.recompute_tokens)
        if self.limit is None:
            return first
        for split in self._options(first, tokens, count):
            if self.taken + self.needed(tokens, count, split) <= self.limit:
                return split
        raise self._refusal(tokens)

    def tighten(self) -> None:
        """Note that a batch took more than was reckoned with, so that the next takes less."""
        self.factor *= GROWTH
        log.warning("the memory did not suffice: batches are split further from now on")

    def records(self, tokens: int, count: int) -> bool:
        """Whether a batch may become a CUDA graph."""
        if self.limit is None:
            return True
        needed = self.needed(tokens, count, Split())
        return needed * RECORDED_SHARE <= self.limit - self.taken

    def needed(self, tokens: int, count: int, split: Split) -> int:
        """Bytes that a batch takes at its peak, about."""
        config, head = self.model.encoder.config, self.model.head
        batch = -(-count // split.parts) * tokens
        kept = -(-config.depth // split.group) + (split.group if split.group > 1 else 0)
        working = config.expand * config.d_model * WORK_BYTES
        width = min(tokens, self.chunk(split, batch) if self._recomputes else tokens) / tokens
        floats = (kept + STREAMS_AT_WORK) * config.d_model + 2 * head.side_width
        floats += 2 * head.feature_width
        pixels = config.stride_px**2 * (2 * config.in_channels * 4 + 2 * 8)
        again = (
            1.0 if split.strip_rows is None else STRIP_ROWS * 3 / max(tokens**0.5, STRIP_ROWS * 3)
        )
        layers = 1 if self._recomputes or split.recompute else config.depth
        # What head and loss keep is gone when the gradients of the layers are taken.
        ends = SLACK * (self.head_bytes * again + self.loss_bytes)
        if layers == 1:
            per_token = 4 * floats + max(ends, working * width)
        else:
            per_token = 4 * floats + ends + working * layers
        drawn = (batch + count * tokens) * pixels
        return int(self.factor * (batch * per_token + drawn))

    def chunk(self, split: Split, batch: int) -> int:
        """Tokens of a layer at work at once, of a batch of so many."""
        if split.chunk is not None:
            return split.chunk
        from gigavim_kernels.cuda.branch import CHUNK_ELEMENTS

        config = self.model.encoder.config
        return max(1, min(batch, CHUNK_ELEMENTS // (config.expand * config.d_model)))

    @cached_property
    def head_bytes(self) -> float:
        """What a head keeps for its gradients, per token: taken from a run on one block."""
        return self._kept()[0]

    @cached_property
    def loss_bytes(self) -> float:
        """What the loss keeps, per token."""
        return self._kept()[1]

    @property
    def validation_chunk(self) -> int | None:
        """Tokens of a layer at once where nothing is learnt; None: the kernel's own choice."""
        if self.limit is None or not self._recomputes:
            return None
        config = self.model.encoder.config
        working = config.expand * config.d_model * WORK_BYTES
        fitting = (self.limit - self.taken) // 4 // working
        return max(SHORTEST_CHUNK, min(fitting, self.chunk(Split(), fitting)))

    @property
    def _recomputes(self) -> bool:
        """Whether the kernels keep nothing but streams, and can go through a layer in chunks."""
        config = self.model.encoder.config
        asked = self.recipe.model.tied_rates
        return layer_kernel(self.device, config.d_state, config.d_model, asked).recomputes

    def _tokens(self, blocks: int) -> int:
        return blocks * (self.recipe.model.scan_order.block or 16) ** 2

    def _count(self, blocks: int) -> int:
        """Canvases of so many blocks in a batch."""
        return max(1, self.recipe.schedule.batch_blocks // blocks)

    def _kept(self) -> tuple[float, float]:
        side = self.recipe.model.scan_order.block or 16
        head, config = self.model.head, self.model.encoder.config
        grid = torch.zeros(1, side, side, head.feature_width, device=self.device)
        with (
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"),
            saved_bytes() as in_head,
        ):
            logits = self.model.logits(grid.requires_grad_())
        labels = torch.zeros(1, *logits.shape[2:], dtype=torch.int64, device=self.device)
        weights = torch.ones(logits.shape[1], device=self.device)
        dice = list(range(len(self.recipe.loss.dice_classes)))
        with saved_bytes() as in_loss:
            segmentation_loss(logits.detach().float().requires_grad_(), labels, weights, dice)
        logit_bytes = 2 * head.classes * config.patch_px**2 * 4
        return in_head.total / side**2, in_loss.total / side**2 + logit_bytes

    def _options(self, first: Split, tokens: int, count: int) -> Iterator[Split]:
        """Ways to work through a batch, quicker ones first."""
        yield first
        if not self._recomputes and not first.recompute:
            first = replace(first, recompute=True)
            yield first
        parts = 1
        while parts < count:
            parts = min(2 * parts, count)
            yield replace(first, parts=parts)
        chunks: list[int | None] = [None]
        if self._recomputes:
            chunk = self.chunk(first, tokens) // 2
            while chunk >= SHORTEST_CHUNK:
                chunks.append(chunk)
                chunk //= 2
        heads = [(None, 1), (STRIP_ROWS, 1), *((STRIP_ROWS, group) for group in GROUPS)]
        ways = [
            (
                _cost(place, group, strip_rows is not None),
                replace(first, parts=count, chunk=chunk, strip_rows=strip_rows, group=group),
            )
            for place, chunk in enumerate(chunks)
            for strip_rows, group in heads
        ]
        yield from (way for _, way in sorted(ways, key=lambda item: item[0]))

    def _least(self, blocks: int) -> int:
        """Bytes that a batch of canvases of so many blocks takes in the thriftiest way, in all."""
        tokens, count = self._tokens(blocks), self._count(blocks)
        ways = self._options(Split(), tokens, count)
        return self.taken + min(self.needed(tokens, count, way) for way in ways)

    def _refusal(self, tokens: int) -> ResourceError:
        limit, blocks = self.limit or 0, max(1, tokens // self._tokens(1))
        smaller = [1 << k for k in range(blocks.bit_length()) if 1 << k < blocks]
        fitting = [size for size in smaller if self._least(size) <= limit]
        advice = (
            f"schedule.largest_blocks = {fitting[-1]} would fit"
            if fitting
            else f"lower schedule.batch_blocks ({self.recipe.schedule.batch_blocks}), take fewer "
            "pictures"
        )
        return ResourceError(
            f"a batch of canvases of {tokens:,} tokens needs {format_bytes(self._least(blocks))} "
            f"to train on, {format_bytes(self.taken)} of it for pictures and weights, and "
            f"{format_bytes(limit)} is allowed: {advice}, or raise --max-gpu-memory"
        )


class saved_bytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts what is kept for gradients within it, tensors that share memory once."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}
        super().__init__(self._note, lambda tensor: tensor)

    def __enter__(self) -> "saved_bytes":  # type: ignore[override]
        super().__enter__()
        return self

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self._seen.values())

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._seen[storage.data_ptr()] = storage.nbytes()
        return tensor


def _cost(halvings: int, group: int, strips: bool) -> float:
    """About what share of a step's time a way costs more; only the order matters."""
    return 0.1 * halvings + 0.1 * strips + (0.3 + 0.01 * group) * (group > 1)


def _in_words(split: Split) -> str:
    words: Sequence[str] = [
        f"in {split.parts} parts" if split.parts > 1 else "",
        f"layers in chunks of {split.chunk:,}" if split.chunk else "",
        "the head computed twice" if split.strip_rows else "",
        f"layers computed twice in groups of {split.group}" if split.group > 1 else "",
    ]
    return ", ".join(word for word in words if word) or "in one piece"
