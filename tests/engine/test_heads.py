"""Heads over a whole slide, cut as one likes: the labels are those of the whole grid at once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gigavim.engine.decode import decode_strips, mean_probabilities
from gigavim.frames import MapFrame
from gigavim.model.config import VimConfig
from gigavim.model.heads import make_head, stitch
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


@pytest.mark.parametrize("kind", ["linear", "fpn"])
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
