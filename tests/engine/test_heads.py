"""Heads over a whole slide, cut as one likes: the labels are those of the whole grid at once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gigavim.engine.decode import decode_strips, decode_window, mean_probabilities, survey
from gigavim.frames import MapFrame
from gigavim.model.config import VimConfig
from gigavim.model.head_kinds import make_head
from gigavim.model.heads import stitch
from gigavim.model.windows import windows
from gigavim.tokens.grid import TokenGrid, select_tokens
from gigavim.tokens.order import ScanOrder

CLASSES = 3


def grid_of(rows, cols, patch, stride, order, trim):
    height, width = ((n - 1) * stride + patch - trim for n in (rows, cols))
    frame = MapFrame(width, height, 0, 0, 1.0, 1.0, 0.5, 0.5, None)
    return TokenGrid(frame, patch, stride, rows, cols, order)


def head_of(kind, patch, stride):
    torch.manual_seed(3)
    config = VimConfig(
        d_model=32, depth=4, patch_px=patch, stride_px=stride, class_token="none", pooling="mean",
        position="none",
    )  # fmt: skip
    return make_head(kind, config, CLASSES).double().eval()


def whole(head, features, kept, cells, grid):
    """(classes, H, W) logits of the grid at once."""
    seen = torch.zeros(grid.rows * grid.cols, features.shape[1], dtype=torch.double)
    seen[torch.from_numpy(cells)] = features
    seen = seen.view(1, grid.rows, grid.cols, -1)
    with torch.no_grad():
        patches = head.decode(seen, torch.from_numpy(kept)[None])
    patches = patches * torch.from_numpy(kept)[None, :, :, None, None, None]
    return patches[0], stitch(patches.flatten(1, 2), (grid.rows, grid.cols), grid.stride_px)[0]


@pytest.mark.parametrize("kind", ["linear", "fpn", "upernet", "segmenter"])
@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    sizes=st.sampled_from([(8, 8), (16, 16), (8, 4), (6, 6), (9, 5), (2, 2)]),
    cut=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    density=st.floats(0.1, 1.0),
    seed=st.integers(0, 1000),
)
def test_labels_do_not_depend_on_how_the_grid_is_cut(kind, size, sizes, cut, density, seed):
    (rows, cols), (patch, stride) = size, sizes
    random = np.random.default_rng(seed)
    grid = grid_of(rows, cols, patch, stride, ScanOrder("serpentine"), trim=seed % 2)
    kept = random.random((rows, cols)) < density
    selection, head = select_tokens(grid, kept), head_of(kind, patch, stride)
    features = torch.from_numpy(random.normal(size=(len(selection), head.feature_width)))
    patches, logits = whole(head, features, kept, selection.cells, grid)
    with torch.inference_mode():
        strips = list(
            decode_strips(
                lambda index: features[index], head, grid, selection,
                rows_at_once=cut[0], cols_at_once=cut[1],
            )
        )  # fmt: skip
        shares = mean_probabilities(
            lambda index: features[index], head, selection, 0, len(selection)
        ) if len(selection) else None  # fmt: skip
    found = np.concatenate([strip.labels for strip in strips])
    seen = logits.numpy()[:, : found.shape[0], : found.shape[1]]
    chosen = np.take_along_axis(seen, found[None].astype(np.int64), 0)[0]
    assert found.shape == (grid.frame.height_px, grid.frame.width_px)
    np.testing.assert_allclose(chosen, seen.max(0), atol=1e-5)
    assert sum(strip.tokens for strip in strips) == len(selection)
    if shares is not None:
        own = patches.flatten(0, 1)[torch.from_numpy(selection.cells)].softmax(1).mean((2, 3))
        torch.testing.assert_close(shares.double(), own, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["fpn", "upernet", "segmenter"])
@settings(max_examples=15, deadline=None)
@given(
    size=st.tuples(st.integers(1, 45), st.integers(1, 45)),
    sizes=st.sampled_from([(8, 8), (8, 4), (9, 5)]),
    cut=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    density=st.sampled_from([0.1, 0.6, 1.0]),
    seed=st.integers(0, 1000),
)
def test_every_logit_is_that_of_the_whole_grid(kind, size, sizes, cut, density, seed):
    (rows, cols), random = size, np.random.default_rng(seed)
    kept = random.random((rows, cols)) < density
    kept[rows // 2, cols // 2] = True
    grid = grid_of(rows, cols, *sizes, ScanOrder("serpentine"), trim=0)
    selection, head = select_tokens(grid, kept), head_of(kind, *sizes).float()
    features = torch.from_numpy(random.normal(size=(len(selection), head.feature_width))).float()
    seen = torch.zeros(rows * cols, head.feature_width)
    seen[torch.from_numpy(selection.cells.astype(np.int64))] = features
    with torch.inference_mode():
        mask = None if kept.all() else torch.from_numpy(kept)[None]
        expected = head.decode(seen.view(1, rows, cols, -1), mask)[0]
        context = survey(lambda index: features[index], head, selection)
        for top in range(0, rows, cut[0]):
            strip = (top, min(top + cut[0], rows))
            for w in windows(strip, (rows, cols), halo=head.halo, cols_at_once=cut[1]):
                row, col, logits = decode_window(
                    lambda index: features[index], head, selection, w, context
                )
                own = expected[row + w.top, col + w.left]
                torch.testing.assert_close(logits, own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["fpn", "upernet", "segmenter"])
@pytest.mark.parametrize("hw", [(6, 7), (16, 16)])
def test_every_parameter_of_a_decoder_learns(kind, hw):
    head = head_of(kind, 8, 8).train()
    torch.manual_seed(1)
    side = sum(head.side(k, torch.randn(2, hw[0] * hw[1], 32).double()) for k in head.taps)
    encoded = torch.randn(2, hw[0] * hw[1], 32).double()
    features = head.features(encoded, side if head.taps else None)
    logits = head.decode(features.view(2, *hw, -1))
    (logits * torch.randn_like(logits)).sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_surveying_head_sees_tokens_that_are_far_away():
    head = head_of("upernet", 8, 8)
    features = torch.randn(1, 60, 40, head.feature_width).double()
    changed = features.clone()
    changed[:, -1, -1] += 100
    with torch.inference_mode():
        before, after = (head.decode(x)[:, 0, 0] for x in (features, changed))
    assert (before - after).abs().max() > 1e-6
