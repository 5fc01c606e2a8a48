"""Other stains: an augmentation of stained tissue, which kornia has none of.

Light that passes through stained tissue is absorbed by Beer and Lambert's law, so stains add up in
optical density, -log(I / I_glass), each with a colour of its own (Ruifrok and Johnston 2001).
"""

from typing import Any

import torch
from kornia.augmentation import IntensityAugmentationBase2D
from torch import Generator, Tensor

from gigavim.training.constants import constant

STAINS = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]]).t()
"""(3, 3): columns are the density of haematoxylin, eosin and a residual in red, green and blue."""
UNMIXING = torch.linalg.inv(STAINS)
OWN_SHARE = 0.3
"""How strongly an image differs from those it shares a look with."""


class RandomStain(IntensityAugmentationBase2D):
    """Change how much of each stain there is, and slightly the stains' colours.

    Images (B, 3, H, W) are transmittances, 0 to 1, where 1 is empty glass. It composes with
    kornia's own in an `AugmentationSequential`.

    Args:
        strength: factor on the range of what is drawn.
        cells: so many images after another share a look, and differ a little; B is a multiple.
        generator: draws the looks; torch's own without one, as kornia's augmentations do.
        p: share of images that are changed.
    """

    def __init__(
        self,
        strength: float = 1.0,
        *,
        cells: int = 1,
        generator: Generator | None = None,
        p: float = 0.5,
        same_on_batch: bool = False,
        keepdim: bool = False,
    ) -> None:
        super().__init__(p=p, same_on_batch=same_on_batch, keepdim=keepdim)
        self.flags = {"strength": strength, "cells": cells}
        self.generator = generator

    def generate_parameters(self, batch_shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Draw "mixing", (B, 3, 3): maps of densities to densities."""
        count, cells = batch_shape[0], self.flags["cells"]
        if self.same_on_batch:
            return {"mixing": self._look(1, 1.0).expand(count, 3, 3)}
        look = self._look(count // cells, 1.0).repeat_interleave(cells, 0)
        return {"mixing": self._look(count, OWN_SHARE) @ look}

    def apply_transform(
        self,
        input: Tensor,  # noqa: A002, as kornia calls it
        params: dict[str, Tensor],
        flags: dict[str, Any],
        transform: Tensor | None = None,
    ) -> Tensor:
        """Map the densities of the images."""
        density = -input.clamp(1 / 255, 1).log()
        mixed = params["mixing"].to(input) @ density.flatten(2)
        changed: Tensor = mixed.clamp(0, 4).neg().exp().view_as(input)
        return changed

    def _look(self, count: int, share: float) -> Tensor:
        """Draw (count, 3, 3) maps of densities."""
        device = self.generator.device if self.generator else torch.device("cpu")
        stains, strength = constant(STAINS, device), share * float(self.flags["strength"])

        def factor(reach: float, *shape: int) -> Tensor:
            drawn = torch.rand(shape, generator=self.generator, device=device)
            return (strength * reach * (2 * drawn - 1)).exp()

        colours = stains * factor(0.15, count, 3, 3)
        colours = colours / colours.norm(dim=1, keepdim=True) * stains.norm(dim=0)
        look: Tensor = (colours * factor(0.45, count, 1, 3)) @ constant(UNMIXING, device)
        return look
