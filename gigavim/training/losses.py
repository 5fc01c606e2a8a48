"""The loss: weighted cross entropy and soft Dice over pixels."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_dice_loss(logits: Tensor, labels: Tensor, classes: Sequence[int]) -> Tensor:
    """One minus the mean soft Dice of some classes, over all pixels of the batch.

    Dice = (2 sum p t + 1) / (sum p + sum t + 1), p the probability and t the truth of the class.

    Args:
        logits: (n, classes, pixels). labels: (n, pixels) int64.
    """
    probability = logits.softmax(1)
    losses = []
    for index in classes:
        p, t = probability[:, index], (labels == index).to(logits.dtype)
        losses.append(1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))
    return torch.stack(losses).mean()


def segmentation_loss(
    logits: Tensor, labels: Tensor, class_weights: Tensor, dice_classes: Sequence[int]
) -> Tensor:
    """Cross entropy weighted by class, plus the soft Dice loss; shapes as in `soft_dice_loss`."""
    entropy = F.cross_entropy(logits, labels, weight=class_weights)
    return entropy + soft_dice_loss(logits, labels, dice_classes)
