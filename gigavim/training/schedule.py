"""Learning rate and canvas sizes, as functions of how far a training is."""

import math
from dataclasses import dataclass

import torch
from torch import Generator

from gigavim.training.recipe import ScheduleRecipe

WARM_STEPS = 20
"""Steps that say nothing of the speed: kernels are being compiled."""


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
        sizes, weights = self.sizes(late=step > self.steps / 2)
        return sizes[int(torch.multinomial(torch.tensor(weights), 1, generator=generator))]

    def sizes(self, *, late: bool) -> tuple[list[int], list[float]]:
        """Blocks of a canvas and how often they are drawn, in the first or the second half."""
        largest = self.recipe.largest_blocks
        longest = largest if late else max(1, min(16, largest // 4 or largest))
        sizes = [2**k for k in range(longest.bit_length())]
        # A canvas of b blocks costs max(b, batch): draw the costly ones less often.
        return sizes, [min(1.0, (self.recipe.batch_blocks / 2) / size) for size in sizes]


def canvas_shape(blocks: int, generator: Generator) -> tuple[int, int]:
    """Draw (rows, cols) with rows * cols = blocks, a power of two, not longer than 1 : 4."""
    power = blocks.bit_length() - 1
    options = [k for k in range(power + 1) if abs(power - 2 * k) <= 2]
    rows = 2 ** options[int(torch.randint(len(options), (), generator=generator))]
    return rows, blocks // rows


class Pace:
    """How long steps take by the size of their canvases, and so how many fill the time given."""

    def __init__(self, recipe: ScheduleRecipe) -> None:
        self.schedule = Schedule(recipe, 1)
        self._seconds: dict[int, list[float]] = {}
        self._steps = 0

    def note(self, blocks: int, seconds: float) -> None:
        """Note a step."""
        self._steps += 1
        if self._steps > WARM_STEPS:
            self._seconds.setdefault(blocks, []).append(seconds)

    @property
    def is_known(self) -> bool:
        """Whether enough steps were seen to plan by."""
        return self._steps >= 3 * WARM_STEPS

    def step_seconds(self, *, late: bool) -> float:
        """The mean of a step in the first or the second half."""
        sizes, weights = self.schedule.sizes(late=late)
        times = [self._of(size) for size in sizes]
        return sum(t * w for t, w in zip(times, weights, strict=True)) / sum(weights)

    def steps(self, step: int, left_seconds: float, *, late: bool) -> int:
        """The number of steps in all that ends with the time that is left after `step`."""
        first, second = self.step_seconds(late=False), self.step_seconds(late=True)
        if not late:
            total = (left_seconds + step * first) / ((first + second) / 2)
            if total / 2 > step:
                return int(total)
        return max(step + 1, step + int(left_seconds / second))

    def _of(self, blocks: int) -> float:
        """Seconds of a step with canvases of a size; in proportion to tokens where not yet seen."""
        if blocks in self._seconds:
            seen = sorted(self._seconds[blocks])
            kept = seen[: max(1, round(0.95 * len(seen)))]  # what else the machine did, left out
            return sum(kept) / len(kept)
        batch = self.schedule.recipe.batch_blocks
        nearest = min(self._seconds, key=lambda size: abs(size - blocks))
        return self._of(nearest) * max(blocks, batch) / max(nearest, batch)
