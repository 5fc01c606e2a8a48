"""Quality on held-out fields: per image and slide, by length of the sequence, at block borders."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gigavim.model.heads import SegmentationModel
from gigavim.model.vim import grid_cells
from gigavim.tokens.order import ScanOrder
from gigavim.training.data import BACKGROUND, FIELD_PX, GLASS, NUCLEI, Fields
from gigavim.training.encode import encode
from gigavim.training.mosaic import MODEL_MPP

FIELD_MPP = 0.23
"""The scale at which validation fields are shown, see `mosaic.FIELD_MPP_RANGE`."""


@dataclass(frozen=True, slots=True)
class Crop:
    """A field at the model's resolution."""

    image: Tensor
    """(3, h, w) float32 in [0, 1]."""
    labels: Tensor
    """(h, w) int64."""
    group: str


def crops(fields: Fields, *, field_mpp: float = FIELD_MPP) -> list[Crop]:
    """Bring fields to the model's resolution by area."""
    side = round(FIELD_PX * field_mpp / MODEL_MPP)
    found = []
    for image, label, group in zip(fields.images, fields.labels, fields.groups, strict=True):
        pixels = image.permute(2, 0, 1)[None].float() / 255
        pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)[0]
        shares = F.one_hot(label.long(), 3).permute(2, 0, 1)[None].float()
        shares = F.interpolate(shares, (side, side), mode="bilinear", antialias=True)[0]
        found.append(Crop(pixels, shares.argmax(0), group))
    return found


@torch.no_grad()
def predict(
    model: SegmentationModel,
    image: Tensor,
    order: ScanOrder,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Label an image (3, h, w) in [0, 1] in one sequence; padded to whole blocks with glass.

    Returns:
        (h, w) uint8.
    """
    patch = model.head.patch_px
    side = patch * (order.block or 1)
    height, width = image.shape[1:]
    padded = F.pad(image, (0, -width % side, 0, -height % side), value=GLASS / 255)
    normalised = (padded - _column(mean)) / _column(std)
    encoded = encode(model.encoder, model.encoder.tokens(normalised[None], order=order))
    rows, cols = (s // patch for s in padded.shape[1:])
    labels = torch.empty(rows * cols, patch, patch, dtype=torch.uint8)
    cells = grid_cells(rows, cols, order)
    for start in range(0, rows * cols, 8192):
        part = slice(start, start + 8192)
        labels[cells[part]] = model.head(encoded[0, part]).argmax(1).to(torch.uint8)
    grid = labels.view(rows, cols, patch, patch).transpose(1, 2).reshape(padded.shape[1:])
    return grid[:height, :width]


def dice(predicted: Tensor, labels: Tensor, index: int = NUCLEI) -> float:
    """Dice of a class; one where it is neither predicted nor there."""
    p, t = predicted == index, labels == index
    total = int(p.sum()) + int(t.sum())
    return 2 * int((p & t).sum()) / total if total else 1.0


def iou(predicted: Tensor, labels: Tensor, index: int) -> float:
    """Intersection over union of a class; one where it is neither predicted nor there."""
    p, t = predicted == index, labels == index
    union = int((p | t).sum())
    return int((p & t).sum()) / union if union else 1.0


def by_image(
    model: SegmentationModel,
    shown: Sequence[Crop],
    order: ScanOrder,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[dict[str, float], list[float]]:
    """Segment every crop by itself, about a thousand tokens each.

    Returns:
        Mean Dice of nuclei, also by slide, pooled Dice and IoU; the Dice of every crop.
    """
    predictions = [predict(model, crop.image, order, mean, std).long() for crop in shown]
    scores = [dice(p, crop.labels) for p, crop in zip(predictions, shown, strict=True)]
    result = {"nuclei_dice_per_image": float(np.mean(scores))}
    for group in sorted({crop.group for crop in shown}):
        own = [s for s, crop in zip(scores, shown, strict=True) if crop.group == group]
        result[f"nuclei_dice_{group}"] = float(np.mean(own))
    pooled = torch.cat([p.flatten() for p in predictions])
    truth = torch.cat([crop.labels.flatten() for crop in shown])
    result["nuclei_dice_pooled"] = dice(pooled, truth)
    result["background_iou"] = iou(pooled, truth, BACKGROUND)
    result["tissue_iou"] = iou((pooled > 0).long(), (truth > 0).long(), 1)
    return result, scores


def by_length(
    model: SegmentationModel,
    shown: Sequence[Crop],
    alone: Sequence[float],
    order: ScanOrder,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    fields_per_side: int,
) -> dict[str, float]:
    """Lay the crops out as one square mosaic (repeated as needed) and segment it in one sequence.

    Args:
        alone: the Dice of every crop segmented by itself.

    Returns:
        Tokens; mean Dice per field of the mosaic and of the same fields alone; pooled Dice in the
        outer ring of tokens of every block and inside.
    """
    side = shown[0].image.shape[1]
    count = fields_per_side
    mosaic = torch.empty(3, count * side, count * side)
    truth = torch.empty(count * side, count * side, dtype=torch.int64)
    windows, used = [], []
    stride = 5  # neighbours come from other slides
    for place in range(count * count):
        crop = shown[place * stride % len(shown)]
        y, x = (k * side for k in divmod(place, count))
        window = (slice(y, y + side), slice(x, x + side))
        mosaic[:, *window], truth[window] = crop.image, crop.labels
        windows.append(window)
        used.append(alone[place * stride % len(shown)])
    predicted = predict(model, mosaic, order, mean, std).long()
    scores = [dice(predicted[window], truth[window]) for window in windows]
    inside = _inside_blocks(count * side, model.head.patch_px, order)
    ring = ~(inside[:, None] & inside[None])
    blocks = -(-count * side // (model.head.patch_px * (order.block or 1)))
    return {
        "tokens": float((blocks * (order.block or 1)) ** 2),
        "nuclei_dice_per_image": float(np.mean(scores)),
        "nuclei_dice_same_images_alone": float(np.mean(used)),
        "nuclei_dice_block_border": dice(predicted[ring], truth[ring]),
        "nuclei_dice_block_inside": dice(predicted[~ring], truth[~ring]),
    }


def _inside_blocks(length_px: int, patch_px: int, order: ScanOrder) -> Tensor:
    """Which pixels of a side lie in no outermost token of their block."""
    block = order.block or 1
    token = torch.arange(length_px) // patch_px % block
    return (token > 0) & (token < block - 1)


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values)[:, None, None]
