"""The training loop: sequences of random length, two workers on a CPU, averaged weights."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from gigavim.errors import ModelError
from gigavim.model.heads import SegmentationModel
from gigavim.model.vim import grid_cells
from gigavim.tokens.order import ScanOrder
from gigavim.training.encode import encode
from gigavim.training.losses import segmentation_loss

log = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]
"""Normalised images (B, 3, H, W) float32 and labels (B, H, W) int64."""
Draw = Callable[[Sequence[tuple[int, int]], Generator], Batch]
"""Makes a batch of canvases, one per (rows, cols) of blocks; all have one size."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast to learn."""

    steps: int
    workers: int = 2
    """Batches per step, each on a thread of its own; their gradients are averaged."""
    blocks: int = 8
    """Blocks of tokens per batch, except where one canvas is larger."""
    largest_blocks: int = 64
    """Blocks of the largest canvas, drawn late in the training."""
    peak_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    average: float = 0.997
    """Decay of the moving average of the weights, which is what is kept."""
    half_depth: float = 0.33
    """The part of the training that uses every second layer only; the others join silently."""
    class_weights: tuple[float, ...] = (1.0, 0.8, 1.5)
    dice_classes: tuple[int, ...] = (0, 2)
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, then half a cosine to 1 % of the peak."""
        if step < self.warmup:
            return self.peak_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.peak_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))

    def canvas_blocks(self, step: int, generator: Generator) -> int:
        """Blocks of the canvases of a batch: powers of two, longer ones as the training goes on."""
        done = step / self.steps
        longest = max(1, self.largest_blocks if done > 0.5 else min(16, self.largest_blocks))
        sizes = [2**k for k in range(longest.bit_length())]
        # A canvas of b blocks costs max(b, blocks): draw the costly ones less often.
        weights = torch.tensor([min(1.0, (self.blocks / 2) / size) for size in sizes])
        return int(sizes[int(torch.multinomial(weights, 1, generator=generator))])


@dataclass
class Progress:
    """What a training run carries from step to step."""

    step: int
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor]
    """The moving average of the weights."""


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Part the parameters: matrices of linear maps decay; A, D, convolutions, norms, biases and
    positions do not."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        free = parameter.ndim < 2 or any(part in name for part in ("A_log", "A_b_log", "conv1d"))
        (plain if free or "pos_embed" in name or "cls_token" in name else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def start(model: nn.Module, schedule: Schedule) -> Progress:
    """Begin a run."""
    groups = decay_groups(model, schedule.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=schedule.peak_rate, betas=(0.9, 0.98))
    return Progress(0, optimizer, {k: v.clone() for k, v in model.state_dict().items()})


def save(path: Path, model: nn.Module, progress: Progress) -> None:
    """Write a checkpoint that `resume` reads; whole or not at all."""
    part = path.with_suffix(".part")
    state = {
        "model": model.state_dict(),
        "optimizer": progress.optimizer.state_dict(),
        "average": progress.average,
        "step": progress.step,
    }
    torch.save(state, part)
    part.replace(path)


def resume(path: Path, model: nn.Module, schedule: Schedule) -> Progress:
    """Go on from a checkpoint."""
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    progress = start(model, schedule)
    progress.optimizer.load_state_dict(state["optimizer"])
    progress.average, progress.step = state["average"], state["step"]
    return progress


def patch_labels(labels: Tensor, patch_px: int, order: ScanOrder | None) -> Tensor:
    """Arrange labels (B, H, W) as the head answers: (B * tokens, patch_px ** 2) in scan order."""
    batch, height, width = labels.shape
    rows, cols = height // patch_px, width // patch_px
    grid = labels.view(batch, rows, patch_px, cols, patch_px).transpose(2, 3).flatten(3)
    cells = grid_cells(rows, cols, order)
    return grid.flatten(1, 2)[:, cells].flatten(0, 1)


def loss_of(
    model: SegmentationModel,
    batch: Batch,
    order: ScanOrder | None,
    schedule: Schedule,
    *,
    every: int = 1,
) -> Tensor:
    """The loss of a batch of canvases of whole patches."""
    images, labels = batch
    encoded = encode(model.encoder, model.encoder.tokens(images, order=order), every=every)
    logits = model.head(encoded).flatten(0, 1).flatten(2)  # (B * tokens, classes, P * P)
    target = patch_labels(labels, model.head.patch_px, order)
    weights = torch.tensor(schedule.class_weights)
    return segmentation_loss(logits, target, weights, schedule.dice_classes)


def train(
    model: SegmentationModel,
    order: ScanOrder,
    draw: Draw,
    schedule: Schedule,
    *,
    progress: Progress | None = None,
    on_step: Callable[[Progress, float], None] | None = None,
) -> Progress:
    """Train a model in place; the averaged weights are in the progress that is returned.

    The same seed, schedule and draw give the same weights on one machine. Raises `ModelError`
    naming the parameters where a gradient is not finite.
    """
    progress = progress or start(model, schedule)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def work(worker: int) -> tuple[float, int, tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(
            (schedule.seed * 1_000_003 + progress.step) * 64 + worker
        )
        blocks = schedule.canvas_blocks(progress.step, generator)
        shape = canvas_shape(blocks, generator)
        batch = draw([shape] * max(1, schedule.blocks // blocks), generator)
        every = 2 if progress.step < schedule.half_depth * schedule.steps else 1
        loss = loss_of(model, batch, order, schedule, every=every)
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        return loss.item(), batch[1].numel(), grads

    def prepare_thread() -> None:
        torch.set_flush_denormal(True)  # powers of small decays: denormals would cost a factor of 5

    with ThreadPoolExecutor(schedule.workers, initializer=prepare_thread) as pool:
        while progress.step < schedule.steps:
            results = list(pool.map(work, range(schedule.workers)))
            loss = _apply(progress, schedule, names, parameters, results)
            _follow(progress, model, schedule)
            progress.step += 1
            if on_step is not None:
                on_step(progress, loss)
    return progress


def canvas_shape(blocks: int, generator: Generator) -> tuple[int, int]:
    """Draw (rows, cols) with rows * cols = blocks, a power of two, not longer than 1 : 4."""
    power = blocks.bit_length() - 1
    options = [k for k in range(power + 1) if abs(power - 2 * k) <= 2]
    rows = 2 ** options[int(torch.randint(len(options), (), generator=generator))]
    return rows, blocks // rows


def _apply(
    progress: Progress,
    schedule: Schedule,
    names: Sequence[str],
    parameters: Sequence[nn.Parameter],
    results: Sequence[tuple[float, int, tuple[Tensor, ...]]],
) -> float:
    """Average the workers' gradients by pixels, clip them and step; returns the mean loss."""
    total = sum(pixels for _, pixels, _ in results)
    for place, parameter in enumerate(parameters):
        parameter.grad = sum(
            (grads[place] * (pixels / total) for _, pixels, grads in results),
            start=torch.zeros_like(parameter),
        )
    norm = nn.utils.clip_grad_norm_(parameters, schedule.clip_norm)
    if not torch.isfinite(norm):
        bad = [
            name
            for name, p in zip(names, parameters, strict=True)
            if p.grad is None or not torch.isfinite(p.grad).all()
        ]
        raise ModelError(
            f"step {progress.step}: gradients are not finite in {', '.join(bad[:5])}: "
            f"go on from the last checkpoint with a lower learning rate"
        )
    for group in progress.optimizer.param_groups:
        group["lr"] = schedule.rate(progress.step)
    progress.optimizer.step()
    return sum(loss * pixels for loss, pixels, _ in results) / total


def _follow(progress: Progress, model: nn.Module, schedule: Schedule) -> None:
    decay = min(schedule.average, (1 + progress.step) / (10 + progress.step))
    with torch.no_grad():
        for name, value in model.state_dict().items():
            progress.average[name].lerp_(value, 1 - decay)


@torch.no_grad()
def init_patch_embedding(model: SegmentationModel, images: Tensor) -> None:
    """Let the patch embedding start as the principal components of patches, at similar scales.

    Args:
        images: (B, 3, H, W), normalised as in training.
    """
    projection = model.encoder.patch_embed.proj
    size, width = projection.kernel_size[0], projection.out_channels
    patches = images.unfold(2, size, size).unfold(3, size, size)  # (B, 3, rows, cols, P, P)
    flat = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * size * size)
    covariance = torch.cov(flat.T.double())
    variance, vectors = torch.linalg.eigh(covariance)
    variance, vectors = variance.flip(0)[:width], vectors.flip(1)[:, :width]
    scale = 1 / (variance.clamp(min=0).sqrt() + 0.05 * variance[0].sqrt())
    weight = (vectors * scale).T.float()  # (D, 3 * P * P)
    projection.weight.copy_(weight.view_as(projection.weight))
    assert projection.bias is not None
    projection.bias.copy_(-(weight @ flat.mean(0)))


class Clock:
    """Steps and minutes so far, for the log."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    @property
    def minutes(self) -> float:
        """Minutes since the start."""
        return (time.monotonic() - self.started) / 60
