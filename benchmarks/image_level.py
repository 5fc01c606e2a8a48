"""Classification of canvases, for what the paper's Table 5 compares: where the class token stands.

The data have no labels of whole pictures, so a canvas is to be told by how much of it one class
covers: which quarter of the training canvases it belongs to. Chance is 0.25 on the training groups.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from gigavim.model.vim import Vim
from gigavim.training import loop
from gigavim.training.atlas import Atlas
from gigavim.training.canvas import Canvases
from gigavim.training.encode import encode
from gigavim.training.recipe import IGNORED, Recipe

QUARTERS = 4
SIDE_BLOCKS = (2, 2)


@dataclass(frozen=True)
class Coverage:
    """Which quarter of the canvases one is in, by the share that a class has of it."""

    label: int
    edges: Tensor
    """(3,) shares."""

    @classmethod
    def of(cls, canvases: Canvases, label: int, *, batches: int = 8) -> "Coverage":
        """Take the quarters from canvases of some seeds."""
        edges = torch.linspace(0, 1, QUARTERS + 1)[1:-1].to(canvases.atlas.device)
        found = [
            cls(label, edges).shares(labels) for _, labels in drawn(canvases, batches, first=10**6)
        ]
        return cls(label, torch.quantile(torch.cat(found), edges))

    def shares(self, labels: Tensor) -> Tensor:
        """(n, h, w) to (n,) float32."""
        known = (labels != IGNORED).sum((1, 2)).clamp(min=1)
        return (labels == self.label).sum((1, 2)) / known

    def targets(self, labels: Tensor) -> Tensor:
        """(n, h, w) to (n,) int64 below `QUARTERS`."""
        return torch.bucketize(self.shares(labels), self.edges)


def drawn(canvases: Canvases, batches: int, *, first: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches of canvases that are the same each time."""
    device = canvases.atlas.device
    return [
        canvases.draw(SIDE_BLOCKS, 16, Generator(device).manual_seed(first + seed))
        for seed in range(batches)
    ]


def classifier(recipe: Recipe) -> Vim:
    """The encoder of a recipe with a classification head."""
    return Vim(replace(recipe.model.encoder, num_classes=QUARTERS))


def logits(model: Vim, recipe: Recipe, images: Tensor, generator: Generator | None) -> Tensor:
    """(n, QUARTERS) float32 of canvases, with gradients."""
    with loop.half_products(images.device):
        tokens = model.tokens(images, order=recipe.model.scan_order)
        encoded = encode(
            model, tokens, drop_path=recipe.schedule.drop_path, generator=generator,
            tied=recipe.model.tied_rates,
        )  # fmt: skip
        return model.classify(encoded).float()


def train(
    recipe: Recipe, atlas: Atlas, unseen: Atlas, *, batches: int = 32
) -> tuple[loop.Progress, dict[str, float]]:
    """Train a classifier by a recipe's schedule; returns how far it came and its scores."""
    canvases = Canvases(atlas, recipe)
    name = recipe.loss.monitor.partition(":")[2] or recipe.class_names[-1]
    coverage = Coverage.of(canvases, recipe.class_names.index(name))
    torch.manual_seed(recipe.schedule.seed)
    model = classifier(recipe).to(atlas.device)

    def objective(batch: loop.Batch, every: int, generator: Generator | None) -> Tensor:
        images, labels = batch
        return F.cross_entropy(logits(model, recipe, images, generator), coverage.targets(labels))

    progress = loop.start(model, recipe)
    loop.train(model, canvases, progress, objective)
    model.load_state_dict(progress.average)
    right, near, seen = 0, 0, 0
    with torch.no_grad():
        for images, labels in drawn(Canvases(unseen, recipe), batches):
            off = (logits(model, recipe, images, None).argmax(1) - coverage.targets(labels)).abs()
            right, near = right + int((off == 0).sum()), near + int((off <= 1).sum())
            seen += len(labels)
    return progress, {"accuracy": right / seen, "within one quarter": near / seen}
