"""Training canvases: mosaics of fields as a slide is a mosaic of tissues, glass between them.

A canvas is a whole number of blocks of tokens. Every cell of the mosaic shows a field at a random
place, rotation, mirror and scale; one canvas in two shows a single slide only, as a real one does.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from gigavim.training import augment
from gigavim.training.data import BACKGROUND, FIELD_PX, GLASS, NUCLEI, PACKED_PX, TISSUE, Fields

MODEL_MPP = 0.5
FIELD_MPP_RANGE = (0.16, 0.27)
"""What a pixel of a field may measure. The authors give 40x without a figure; nuclei and red cells
of known size say 0.16 to 0.22 um, the usual 40x is 0.23 to 0.25 um: the training covers all."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Fields made ready for sampling."""

    planes: Tensor
    """(n, 5, 320, 320) float32: red, green, blue optical density; nuclei; background."""
    groups: tuple[str, ...]


def sources(fields: Fields) -> Sources:
    """Turn fields into densities over the glass of their scanner; 2 MB each."""
    planes = torch.empty(len(fields), 5, PACKED_PX, PACKED_PX)
    for plane, image, label in zip(planes, fields.images, fields.labels, strict=True):
        plane[:3] = image.permute(2, 0, 1)
        plane[:3].clamp_(1.0, GLASS).div_(GLASS).log_().neg_()
        plane[3], plane[4] = label == NUCLEI, label == BACKGROUND
    return Sources(planes, fields.groups)


def uniform(low: float, high: float, generator: Generator) -> float:
    """Draw one number."""
    return low + (high - low) * float(torch.rand((), generator=generator))


def chance(probability: float, generator: Generator) -> bool:
    """Draw yes or no."""
    return float(torch.rand((), generator=generator)) < probability


def canvas(
    fields: Sources, height_px: int, width_px: int, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Compose a canvas.

    Returns:
        (3, height_px, width_px) float32 in [0, 1] and its labels (height_px, width_px) int64.
    """
    finest, coarsest = FIELD_MPP_RANGE
    field_mpp = math.exp(uniform(math.log(finest), math.log(coarsest), generator))
    packed_per_px = MODEL_MPP / field_mpp * PACKED_PX / FIELD_PX
    reach_px = PACKED_PX / packed_per_px
    cell_px = round(uniform(0.45, 1.0, generator) * reach_px)
    choice = _choices(fields, generator)
    look = augment.random_stain(generator)
    density = torch.empty(3, height_px, width_px)
    labels = torch.empty(height_px, width_px, dtype=torch.int64)
    top, left = (-round(uniform(0, cell_px, generator)) for _ in range(2))
    for y in range(top, height_px, cell_px):
        for x in range(left, width_px, cell_px):
            y0, x0 = max(y, 0), max(x, 0)
            y1, x1 = min(y + cell_px, height_px), min(x + cell_px, width_px)
            if y1 <= y0 or x1 <= x0:
                continue
            index = int(choice[int(torch.randint(len(choice), (), generator=generator))])
            patch = _sample(fields.planes[index], (y1 - y0, x1 - x0), packed_per_px, generator)
            here = (slice(y0, y1), slice(x0, x1))
            density[:, *here] = augment.stain(patch[:3], look, generator)
            labels[here] = torch.where(
                patch[3] >= 0.5, NUCLEI, torch.where(patch[4] >= 0.5, BACKGROUND, TISSUE)
            )
    return augment.finish(density, labels, generator)


def _choices(fields: Sources, generator: Generator) -> Tensor:
    """The fields a canvas draws from: all, or those of one slide."""
    if chance(0.5, generator):
        return torch.arange(len(fields.groups))
    names = sorted(set(fields.groups))
    name = names[int(torch.randint(len(names), (), generator=generator))]
    return torch.tensor([i for i, group in enumerate(fields.groups) if group == name])


def _sample(
    source: Tensor,
    size_hw: tuple[int, int],
    packed_per_px: float,
    generator: Generator,
) -> Tensor:
    """Cut (5, h, w) from the planes of a field, turned, mirrored and a little stretched."""
    turn = math.radians(uniform(-15, 15, generator))
    turn += math.pi / 2 * int(torch.randint(4, (), generator=generator))
    mirror = -1.0 if chance(0.5, generator) else 1.0
    stretch = math.exp(uniform(-0.1, 0.1, generator))
    h, w = size_hw
    room = [max(0.0, PACKED_PX / packed_per_px - side) / 2 for side in size_hw]
    shift_y, shift_x = (uniform(-r, r, generator) for r in room)
    # px from the middle of the canvas cell, to the middle of the field in packed px
    y = (torch.arange(h) - (h - 1) / 2 + shift_y) * packed_per_px * stretch
    x = (torch.arange(w) - (w - 1) / 2 + shift_x) * packed_per_px / stretch * mirror
    cos, sin = math.cos(turn), math.sin(turn)
    grid = torch.stack(
        (cos * x[None] - sin * y[:, None], sin * x[None] + cos * y[:, None]), -1
    )  # (h, w, 2) of x, y
    grid = grid * (2 / PACKED_PX)
    sampled = F.grid_sample(
        source[None], grid[None], mode="bilinear", padding_mode="reflection", align_corners=False
    )
    return sampled[0]
