import numpy as np
import pytest
import torch

from gigavim.training import evaluate
from gigavim.training.recipe import IGNORED


def square(offset, side=40):
    labels = torch.zeros(side, side, dtype=torch.uint8)
    labels[10 + offset : 30 + offset, 10:30] = 1
    return labels


@pytest.mark.parametrize(("offset", "least", "most"), [(0, 1, 1), (2, 1, 1), (5, 0.4, 0.8)])
def test_boundaries_within_tolerance_count(offset, least, most):
    counts = evaluate.boundary_counts(square(offset), square(0), 1, 2)
    assert least <= evaluate.boundary_f1(counts) <= most


def test_boundaries_of_absent_classes():
    counts = evaluate.boundary_counts(square(0), square(0), 2, 2)
    assert evaluate.boundary_f1(counts) == 1
    missed = evaluate.boundary_counts(square(0), square(0) * 0, 1, 2)
    assert evaluate.boundary_f1(missed) == 0
    ignored = torch.full((40, 40), IGNORED, dtype=torch.uint8)
    assert evaluate.boundary_counts(square(0), ignored, 1, 2).tolist() == [0, 0, 0, 0]


def test_calibration_by_hand():
    calibration = evaluate.Calibration.empty()
    probability = torch.tensor([[0.9, 0.9, 0.6, 0.6], [0.1, 0.1, 0.4, 0.4]]).view(2, 1, 4)
    calibration.add(probability, torch.tensor([[0, 1, 0, IGNORED]]))
    report = calibration.report()
    # two pixels at 0.9 are right half the time, one at 0.6 always
    expected = (2 * abs(0.9 - 0.5) + abs(0.6 - 1)) / 3
    assert report["expected_calibration_error"] == pytest.approx(expected, abs=1e-6)
    assert sum(row["pixels"] for row in report["bins"]) == 3


def test_the_sheet_shows_mistakes_only(pictures_folder, recipe):
    from gigavim.training.pack import read_pictures

    picture = next(read_pictures(pictures_folder, recipe))
    found = picture.labels.copy()
    found[:20] = 2
    classes = [c.spec for c in recipe.classes]
    page = np.asarray(evaluate.sheet([evaluate.Seen(picture, found)], classes))
    column = page[24:, 3 * (evaluate.SHEET_PX + evaluate.GAP_PX) + evaluate.GAP_PX :]
    shown = (column == np.array(recipe.classes[2].color_rgb)).all(-1)
    assert shown[:20].any()
    assert not shown[20:].any()
