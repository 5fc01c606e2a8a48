"""A model against labelled pictures: scores, calibration, and a sheet of pictures to look at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from gigavim.frames import ClassSpec
from gigavim.model.card import ModelCard
from gigavim.training import score
from gigavim.training.labelled import Classes
from gigavim.training.pack import Picture
from gigavim.training.recipe import IGNORED

CALIBRATION_BINS = 15
SHEET_PX = 320
GAP_PX = 6


@dataclass(frozen=True, slots=True)
class Seen:
    """One picture, what it is, and what the model says."""

    picture: Picture
    predicted: NDArray[np.uint8]
    """(h, w), at the picture's own resolution."""


@dataclass
class Calibration:
    """How often predictions of some confidence are right, pixel by pixel."""

    pixels: Tensor
    confidence: Tensor
    """Summed, by bin."""
    right: Tensor

    @classmethod
    def empty(cls) -> "Calibration":
        """Nothing seen yet."""
        return cls(*(torch.zeros(CALIBRATION_BINS, dtype=torch.float64) for _ in range(3)))

    def add(self, probability: Tensor, truth: Tensor) -> None:
        """Note probabilities (classes, h, w) and labels (h, w)."""
        confidence, found = probability.max(0)
        known = truth != IGNORED
        confidence, right = confidence[known].double().cpu(), (found == truth)[known].double().cpu()
        bins = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
        self.pixels += torch.bincount(bins, minlength=CALIBRATION_BINS)
        self.confidence += torch.bincount(bins, confidence, CALIBRATION_BINS)
        self.right += torch.bincount(bins, right, CALIBRATION_BINS)

    def report(self) -> dict[str, Any]:
        """The expected calibration error (Guo et al. 2017) and the bins behind it."""
        weight = self.pixels / self.pixels.sum().clamp(min=1)
        count = self.pixels.clamp(min=1)
        confidence, right = self.confidence / count, self.right / count
        return {
            "expected_calibration_error": float((weight * (confidence - right).abs()).sum()),
            "bins": [
                {"pixels": int(n), "confidence": float(c), "accuracy": float(r)}
                for n, c, r in zip(self.pixels, confidence, right, strict=True)
            ],
        }


def evaluate(
    predictor: score.Predictor,
    card: ModelCard,
    pictures: Sequence[Picture],
    device: torch.device,
    *,
    tolerance_px: int = 2,
    classes: Classes | None = None,
) -> tuple[dict[str, Any], list[Seen]]:
    """Score a model at the pictures' own pixels, as its maps are laid over them.

    In the report a class that no picture shows has None for its scores.

    Args:
        tolerance_px: how far a boundary may be off and still count for the boundary F1.
        classes: that the pictures label; all of the model's if absent.
    """
    classes = classes or Classes.all_of(card)
    names = [spec.name for spec in classes.specs]
    place = torch.tensor(classes.of_model, device=device)
    seen, counts, edges = [], [], torch.zeros(len(names), 4, dtype=torch.int64)
    calibration = Calibration.empty()
    for picture in pictures:
        item = score.show(picture, card.mpp, device)
        each = predictor.logits(item.image[None])[0].softmax(0)
        probability = each.new_zeros(len(names), *each.shape[1:]).index_add_(0, place, each)
        calibration.add(probability, item.labels)
        small = place[each.argmax(0)][None, None].float()  # what the map shows, then merged
        truth = torch.tensor(picture.labels, device=device)
        found = F.interpolate(small, truth.shape, mode="nearest-exact")[0, 0].to(torch.uint8)
        counts.append(score.confusion(found, truth, len(names)))
        edges += torch.stack(
            [boundary_counts(found, truth, index, tolerance_px) for index in range(len(names))]
        )
        seen.append(Seen(picture, found.cpu().numpy()))
    shown = [score.Shown(torch.empty(0), torch.empty(0), p.group, p.name) for p in pictures]
    pooled = torch.stack(counts).sum(0)
    there = [score.is_shown(pooled, index) for index in range(len(names))]
    absent = [name for name, is_there in zip(names, there, strict=True) if not is_there]
    scores: dict[str, float | None] = dict(score.summary(counts, shown, names))
    for name in absent:
        scores |= dict.fromkeys(f"{name}_{kind}" for kind in ("dice", "iou", "dice_per_image"))
    boundary = {
        name: boundary_f1(edges[index]) if there[index] else None
        for index, name in enumerate(names)
    }
    report = {
        "model": card.name,
        "sha256": card.sha256,
        "pictures": len(pictures),
        "groups": sorted({p.group for p in pictures}),
        "mean_dice": score.mean_dice(pooled),
        "scores": scores,
        "boundary_f1": boundary,
        "boundary_tolerance_px": tolerance_px,
        "confusion": {"classes": names, "pixels": pooled.tolist()},
        "calibration": calibration.report(),
        "by_picture": {
            p.name: {
                name: score.dice(c, index) if there[index] else None
                for index, name in enumerate(names)
            }
            for p, c in zip(pictures, counts, strict=True)
        },
    }
    return report, seen


def boundary_counts(found: Tensor, truth: Tensor, index: int, tolerance_px: int) -> Tensor:
    """(4,) int64: boundary pixels found, those near a true one, true ones, those near a found one.

    Boundaries at pixels without a label do not count.
    """
    known = (truth != IGNORED)[None, None]
    one, other = (_boundary(labels == index) & known for labels in (found, truth))
    size = 2 * tolerance_px + 1
    near = [F.max_pool2d(b.float(), size, 1, tolerance_px) > 0 for b in (other, one)]
    sums = one.sum(), (one & near[0]).sum(), other.sum(), (other & near[1]).sum()
    return torch.stack(sums).cpu()


def boundary_f1(counts: Tensor) -> float:
    """The harmonic mean of precision and recall of `boundary_counts`."""
    found, hit, true, met = (int(v) for v in counts)
    if not found and not true:
        return 1.0
    precision, recall = hit / max(1, found), met / max(1, true)
    return 2 * precision * recall / max(1e-12, precision + recall)


def sheet(seen: Sequence[Seen], classes: Sequence[ClassSpec], *, most: int = 12) -> Image.Image:
    """A row for each picture: itself, the truth, the prediction, and where they differ."""
    colours = np.full((256, 3), 128, np.uint8)
    for index, spec in enumerate(classes):
        colours[index] = spec.color_rgb
    step = max(1, len(seen) // most)
    rows = list(seen[::step])[:most]
    titles = ("picture", "truth", "prediction", "wrong, as predicted")
    width = len(titles) * (SHEET_PX + GAP_PX) + GAP_PX
    page = Image.new("RGB", (width, 24 + len(rows) * (SHEET_PX + GAP_PX)), "white")
    draw = ImageDraw.Draw(page)
    for column, title in enumerate(titles):
        draw.text((GAP_PX + column * (SHEET_PX + GAP_PX), 6), title, fill="black")
    for line, item in enumerate(rows):
        truth, found = item.picture.labels, item.predicted
        wrong = (truth != found) & (truth != IGNORED)
        # A middle grey, on which the pale colours of backgrounds show as well as dark ones.
        faint = (70 + item.picture.image.mean(-1, keepdims=True) * 0.4).astype(np.uint8)
        difference = np.where(wrong[..., None], colours[found], np.repeat(faint, 3, 2))
        for column, pixels in enumerate(
            (item.picture.image, colours[truth], colours[found], difference)
        ):
            panel = Image.fromarray(pixels)
            panel.thumbnail((SHEET_PX, SHEET_PX))
            place = (GAP_PX + column * (SHEET_PX + GAP_PX), 24 + line * (SHEET_PX + GAP_PX))
            page.paste(panel, place)
    return page


def _boundary(mask: Tensor) -> Tensor:
    """Pixels of a mask (h, w) with a neighbour outside it, as (1, 1, h, w) bool."""
    inside = mask[None, None]
    eroded = -F.max_pool2d(-inside.float(), 3, 1, 1)
    return inside & (eroded < 1)
