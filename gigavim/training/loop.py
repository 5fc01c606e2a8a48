"""The training loop: canvases of growing length, averaged weights, checkpoints that continue."""

import contextlib
import logging
import math
import textwrap
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor, nn

from gigavim.errors import ModelError, OutputError, ResourceError, SettingsError
from gigavim.model.segmentation import SegmentationModel, SideSum
from gigavim.training.constants import constant
from gigavim.training.encode import decode, encode, random_origin
from gigavim.training.graphs import Batch, Gradients, Objective
from gigavim.training.losses import segmentation_loss
from gigavim.training.memory import Budget
from gigavim.training.ranks import Ranks
from gigavim.training.recipe import Recipe
from gigavim.training.schedule import Pace, Schedule, canvas_shape

if TYPE_CHECKING:  # needs kornia, which those who only score do not
    from gigavim.training.canvas import Canvases

log = logging.getLogger(__name__)

PLAN_EVERY = 60
"""Steps between two plans of a training that has minutes, not steps."""
UNPLANNED = 1_000_000_000
"""Steps of a training that has minutes, until its speed is known."""
Names = tuple[str, ...]
Forward = Callable[[Tensor, int, Generator | None], Tensor]
"""Logits (B, classes, H, W) of normalised images (B, 3, H, W), of every n-th layer only; the
generator draws what is left out at random."""


@dataclass
class Progress:
    """What a training carries from step to step, and what a checkpoint holds."""

    step: int
    steps: int
    """Planned."""
    seconds: float
    """Spent in training so far."""
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor]
    """The moving average of the weights."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """The average with the best validation score so far."""
    best_score: float = float("-inf")
    best_step: int = 0
    stale: int = 0
    """Validations since the best."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What of the recipe must not change on the way, see `origin`."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """What one worker is to learn from in one step."""

    batch: Batch
    blocks: int
    """Of each canvas."""
    generator: Generator
    """For what else is random in the step."""


@dataclass(frozen=True, slots=True)
class Worked:
    """What one worker found for one batch."""

    loss: Tensor
    blocks: int
    """Of each canvas."""
    pixels: int
    tokens: int
    grads: tuple[Tensor, ...]


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


def start(model: nn.Module, recipe: Recipe) -> Progress:
    """Begin a training."""
    groups = decay_groups(model, recipe.schedule.weight_decay)
    fused = next(model.parameters()).device.type == "cuda"
    optimizer = torch.optim.AdamW(
        groups, lr=recipe.schedule.peak_rate, betas=(0.9, 0.98), fused=fused
    )
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    return Progress(0, recipe.schedule.steps, 0.0, optimizer, average, origin=origin(recipe))


def origin(recipe: Recipe) -> dict[str, Any]:
    """What a training may not change on the way, as plain values by the recipe's keys.

    With other groups held out, it would be scored on what it has learnt from; with other classes,
    colours or sizes, weights would mean something else.
    """
    model, split = recipe.model, recipe.split
    return {
        "split.validation_groups": sorted(split.validation_groups),
        "classes": list(recipe.class_names),
        "loss.monitor": recipe.loss.monitor,
        "model.order": model.order,
        "model.mpp": float(model.mpp),
        "model.mean": [float(value) for value in model.mean],
        "model.std": [float(value) for value in model.std],
    }


def save(path: Path, model: nn.Module, progress: Progress) -> None:
    """Write a checkpoint that `resume` reads; whole or not at all.

    Raises `OutputError` where it cannot be written.
    """
    part = path.with_suffix(".part")
    state = {k: v for k, v in vars(progress).items() if k != "optimizer"}
    state["model"], state["optimizer"] = model.state_dict(), progress.optimizer.state_dict()
    try:
        torch.save(state, part)
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch tells a full disk as the latter
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise OutputError(f"{path}: the checkpoint cannot be written ({reason})") from error


def resume(path: Path, model: nn.Module, recipe: Recipe) -> Progress:
    """Go on from a checkpoint; raises `SettingsError` where it is of another recipe."""
    device = next(model.parameters()).device
    try:
        state = torch.load(path, weights_only=True, map_location=device)
        model.load_state_dict(state.pop("model"))
        progress = start(model, recipe)
        progress.optimizer.load_state_dict(state.pop("optimizer"))
        before = state.pop("origin", progress.origin)
        changed = [key for key, value in progress.origin.items() if before.get(key) != value]
    except Exception as error:  # a damaged file surfaces as almost any type
        lines = str(error).splitlines()  # torch says on the second what does not fit
        reason = lines[min(1, len(lines) - 1)] if lines else type(error).__name__
        reason = textwrap.shorten(reason, 160)
        if not zipfile.is_zipfile(path):
            reason = "no whole checkpoint at all"
        raise SettingsError(
            f"{path}: not a checkpoint of this recipe ({reason}); another --output begins anew"
        ) from error
    if changed:
        key = changed[0]
        raise SettingsError(
            f"{path}: not a checkpoint of this recipe ({key} was {before.get(key)}, is now "
            f"{progress.origin[key]}); another --output begins anew"
        )
    for name, value in state.items():
        setattr(progress, name, value)
    return progress


def plan_anew(progress: Progress, recipe: Recipe) -> None:
    """Take the length of a training from its recipe, which may ask for more than when it began."""
    minutes = recipe.schedule.max_minutes
    if minutes is None:
        if progress.steps != recipe.schedule.steps:
            log.info("%d steps are planned, not %d", recipe.schedule.steps, progress.steps)
        progress.steps = recipe.schedule.steps
    elif progress.step >= progress.steps and progress.seconds < 0.9 * 60 * minutes:
        progress.steps = UNPLANNED


def vim_forward(model: SegmentationModel, recipe: Recipe, budget: Budget | None = None) -> Forward:
    """How a Vim of a recipe is seen in training, within a budget of memory."""
    config, schedule, order = model.encoder.config, recipe.schedule, recipe.model.scan_order
    planned = budget or Budget(model, recipe, model.encoder.norm_f.weight.device)

    def forward(images: Tensor, every: int, generator: Generator | None) -> Tensor:
        rows, cols = model.encoder.patch_embed.grid_hw(*images.shape[2:])
        split = planned.split(rows * cols, len(images))
        origin = random_origin(config, images.device, generator)
        tokens = model.encoder.tokens(images, order=order, origin_um=origin)
        taps = SideSum(model)
        encoded = encode(
            model.encoder,
            tokens,
            every=every,
            drop_path=schedule.drop_path,
            generator=generator,
            recompute=split.recompute,
            tied=recipe.model.tied_rates,
            on_stream=taps,
            stops=model.head.taps,
            group=split.group,
            chunk=split.chunk,
        )
        grid = model.feature_grid(encoded, taps.total, (rows, cols), order)
        return decode(model, grid, split.strip_rows).float()

    return forward


def segmentation(forward: Forward, recipe: Recipe) -> Objective:
    """The objective of a recipe: its loss of the logits of canvases against their labels."""
    dice_classes = [recipe.class_names.index(name) for name in recipe.loss.dice_classes]

    def objective(batch: Batch, every: int, generator: Generator | None) -> Tensor:
        images, labels = batch
        with half_products(images.device):
            logits = forward(images, every, generator)
        weights = constant(recipe.loss.class_weights, images.device)
        return segmentation_loss(logits.float(), labels, weights, dice_classes)

    return objective


def half_products(device: torch.device) -> torch.autocast:
    """Let matrix products be bfloat16 on GPUs; the stream and the scan's sums stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def train(
    model: nn.Module,
    canvases: "Canvases",
    progress: Progress,
    objective: Objective,
    *,
    on_step: Callable[[Progress, float, int], bool] | None = None,
    ranks: Ranks | None = None,
    budget: Budget | None = None,
) -> None:
    """Train a model in place until the planned steps are done or `on_step` says to stop.

    The same seed and number of steps give the same weights on one machine, in one go or resumed.

    Args:
        on_step: called after each step with the loss and the tokens seen; True stops.
        ranks: the processes that train together.
        budget: the memory that is kept.

    Raises:
        ModelError: gradients or the loss are not finite; names the layer.
        ResourceError: the device's memory does not suffice.
    """
    recipe, schedule = canvases.recipe, canvases.recipe.schedule
    ranks = ranks or Ranks(canvases.atlas.device)
    names, parameters = zip(*model.named_parameters(), strict=True)
    pace = Pace(schedule)
    if schedule.max_minutes is not None and progress.step == 0:
        progress.steps = UNPLANNED
    ahead: dict[int, Drawn] = {}

    gradients = Gradients(objective, parameters)
    state = model.state_dict()

    def work(worker: int) -> Worked:
        worker += schedule.workers * ranks.rank  # as so many more workers of one process
        drawn = ahead.pop(worker, None) or _draw(canvases, progress, progress.step, worker)
        worked = _work(gradients, canvases, progress, drawn, budget)
        if canvases.atlas.device.type == "cuda":  # queued before the step is waited for
            ahead[worker] = _draw(canvases, progress, progress.step + 1, worker)
        return worked

    with ThreadPoolExecutor(schedule.workers, initializer=_prepare_thread) as pool:
        while progress.step < progress.steps:
            began = time.monotonic()
            if schedule.workers == 1:
                results = [work(0)]
            else:
                results = list(pool.map(work, range(schedule.workers)))
            loss = _apply(state, progress, recipe, names, parameters, results, ranks)
            progress.step += 1
            duration = time.monotonic() - began
            progress.seconds += duration
            pace.note(results[0].blocks, duration)
            if schedule.max_minutes is not None:
                _plan(progress, pace, 60 * schedule.max_minutes, ranks)
            if on_step is not None and on_step(progress, loss, sum(r.tokens for r in results)):
                break


def _plan(progress: Progress, pace: Pace, seconds: float, ranks: Ranks) -> None:
    """Set the number of steps so that the training ends with its time; again and again, as
    canvases grow, but not in its last tenth, where the rate has to come down steadily."""
    spent = ranks.agree(progress.seconds)
    if spent > seconds:
        progress.steps = progress.step
    elif pace.is_known and progress.step % PLAN_EVERY == 0 and progress.step < 0.9 * progress.steps:
        late = progress.step > progress.steps / 2
        planned = pace.steps(progress.step, 0.97 * seconds - spent, late=late)
        progress.steps = round(ranks.agree(planned))
        log.info("%d steps are planned", progress.steps)


def _prepare_thread() -> None:
    torch.set_flush_denormal(True)  # powers of small decays: denormals would cost a factor of 5


def _draw(canvases: "Canvases", progress: Progress, step: int, worker: int) -> Drawn:
    recipe, device = canvases.recipe, canvases.atlas.device
    schedule = Schedule(recipe.schedule, progress.steps)
    seed = (recipe.schedule.seed * 1_000_003 + step) * 4096 + worker
    plan = torch.Generator().manual_seed(seed // 4096)  # all workers draw one size
    generator = torch.Generator(device).manual_seed(seed)
    blocks = schedule.canvas_blocks(step, plan)
    shape = canvas_shape(blocks, plan)
    batch = canvases.draw(shape, max(1, recipe.schedule.batch_blocks // blocks), generator)
    return Drawn(batch, blocks, generator)


def _work(
    gradients: Gradients,
    canvases: "Canvases",
    progress: Progress,
    drawn: Drawn,
    budget: Budget | None,
) -> Worked:
    recipe, pixels = canvases.recipe, drawn.batch[1].numel()
    every = Schedule(recipe.schedule, progress.steps).every(progress.step)
    tokens = pixels // recipe.model.encoder.stride_px**2
    while True:
        try:
            loss, grads = _in_parts(gradients, drawn, every, budget)
            break
        except torch.OutOfMemoryError as error:
            if budget is None or budget.limit is None:
                raise ResourceError(
                    f"step {progress.step}: the memory of {canvases.atlas.device} does not suffice "
                    f"for a batch of {tokens:,} tokens: lower schedule.batch_blocks and "
                    "largest_blocks; gigavim train splits batches with --max-gpu-memory"
                ) from error
        torch.cuda.empty_cache()
        budget.tighten()
    return Worked(loss, drawn.blocks, pixels, tokens, grads)


def _in_parts(
    gradients: Gradients, drawn: Drawn, every: int, budget: Budget | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss and gradients of a batch, the means over its parts by their canvases."""
    images, labels = drawn.batch
    side = images.shape[1:]
    if budget is None:
        return gradients(drawn.batch, every, drawn.generator)
    stride = budget.recipe.model.encoder.stride_px
    tokens = (side[1] // stride) * (side[2] // stride)
    parts = budget.split(tokens, len(images)).parts
    loss = images.new_zeros(())
    total: tuple[Tensor, ...] = ()
    pieces = zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)
    for part, batch in enumerate(pieces):
        count = len(batch[0])
        generator = drawn.generator
        if part:  # else all parts would leave out the same at random
            seed = drawn.generator.initial_seed() + (part << 40)
            generator = Generator(images.device).manual_seed(seed)
        own, grads = gradients(batch, every, generator, record=budget.records(tokens, count))
        if parts == 1:
            return own, grads
        share = count / len(images)
        loss = loss + own * share
        if total:
            torch._foreach_add_(total, grads, alpha=share)
        else:
            total = tuple(torch._foreach_mul(grads, share))
    return loss, total


def _apply(
    state: dict[str, Tensor],
    progress: Progress,
    recipe: Recipe,
    names: Names,
    parameters: Sequence[nn.Parameter],
    results: Sequence[Worked],
    ranks: Ranks,
) -> float:
    """Average the workers' gradients by pixels, clip them, step, follow; returns the mean loss."""
    total = sum(r.pixels for r in results)
    for place, parameter in enumerate(parameters):
        if len(results) == 1:
            parameter.grad = results[0].grads[place]
        else:
            parameter.grad = sum(
                (r.grads[place] * (r.pixels / total) for r in results),
                start=torch.zeros_like(parameter),
            )
    ranks.average_grads(parameters)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    mean = torch.stack([r.loss * (r.pixels / total) for r in results]).sum()
    size, loss = torch.stack((norm, mean.to(norm))).tolist()  # the one wait of a step
    if not math.isfinite(size):
        raise ModelError(_blame(progress.step, names, parameters))
    nn.utils.clip_grads_with_norm_(parameters, recipe.schedule.clip_norm, norm)
    for group in progress.optimizer.param_groups:
        group["lr"] = Schedule(recipe.schedule, progress.steps).rate(progress.step)
    progress.optimizer.step()
    decay = min(recipe.schedule.average, (1 + progress.step) / (10 + progress.step))
    with torch.no_grad():
        averages = [progress.average[name] for name in state]
        torch._foreach_lerp_(averages, list(state.values()), 1 - decay)
    return float(loss)


def _blame(step: int, names: Names, parameters: Sequence[nn.Parameter]) -> str:
    """Name the layer nearest to the output whose gradients are not finite: it met them first."""
    bad = [
        name
        for name, p in zip(names, parameters, strict=True)
        if p.grad is None or not torch.isfinite(p.grad).all()
    ]
    order = sorted(bad, key=lambda name: (name.startswith("head"), "norm_f" in name, _depth(name)))
    first = order[-1] if order else "the sum of all"
    return (
        f"step {step}: gradients are not finite; going backwards, they first were so in {first} "
        f"({len(bad)} parameters in all). Go on from the last checkpoint with a lower peak_rate."
    )


def _depth(name: str) -> int:
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["encoder", "layers"] else -1


@torch.no_grad()
def init_patch_embedding(model: SegmentationModel, images: Tensor) -> None:
    """Let the patch embedding start as the principal components of patches, at similar scales.

    Args:
        images: (B, 3, H, W), normalised as in training.
    """
    projection = model.encoder.patch_embed.proj
    size, width = projection.kernel_size[0], projection.out_channels
    images = images.cpu()
    patches = images.unfold(2, size, size).unfold(3, size, size)  # (B, 3, rows, cols, P, P)
    flat = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * size * size)
    covariance = torch.cov(flat.T.double())
    variance, vectors = torch.linalg.eigh(covariance)
    variance, vectors = variance.flip(0)[:width], vectors.flip(1)[:, :width]
    scale = 1 / (variance.clamp(min=0).sqrt() + 0.05 * variance[0].sqrt())
    weight = (vectors * scale).T.float()  # (at most D, 3 * P * P)
    kept = len(weight)
    projection.weight[:kept] = weight.view(kept, *projection.weight.shape[1:])
    assert projection.bias is not None
    projection.bias[:kept] = -(weight @ flat.mean(0))
