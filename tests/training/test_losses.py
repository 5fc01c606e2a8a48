import math

import pytest
import torch

from gigavim.training.losses import segmentation_loss, soft_dice_loss
from gigavim.training.recipe import IGNORED

LOGITS = torch.tensor([[[0.0, math.log(3.0)], [math.log(3.0), 0.0]]])


def test_soft_dice_by_hand():
    # probabilities of class 1: 0.75 and 0.25, truth: 1 and 0
    labels = torch.tensor([[1, 0]])
    expected = 1 - (2 * 0.75 + 1) / (0.75 + 0.25 + 1 + 1)
    assert soft_dice_loss(LOGITS, labels, [1]).item() == pytest.approx(expected, rel=1e-6)


def test_cross_entropy_weighs_classes():
    labels = torch.tensor([[1, 1]])
    entropy = (math.log(4 / 3) + math.log(4.0)) / 2
    dice = 1 - (2 * 1.0 + 1) / (1.0 + 2 + 1)
    found = segmentation_loss(LOGITS, labels, torch.tensor([1.0, 2.0]), [1]).item()
    assert found == pytest.approx(entropy + dice, rel=1e-6)


def test_ignored_pixels_change_nothing():
    labels, weights = torch.tensor([[1, 0]]), torch.tensor([1.0, 2.0])
    more = torch.cat((LOGITS, torch.randn(1, 2, 3)), 2)
    ignored = torch.cat((labels, torch.full((1, 3), IGNORED)), 1)
    assert segmentation_loss(more, ignored, weights, [0, 1]).item() == pytest.approx(
        segmentation_loss(LOGITS, labels, weights, [0, 1]).item(), rel=1e-6
    )
    nothing = segmentation_loss(LOGITS, torch.full((1, 2), IGNORED), weights, [])
    assert nothing.item() == 0


def test_a_perfect_answer_costs_nothing():
    labels = torch.randint(0, 3, (4, 64), generator=torch.Generator().manual_seed(0))
    logits = 50.0 * torch.nn.functional.one_hot(labels, 3).transpose(1, 2).float()
    assert segmentation_loss(logits, labels, torch.ones(3), [0, 2]).item() < 1e-4
