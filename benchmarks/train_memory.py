"""What one training step on one long sequence takes: peak bytes a token, and seconds.

    python -m benchmarks.train_memory --lengths 65536 262144 1048576
    python -m benchmarks.train_memory --recipe histo-nuclei-nano --lengths 4096 20480 --device cpu

A step is loss and gradients of a recipe's model on one random canvas, with bfloat16 products on
GPUs. The ways are those that `gigavim train --max-gpu-memory` chooses from; "predicted" is what it
would have reckoned with, the canvas included. Peaks are those of torch's allocator, less what was
there before; a CPU's allocator makes more of it in RAM.
"""

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from gigavim.engine.devices import resolve_device
from gigavim.training import loop
from gigavim.training.graphs import Gradients
from gigavim.training.memory import STRIP_ROWS, Budget, Split
from gigavim.training.recipe import Recipe, load_recipe
from gigavim.training.run import fast_products, new_model

WAYS = {
    "whole": Split(recompute=True),
    "strips": Split(recompute=True, strip_rows=STRIP_ROWS),
    "groups": Split(recompute=True, strip_rows=STRIP_ROWS, group=6),
    "chunks": Split(recompute=True, strip_rows=STRIP_ROWS, group=6, chunk=16384),
}


@dataclass
class Forced(Budget):
    """A budget that works through every batch in one way."""

    way: Split = field(default_factory=Split)

    def split(self, tokens: int, count: int) -> Split:
        """That way."""
        return self.way


def canvas(
    recipe: Recipe, tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A random canvas of at least so many tokens in whole blocks, its labels, and its tokens."""
    config, side = recipe.model.encoder, recipe.model.scan_order.block or 16
    blocks = max(1, round(tokens / side**2))
    rows = max(1, int(blocks**0.5))
    cols = -(-blocks // rows)
    height, width = ((n * side - 1) * config.stride_px + config.patch_px for n in (rows, cols))
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randn(1, 3, height, width, device=device, generator=generator)
    labels = torch.randint(
        len(recipe.classes), (1, height, width), device=device, generator=generator
    )
    return images, labels, rows * cols * side**2


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most that torch held at a time during a call, beyond what it held before."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        call()
    assert watched.profiler is not None
    results = watched.profiler.kineto_results
    assert results is not None
    events = [event for event in results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def step(recipe: Recipe, way: Split, tokens: int, device: torch.device) -> dict[str, object]:
    """Loss and gradients on one sequence, twice: the first time compiles."""
    model = new_model(recipe).to(device)
    budget = Forced(model, recipe, device, way=way)
    objective = loop.segmentation(loop.vim_forward(model, recipe, budget), recipe)
    gradients = Gradients(objective, list(model.parameters()))
    images, labels, tokens = canvas(recipe, tokens, device)
    generator = torch.Generator(device).manual_seed(0)
    small = canvas(recipe, 256, device)[:2]
    gradients(small, 1, generator, record=False)
    budget.head_bytes, budget.loss_bytes  # noqa: B018, measured before the clock starts
    found = []
    began = time.perf_counter()
    peak = peak_bytes(
        lambda: found.append(gradients((images, labels), 1, generator, record=False)), device
    )
    seconds = time.perf_counter() - began
    loss, grads = found[0]
    finite = all(bool(torch.isfinite(g).all()) for g in grads)
    return {
        "tokens": tokens,
        "peak_bytes": peak,
        "bytes_per_token": round(peak / tokens),
        "predicted_bytes_per_token": round(budget.needed(tokens, 1, way) / tokens),
        "seconds": round(seconds, 2),
        "loss": round(float(loss), 4),
        "finite": finite,
    }


def measured(recipe: Recipe, way: Split, tokens: int, where: torch.device) -> dict[str, object]:
    """Take a step, or say that it does not fit."""
    try:
        with fast_products(where, workers=1):
            return step(recipe, way, tokens, where)
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        return {"tokens": tokens, "error": str(error).splitlines()[0]}


def main() -> None:
    """Measure, print a table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--recipe", default="histo-nuclei")
    parser.add_argument("--lengths", type=int, nargs="+", default=[65536, 262144, 1048576])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--head", choices=["linear", "fpn"], help="Instead of the recipe's.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = resolve_device(args.device)
    recipe = load_recipe(args.recipe)
    if args.head:
        section = recipe.model.model_copy(update={"head": args.head})
        recipe = recipe.model_copy(update={"model": section})
    where = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    )
    print(f"{args.recipe}, head {recipe.model.head}, on {where}, torch {torch.__version__}")
    rows: list[dict[str, object]] = []
    for tokens in args.lengths:
        for name in args.ways:
            rows.append({"way": name} | measured(recipe, WAYS[name], tokens, device))
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"device": where, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
