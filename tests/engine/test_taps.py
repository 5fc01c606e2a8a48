"""A slide through a model whose head reads layers in between: as the plain model does it."""

import numpy as np
import pytest
import tifffile
import torch

from gigavim.config import Settings
from gigavim.engine.plan import plan_sweep
from gigavim.model.checkpoint import load_model, save_model
from gigavim.model.config import VimConfig
from gigavim.model.segmentation import SegmentationModel
from gigavim.model.vim import Vim
from gigavim.segmentation import segment

HEADS = ["fpn", "upernet", "segmenter"]


def saved(folder, make_card, head, **changes):
    torch.manual_seed(5)
    sizes = {"patch_px": 8, "stride_px": 8, "bidirectional": "v2"} | changes
    config = VimConfig(
        d_model=32, depth=4, class_token="none", pooling="mean", position="block", grid_hw=(4, 4),
        divide_out=sizes["bidirectional"] == "v2", **sizes,
    )  # fmt: skip
    model = SegmentationModel(Vim(config), 3, head)
    save_model(folder, model, make_card(config).model_copy(update={"head": head}))
    return folder


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "changes", [{}, {"stride_px": 4}, {"bidirectional": "layer_pairs"}], ids=str
)
@pytest.mark.parametrize("where", ["auto", "disk"])
def test_streamed_labels_are_those_of_the_model(
    head, changes, where, make_slide, make_card, tmp_path, monkeypatch
):
    folder = saved(tmp_path / "model", make_card, head, **changes)
    slide = make_slide(size=(300, 420), mpp=0.5)
    if where == "disk":
        import gigavim.pipeline

        def on_disk(*arguments, **options):
            from dataclasses import replace

            return replace(plan_sweep(*arguments, **options), location="disk", chunk=97)

        monkeypatch.setattr(gigavim.pipeline, "plan_sweep", on_disk)
    settings = Settings().with_flags(
        model={"name": str(folder)},
        tokens={"tissue": "none"},
        compute={"precision": "fp32", "threads": 1},
        output={"directory": str(tmp_path / "out"), "formats": ["ome-tiff"]},
    )
    (tmp_path / "out").mkdir()
    found = tifffile.imread(segment(slide, settings=settings).outputs["ome-tiff"])
    model, card = load_model(folder)
    pixels = tifffile.imread(slide)
    height, width = pixels.shape[:2]
    config, side = card.config, 4 * card.config.stride_px
    extra = config.patch_px - config.stride_px
    more = [(0, -(n - extra) % side) for n in (height, width)]
    padded = np.pad(pixels, (*more, (0, 0)), mode="symmetric")
    mean, std = (torch.tensor(v)[:, None, None] for v in (card.mean, card.std))
    image = (torch.from_numpy(padded).permute(2, 0, 1) / 255 - mean) / std
    with torch.inference_mode():
        logits = model(image[None].float(), card.scan_order)[0, :, :height, :width]
    best, second = logits.topk(2, 0).values
    sure = (best - second > 1e-4).numpy()
    assert sure.mean() > 0.98
    np.testing.assert_array_equal(found[sure], logits.argmax(0).numpy()[sure])


@pytest.mark.parametrize("head", HEADS)
def test_the_plan_counts_what_the_taps_keep(head):
    config = VimConfig(d_model=32, depth=2, class_token="none", pooling="mean", position="none")
    model = SegmentationModel(Vim(config), 3, head)
    plans = [
        plan_sweep(
            100_000, model.encoder.block_weights(), device="cpu", precision="fp32",
            side_width=width, estimate=False,
        )
        for width in (0, model.head.side_width)
    ]  # fmt: skip
    assert plans[1].ram_bytes - plans[0].ram_bytes == 4 * 100_000 * model.head.side_width
    if not model.head.taps:
        assert model.head.side_width == 0
    assert "stream" in "".join(plans[1].describe())
