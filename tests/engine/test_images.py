"""Images in batches give what the model's own forward pass gives."""

import pytest
import torch

from gigavim.engine import images as engine
from gigavim.engine.images import ImageEncoder
from gigavim.model.config import VimConfig
from gigavim.model.vim import Vim


@pytest.mark.parametrize("bidirectional", ["v2", "v1", "none", "layer_pairs"])
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (8, 8)], ids=str)
def test_batches_meet_the_model(bidirectional, size):
    torch.manual_seed(0)
    config = VimConfig(
        d_model=32, depth=2, patch_px=8, stride_px=8, class_token="middle", pooling="class",
        position="grid", grid_hw=(4, 4), num_classes=5, bidirectional=bidirectional,
    )  # fmt: skip
    model = Vim(config).eval()
    images = torch.randn(3, 3, *size)
    found = ImageEncoder(model, precision="fp32")(images)
    with torch.no_grad():
        expected = model(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("most", [1, 700, 1100, 10_000])
def test_large_batches_are_encoded_in_parts(monkeypatch, most):
    torch.manual_seed(0)
    model = Vim(VimConfig(d_model=32, depth=2, patch_px=8, stride_px=8, grid_hw=(4, 4))).eval()
    images = torch.randn(5, 3, 32, 32)
    whole = ImageEncoder(model, precision="fp32")(images)
    monkeypatch.setattr(engine, "PART_ELEMENTS", most)
    assert torch.equal(ImageEncoder(model, precision="fp32")(images), whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_recorded_batches_give_the_same_bits():
    torch.manual_seed(0)
    model = Vim(VimConfig(d_model=32, depth=2, patch_px=8, stride_px=8, grid_hw=(4, 4))).eval()
    encoder = ImageEncoder(model, device="cuda")
    batches = [torch.randn(3, 3, *size) for size in [(32, 32), (24, 40)] * 3 for _ in range(2)]
    plain = [ImageEncoder(model, device="cuda")(images) for images in batches]  # first calls
    for i, (images, expected) in enumerate(zip(batches, plain, strict=True)):
        with torch.inference_mode(mode=i % 3 == 0):
            assert torch.equal(encoder(images), expected)
