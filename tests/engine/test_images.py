"""Images in batches give what the model's own forward pass gives."""

import pytest
import torch

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
