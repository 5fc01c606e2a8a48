"""From images to label logits: patches, orders, overlap, folded normalisation."""

import numpy as np
import pytest
import torch

from gigavim.errors import ModelError
from gigavim.model.config import VimConfig
from gigavim.model.heads import stitch
from gigavim.model.segmentation import SegmentationModel
from gigavim.model.vim import Vim
from gigavim.tokens.order import ScanOrder


def _model(**changes) -> SegmentationModel:
    settings = {
        "d_model": 16,
        "depth": 2,
        "patch_px": 4,
        "stride_px": 4,
        "class_token": "none",
        "pooling": "mean",
        "grid_hw": (5, 7),
    }
    torch.manual_seed(3)
    return SegmentationModel(Vim(VimConfig(**(settings | changes))), 3).eval()


@pytest.mark.parametrize("kind", ["none", "head", "middle", "double"])
def test_raster_order_is_no_order(kind):
    model = _model(class_token=kind, pooling="mean" if kind == "none" else "class")
    images = torch.randn(2, 3, 20, 28)
    logits = model(images)
    assert logits.shape == (2, 3, 20, 28)
    torch.testing.assert_close(model(images, ScanOrder("raster")), logits)


@pytest.mark.parametrize("order", ["serpentine", "hilbert", "blocks(2)", "blocks(3, hilbert)"])
def test_patches_come_back_to_their_place_in_any_order(order):
    model = _model(depth=1, position="none")
    mixer = model.encoder.layers[0].mixer
    with torch.no_grad():
        mixer.out_proj.weight.zero_()  # no token sees another, so the order may not matter
    images = torch.randn(1, 3, 20, 28)
    torch.testing.assert_close(model(images, ScanOrder.parse(order)), model(images))


def test_order_matters_to_a_model_that_mixes():
    model = _model()
    images = torch.randn(1, 3, 20, 28)
    assert not torch.allclose(model(images, ScanOrder.parse("hilbert")), model(images), atol=1e-4)


def test_serpentine_on_one_row_is_raster():
    model = _model()
    images = torch.randn(1, 3, 4, 28)
    torch.testing.assert_close(model(images, ScanOrder("serpentine")), model(images))


def test_overlapping_patches_are_averaged():
    rows, cols, patch_px, stride_px = 4, 3, 4, 2
    patches = torch.randn(2, rows * cols, 3, patch_px, patch_px)
    total = torch.zeros(2, 3, 10, 8)
    count = torch.zeros(10, 8)
    for i in range(rows * cols):
        y, x = i // cols * stride_px, i % cols * stride_px
        total[:, :, y : y + patch_px, x : x + patch_px] += patches[:, i]
        count[y : y + patch_px, x : x + patch_px] += 1
    torch.testing.assert_close(stitch(patches, (rows, cols), stride_px), total / count)


def test_a_model_with_overlap_covers_every_pixel():
    logits = _model(stride_px=2)(torch.randn(1, 3, 12, 18))
    assert logits.shape == (1, 3, 12, 18)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("size_hw", [(3, 8), (8, 10), (0, 8)])
def test_an_image_that_patches_do_not_cover_is_refused(size_hw):
    with pytest.raises(ModelError, match="pad or crop"):
        _model()(torch.zeros(1, 3, *size_hw))


def test_an_image_smaller_than_a_patch_has_no_tokens():
    with pytest.raises(ModelError, match="smaller than the model's patch of 4 px"):
        _model().encoder.tokens(torch.zeros(1, 3, 3, 8))


def test_folded_weights_take_raw_pixels():
    model = _model(stride_px=3)
    mean, std = (0.7, 0.5, 0.6), (0.2, 0.25, 0.1)
    weight, bias = model.encoder.patch_embed.fold_normalisation(mean, std)
    pixels = np.random.default_rng(0).integers(0, 256, (10, 13, 3), dtype=np.uint8)
    normalised = (torch.from_numpy(pixels) / 255 - torch.tensor(mean)) / torch.tensor(std)
    wanted = model.encoder.patch_embed(normalised.permute(2, 0, 1)[None].float())[0]
    for row in range(3):
        for col in range(4):
            patch = pixels[row * 3 : row * 3 + 4, col * 3 : col * 3 + 4].reshape(-1)
            found = weight @ torch.from_numpy(patch).float() + bias
            torch.testing.assert_close(found, wanted[row, col], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "max", "last"])
def test_pooling_without_a_class_token(pooling):
    model = _model(pooling=pooling, num_classes=5).encoder
    images = torch.randn(2, 3, 20, 28)
    encoded = model.encode(model.tokens(images))
    wanted = {
        "mean": model.head(encoded.mean(1)),
        "max": model.head(encoded).max(1).values,
        "last": model.head(encoded[:, -1]),
    }
    torch.testing.assert_close(model(images), wanted[pooling])


def test_random_offsets_move_waves_only():
    images = torch.randn(1, 3, 20, 28)
    waves = _model(position="sincos", token_um=2.0)
    moved = waves(images, origin_um=(500.0, 300.0))
    assert not torch.allclose(moved, waves(images), atol=1e-4)
    learned = _model()
    assert torch.equal(learned(images, origin_um=(500.0, 300.0)), learned(images))


def test_training_reaches_every_parameter_and_recomputation_changes_nothing():
    order = ScanOrder.parse("blocks(4)")
    images = torch.randn(2, 3, 32, 32)
    gradients = []
    for again in (False, True):
        model = _model(position="block", grid_hw=(4, 4)).train()
        model.encoder.checkpoint_blocks = again
        model(images, order).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(g is not None and g.abs().max() > 0 for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
