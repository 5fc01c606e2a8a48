from dataclasses import replace

import pytest
import torch

from gigavim.model.config import VimConfig
from gigavim.model.segmentation import SegmentationModel
from gigavim.model.vim import Vim
from gigavim.tokens.order import ScanOrder
from gigavim.training import score
from gigavim.training.recipe import IGNORED

ORDER = ScanOrder.parse("blocks(4)")
MEAN, STD = (0.7, 0.6, 0.7), (0.2, 0.2, 0.2)


def predictor(stride_px=8):
    torch.manual_seed(0)
    config = VimConfig(
        d_model=16, depth=2, patch_px=8, stride_px=stride_px, class_token="none", pooling="mean",
        position="block", grid_hw=(4, 4),
    )  # fmt: skip
    model = SegmentationModel(Vim(config), 3).eval()
    torch.nn.init.normal_(model.head.linear.weight)
    return score.Predictor(model, ORDER, MEAN, STD)


@pytest.mark.parametrize("stride_px", [8, 4])
def test_prediction_is_the_models(stride_px):
    found = predictor(stride_px)
    side = 8 + 7 * stride_px
    images = torch.rand(2, 3, side, side)
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    with torch.no_grad():
        logits = found.model((images - mean) / std, ORDER)
    assert torch.equal(found.labels(images), logits.argmax(1).to(torch.uint8))


@pytest.mark.parametrize("size", [(1, 1), (33, 70), (64, 64)], ids=str)
def test_any_size_is_padded_and_cut(size):
    labels = predictor().labels(torch.rand(1, 3, *size))
    assert labels.shape == (1, *size)


def test_scores_by_hand():
    truth = torch.tensor([[0, 0, 1, 1], [IGNORED, 2, 2, 1]])
    found = torch.tensor([[0, 1, 1, 1], [0, 2, 0, 1]])
    counts = score.confusion(found, truth, 3)
    assert counts.tolist() == [[1, 1, 0], [0, 3, 0], [1, 0, 1]]
    assert score.dice(counts, 1) == pytest.approx(6 / 7)
    assert score.iou(counts, 1) == pytest.approx(3 / 4)
    assert score.mean_iou(counts) == pytest.approx((1 / 3 + 3 / 4 + 1 / 2) / 3)
    absent = score.confusion(torch.zeros(4, dtype=torch.int64), torch.zeros(4), 3)
    assert score.dice(absent, 2) == 1
    assert score.mean_iou(absent) == 1


def shown(count, side=40):
    generator = torch.Generator().manual_seed(1)
    return [
        score.Shown(
            torch.rand(3, side, side, generator=generator),
            torch.randint(0, 3, (side, side), generator=generator).to(torch.uint8),
            f"g{k % 2}",
            str(k),
        )
        for k in range(count)
    ]


def test_summary_names_classes_and_groups():
    items = shown(3)
    counts = [score.confusion(item.labels, item.labels, 3) for item in items]
    scores = score.summary(counts, items, ("a", "b", "c"))
    assert scores["miou"] == scores["b_dice_g1"] == scores["c_dice_per_image"] == 1
    assert score.monitored(scores, "dice:b") == 1


def test_a_class_that_nothing_shows_has_no_score():
    items = [replace(item, labels=item.labels % 2) for item in shown(3)]
    items[1].labels.zero_()  # all of group g1
    counts = [score.confusion(item.labels, item.labels, 3) for item in items]
    scores = score.summary(counts, items, ("a", "b", "no data"))
    assert not [key for key in scores if key.startswith("no data")]
    assert "b_dice_g0" in scores
    assert "b_dice_g1" not in scores
    assert scores["miou"] == scores["b_dice_per_image"] == 1
    counts[0][0, 2] += 100  # found where it is not: what is there pays for it
    assert score.summary(counts, items, ("a", "b", "no data")).keys() == scores.keys()
    assert score.summary(counts, items, ("a", "b", "no data"))["a_iou"] < 1


def test_lengths_and_windows_run_to_the_end():
    scores = score.by_length(predictor(), shown(3), "a", 0, per_side=2)
    assert set(scores) == {
        f"a_dice_{what}_100_tokens"
        for what in ("per_image", "same_images_alone", "block_border", "block_inside")
    }
    assert all(0 <= value <= 1 for value in scores.values())
    assert 0 <= score.by_windows(predictor(), shown(2, 70), ("a", "b", "c"))["miou_in_windows"] <= 1


def test_windows_see_only_themselves():
    whole = predictor()
    parts = replace(whole, window_px=40)
    images = torch.rand(1, 3, 70, 100)
    found = parts.labels(images)
    assert found.shape == (1, 70, 100)
    for y in range(0, 70, 40):
        for x in range(0, 100, 40):
            window = (slice(y, y + 40), slice(x, x + 40))
            alone = whole.labels(images[:, :, *window])
            assert torch.equal(found[:, *window], alone)
    assert not torch.equal(found, whole.labels(images))
    assert torch.equal(parts.labels(images[..., :40, :40]), whole.labels(images[..., :40, :40]))
