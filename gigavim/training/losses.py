"""The loss: weighted cross entropy and soft Dice over the pixels that have a label."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gigavim.training.recipe import IGNORED


def soft_dice_loss(logits: Tensor, labels: Tensor, classes: Sequence[int]) -> Tensor:
    """One minus the mean soft Dice of some classes, over all labelled pixels of the batch.

    Dice = (2 sum p t + 1) / (sum p + sum t + 1), p the probability and t the truth of the class.

    Args:
        logits: (n, classes, ...). labels: (n, ...) int64.
    """
    known = labels != IGNORED
    probability = logits.softmax(1)
    losses = []
    for index in classes:
        p, t = probability[:, index] * known, (labels == index).to(logits.dtype)
        losses.append(1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))
    return torch.stack(losses).mean()


def segmentation_loss(
    logits: Tensor, labels: Tensor, class_weights: Tensor, dice_classes: Sequence[int]
) -> Tensor:
    """Cross entropy weighted by class, plus the soft Dice loss; shapes as in `soft_dice_loss`.

    The cross entropy is a sum over the labelled pixels by their weights over the sum of these; a
    batch without any labelled pixel costs nothing.
    """
    classes = logits.shape[1]
    losses = F.cross_entropy(
        logits, labels, weight=class_weights, ignore_index=IGNORED, reduction="none"
    )
    share = F.pad(class_weights, (0, 256 - classes))[labels]
    entropy = losses.sum() / share.sum().clamp(min=1e-6)
    if not dice_classes:
        return entropy
    return entropy + soft_dice_loss(logits, labels, dice_classes)
