"""Training canvases: whole blocks of tokens, composed of pieces of pictures as a slide is.

A canvas is a mosaic of cells. Each cell shows a picture at a random place, rotation and mirror;
all of a canvas have one scale, and many canvases show a single group only, as a real slide does.
Where pictures are larger than the canvas, it is one piece.
"""

import math
from dataclasses import dataclass

import torch
from kornia.geometry.transform import get_rotation_matrix2d
from torch import Generator, Tensor

from gigavim.training import looks
from gigavim.training.atlas import Atlas
from gigavim.training.constants import constant
from gigavim.training.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Canvases:
    """Draws batches of normalised canvases and their labels on the device of an atlas.

    How they are composed is decided on the CPU, so that a GPU is never waited for.
    """

    atlas: Atlas
    recipe: Recipe

    def side_px(self, blocks: int) -> int:
        """Pixels that so many blocks of tokens in a row cover."""
        encoder, order = self.recipe.model.encoder, self.recipe.model.scan_order
        return encoder.patch_px + (blocks * (order.block or 16) - 1) * encoder.stride_px

    def draw(
        self, blocks_hw: tuple[int, int], count: int, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Make canvases of (rows, cols) blocks.

        Args:
            generator: on the device of the atlas, for pixels; its seed alone decides how the
                canvases are composed.

        Returns:
            (count, 3, H, W) float32, normalised, and labels (count, H, W) int64.
        """
        height, width = self.side_px(blocks_hw[0]), self.side_px(blocks_hw[1])
        plan = torch.Generator().manual_seed(generator.initial_seed())
        rgb, labels = self._compose(height, width, count, plan, generator)
        rgb, labels = looks.scan(rgb, labels, self.recipe, looks.Dice(generator, plan))
        return self.normalise(rgb), labels

    def normalise(self, rgb: Tensor) -> Tensor:
        """Bring colours (..., 3, h, w) in 0..1 to what the model expects."""
        mean, std = (
            constant(values, rgb.device)[:, None, None]
            for values in (self.recipe.model.mean, self.recipe.model.std)
        )
        return (rgb - mean) / std

    def _compose(
        self, height: int, width: int, count: int, plan: Generator, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Densities or colours (count, 3, H, W) and labels (count, H, W) uint8."""
        augment, atlas = self.recipe.augment, self.atlas

        def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
            return low + (high - low) * torch.rand(shape, generator=plan)

        low, high = (math.log(v) for v in augment.scale)
        scale = uniform(count, low=low, high=high).exp()
        if uniform() < 0.5:
            scale = scale[:1].expand(count)  # one pyramid level serves a batch
        chosen = self._choose(count, plan)
        step = self.recipe.model.mpp / (atlas.mpp[chosen[:, :1]] * scale[:, None])  # (count, 1)
        reach = float((atlas.size_hw[chosen[:, 0]].amin(1) / step[:, 0]).min())
        cell = max(32, round(float(uniform(1, low=0.45)) * reach))
        if cell >= max(height, width):
            rows, cols, cell_hw = 1, 1, (height, width)
        else:
            rows, cols = (-(-side // cell) + 1 for side in (height, width))
            cell_hw = (cell, cell)
        picks = torch.randint(chosen.shape[1], (rows * cols,), generator=plan)
        index = chosen[:, picks].flatten()
        matrix = self._steps(step.expand(-1, rows * cols).flatten(), plan)
        size = atlas.size_hw[index]
        extent = matrix.abs() @ torch.tensor(cell_hw, dtype=torch.float32)
        room = (size - extent).clamp(min=0)
        centre = size / 2 + uniform(*room.shape, low=-0.5, high=0.5) * room
        rgb, labels = atlas.sample(index, cell_hw, centre, matrix)
        rgb = looks.prepare(rgb, rows * cols, self.recipe, looks.Dice(generator, plan))
        top, left = (
            int(float(uniform(1)) * (n * c - side + 1)) if n > 1 else 0
            for n, c, side in zip((rows, cols), cell_hw, (height, width), strict=True)
        )
        laid = _lay(rgb, count, rows, cols)[..., top : top + height, left : left + width]
        marks = _lay(labels[:, None], count, rows, cols)[:, 0]
        return laid, marks[:, top : top + height, left : left + width]

    def _choose(self, count: int, plan: Generator, choices: int = 24) -> Tensor:
        """Pictures of each canvas, (count, choices) int64: of all groups, or of one."""
        atlas = self.atlas
        weight = atlas.size_hw.prod(1).float().sqrt()
        group = torch.randint(int(atlas.group.max()) + 1, (count,), generator=plan)
        single = torch.rand(count, generator=plan)
        allowed = atlas.group == group[:, None]
        allowed |= (single >= self.recipe.augment.one_group)[:, None]
        return torch.multinomial(weight * allowed, choices, replacement=True, generator=plan)

    def _steps(self, step: Tensor, plan: Generator) -> Tensor:
        """(n, 2, 2): rotation, mirror and stretch around steps (n,)."""
        augment = self.recipe.augment
        drawn = torch.rand(4, len(step), generator=plan)
        angle = (drawn[0] * 4).floor() * 90 + (2 * drawn[1] - 1) * augment.turn_degrees
        mirror = torch.where(drawn[2] < 0.5, -1.0, 1.0)
        stretch = ((2 * drawn[3] - 1) * augment.stretch).exp()
        scale = step[:, None] * torch.stack((stretch, mirror / stretch), -1)
        # In float64: products of float32 may be rounded where training asks for fast ones.
        turned = get_rotation_matrix2d(
            torch.zeros(len(step), 2).double(), angle.double(), scale.double()
        )
        return turned[:, :, :2].float()


def _lay(cells: Tensor, count: int, rows: int, cols: int) -> Tensor:
    """Lay cells (count * rows * cols, c, h, w) out as (count, c, rows * h, cols * w)."""
    _, channels, h, w = cells.shape
    grid = cells.view(count, rows, cols, channels, h, w).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(count, channels, rows * h, cols * w)
