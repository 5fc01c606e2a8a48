"""Learning rate and canvas sizes, as functions of how far a training is."""

import math
from dataclasses import dataclass

import torch
from torch import Generator

from gigavim.training.recipe import ScheduleRecipe

MEASURED_STEPS = (20, 60)
"""Steps over which the speed is taken where a training has a number of minutes, not of steps."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A schedule of a known number of steps."""

    recipe: ScheduleRecipe
    steps: int

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, then half a cosine."""
        peak, warmup = self.recipe.peak_rate, self.recipe.warmup_steps
        if step < warmup:
            return peak * (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, self.steps - warmup))
        final = self.recipe.final_rate
        return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)))

    def every(self, step: int) -> int:
        """Which layers take part: every one, or every second at first."""
        return 2 if step < self.recipe.half_depth * self.steps else 1

    def canvas_blocks(self, step: int, generator: Generator) -> int:
        """Blocks of the canvases of a batch: powers of two, longer ones as the training goes on."""
        largest = self.recipe.largest_blocks
        longest = largest if step > self.steps / 2 else max(1, min(16, largest // 4 or largest))
        sizes = [2**k for k in range(longest.bit_length())]
        # A canvas of b blocks costs max(b, batch): draw the costly ones less often.
        weights = torch.tensor([min(1.0, (self.recipe.batch_blocks / 2) / size) for size in sizes])
        return int(sizes[int(torch.multinomial(weights, 1, generator=generator))])


def canvas_shape(blocks: int, generator: Generator) -> tuple[int, int]:
    """Draw (rows, cols) with rows * cols = blocks, a power of two, not longer than 1 : 4."""
    power = blocks.bit_length() - 1
    options = [k for k in range(power + 1) if abs(power - 2 * k) <= 2]
    rows = 2 ** options[int(torch.randint(len(options), (), generator=generator))]
    return rows, blocks // rows


def planned_steps(recipe: ScheduleRecipe, step: int, seconds: float, step_seconds: float) -> int:
    """The number of steps that fill `max_minutes`, `seconds` of which have gone by at `step`."""
    assert recipe.max_minutes is not None
    left = 60 * recipe.max_minutes * 0.95 - seconds
    return max(step + 1, step + int(left / max(step_seconds, 1e-6)))
