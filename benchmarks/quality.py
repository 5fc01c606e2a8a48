"""Quality, alike for alike: `python -m benchmarks.quality TABLE --data FILE --json OUT`.

Every row of a table is trained on the same data with the same canvases, loss, optimiser, seed and
minutes, and scored on the same held-out groups. TABLE is one of

- peers: Vim-Ti and Vim nano, a U-Net (MONAI's), and a network of DeiT-Ti's shape (timm's) with the
  linear head of ours; canvases up to 16 blocks, as attention over more would see few of them;
- orders: scan orders, everything else equal; by length of the sequence and at block borders;
- strides: patches of 8 px every 8, of 16 every 16, and of 16 every 8;
- directions: the paper's bidirectional variants.

Meant for one GPU; `--steps` in place of `--minutes` makes a quick trial anywhere. MONAI and timm
are wanted for `peers` only, and are no dependencies of gigavim.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from gigavim.model.config import VimConfig
from gigavim.model.heads import LinearHead, stitch
from gigavim.model.segmentation import SegmentationModel
from gigavim.training import loop, score
from gigavim.training.atlas import Atlas
from gigavim.training.canvas import Canvases
from gigavim.training.pack import read_pack, split
from gigavim.training.recipe import Recipe, load_recipe
from gigavim.training.run import fast_products, new_model, pick_device

MOSAIC_SIDES = (3, 11, 34)
PEER_BLOCKS = 16


@dataclass(frozen=True)
class Row:
    """A row of a table: what is trained."""

    name: str
    recipe: Recipe
    make: Callable[[Recipe], nn.Module]


def with_parts(recipe: Recipe, **parts: dict[str, Any]) -> Recipe:
    """A copy of a recipe with other values in some sections."""
    updates = {
        name: getattr(recipe, name).model_copy(update=values) for name, values in parts.items()
    }
    return recipe.model_copy(update=updates)


def with_encoder(recipe: Recipe, **changes: Any) -> Recipe:
    return with_parts(recipe, model={"encoder": replace(recipe.model.encoder, **changes)})


class DeiTTiny(nn.Module):
    """DeiT-Ti without class token, its learned positions resized, and our linear head."""

    def __init__(self, classes: int, patch_px: int) -> None:
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer

        self.patch_px = patch_px
        self.body = VisionTransformer(
            img_size=256, patch_size=patch_px, embed_dim=192, depth=12, num_heads=3, num_classes=0,
            class_token=False, global_pool="", dynamic_img_size=True, drop_path_rate=0.1,
        )  # fmt: skip
        self.head = LinearHead(VimConfig(d_model=192, depth=12, patch_px=patch_px), classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to logits (B, classes, H, W)."""
        rows, cols = (side // self.patch_px for side in images.shape[2:])
        patches = self.head.decode(self.body.forward_features(images))
        return stitch(patches.float(), (rows, cols), self.patch_px)


def unet(recipe: Recipe) -> nn.Module:
    from monai.networks.nets import BasicUNet

    widths = (64, 64, 128, 256, 512, 64)  # twice the default: 7.9 M parameters, as Vim-Ti has 7.1
    return BasicUNet(2, in_channels=3, out_channels=len(recipe.classes), features=widths)


def deit(recipe: Recipe) -> nn.Module:
    return DeiTTiny(len(recipe.classes), recipe.model.encoder.patch_px)


def peers(recipe: Recipe) -> list[Row]:
    recipe = with_parts(recipe, schedule={"largest_blocks": PEER_BLOCKS})
    nano = with_encoder(recipe, d_model=96, depth=11)
    return [
        Row("Vim-Ti", with_encoder(recipe, d_model=192, depth=24), new_model),
        Row("Vim nano", nano, new_model),
        Row("U-Net (MONAI BasicUNet)", recipe, unet),
        Row("DeiT-Ti + linear head", recipe, deit),
    ]


def orders(recipe: Recipe) -> list[Row]:
    names = ("blocks(16)", "blocks(16, hilbert)", "raster", "serpentine", "hilbert")
    return [Row(name, with_parts(recipe, model={"order": name}), new_model) for name in names]


def strides(recipe: Recipe) -> list[Row]:
    pairs = ((8, 8), (16, 16), (16, 8))
    return [
        Row(
            f"patch {patch} stride {stride}",
            with_encoder(recipe, patch_px=patch, stride_px=stride),
            new_model,
        )
        for patch, stride in pairs
    ]


def directions(recipe: Recipe) -> list[Row]:
    kinds = ("v2", "v1", "none")
    return [Row(kind, with_encoder(recipe, bidirectional=kind), new_model) for kind in kinds]


TABLES = {"peers": peers, "orders": orders, "strides": strides, "directions": directions}


@dataclass(frozen=True)
class Peer:
    """Labels pictures with a network that takes sides that are multiples of 32 px."""

    model: nn.Module
    canvases: Canvases

    @torch.no_grad()
    def labels(self, images: Tensor) -> Tensor:
        """See `score.Labeller`."""
        height, width = images.shape[2:]
        padded = score.whole(images, 32)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            logits = self.model(self.canvases.normalise(padded))
        return logits[..., :height, :width].max(1).indices.to(torch.uint8)


def train(row: Row, atlas: Atlas) -> tuple[nn.Module, loop.Progress, int]:
    """Train a row; returns the averaged model, its progress and the pixels it saw."""
    canvases, device = Canvases(atlas, row.recipe), atlas.device
    torch.manual_seed(row.recipe.schedule.seed)
    model = row.make(row.recipe).to(device)
    if isinstance(model, SegmentationModel):
        generator = Generator(device).manual_seed(row.recipe.schedule.seed)
        loop.init_patch_embedding(model, canvases.draw((2, 2), 16, generator)[0])
        forward = loop.vim_forward(model, row.recipe)
    else:

        def forward(images: Tensor, every: int, generator: Generator | None) -> Tensor:
            logits: Tensor = model(images)
            return logits

    pixels = 0

    def count(progress: loop.Progress, loss: float, tokens: int) -> bool:
        nonlocal pixels
        pixels += tokens * row.recipe.model.encoder.stride_px**2
        return False

    progress = loop.start(model, row.recipe)
    objective = loop.segmentation(forward, row.recipe)
    loop.train(model.train(), canvases, progress, objective, on_step=count)
    model.load_state_dict(progress.average)
    return model.eval(), progress, pixels


def measure(
    row: Row, model: nn.Module, atlas: Atlas, shown: list[score.Shown], *, long: bool
) -> Any:
    """Scores of a trained row; by length too where pictures are small and the model a Vim."""
    recipe, names = row.recipe, row.recipe.class_names
    labeller: score.Labeller = Peer(model, Canvases(atlas, recipe))
    if isinstance(model, SegmentationModel):
        labeller = score.Predictor(
            model, recipe.model.scan_order, recipe.model.mean, recipe.model.std,
            half=atlas.device.type == "cuda",
        )  # fmt: skip
    found = score.predict_all(labeller, shown)
    pairs = zip(found, shown, strict=True)
    counts = [score.confusion(f, item.labels, len(names)) for f, item in pairs]
    scores = score.summary(counts, shown, names)
    result = {recipe.loss.monitor: score.monitored(scores, recipe.loss.monitor)}
    result |= {"miou": scores["miou"]} | {f"{name} IoU": scores[f"{name}_iou"] for name in names}
    if long and isinstance(labeller, score.Predictor):
        name = recipe.loss.monitor.partition(":")[2] or names[-1]
        for side in MOSAIC_SIDES if atlas.device.type == "cuda" else MOSAIC_SIDES[:1]:
            result |= score.by_length(labeller, shown, name, names.index(name), per_side=side)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--recipe", default="histo-nuclei")
    parser.add_argument("--data", type=Path, required=True, help="made with `gigavim train --pack`")
    parser.add_argument("--minutes", type=float, help="per row")
    parser.add_argument("--steps", type=int, help="per row, in place of minutes")
    parser.add_argument("--only", help="rows whose name contains this")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    recipe = load_recipe(options.recipe, steps=options.steps, max_minutes=options.minutes)
    device = pick_device(options.device)
    train_on, held_out = split(read_pack(options.data, recipe), recipe)
    atlas = Atlas(train_on, device)
    shown = [score.show(picture, recipe.model.mpp, device) for picture in held_out]
    small = max(max(item.labels.shape) for item in shown) <= 512
    table: dict[str, Any] = {}
    with fast_products(device, workers=1):
        for row in TABLES[options.table](recipe):
            if options.only and options.only not in row.name:
                continue
            began = time.monotonic()
            model, progress, pixels = train(row, atlas)
            scores = measure(row, model, atlas, shown, long=small and options.table == "orders")
            facts = {
                "parameters": sum(p.numel() for p in model.parameters()),
                "steps": progress.step,
                "training_seconds": round(progress.seconds, 1),
                "megapixels": round(pixels / 1e6),
            }
            table[row.name] = facts | {key: round(value, 4) for key, value in scores.items()}
            print(f"{row.name}: {json.dumps(table[row.name])}", flush=True)
            print(f"  {time.monotonic() - began:.0f} s in all", flush=True)
            if options.json:
                about = {
                    "table": options.table,
                    "recipe": recipe.model.name,
                    "device": torch.cuda.get_device_name(device)
                    if device.type == "cuda"
                    else "CPU",
                    "rows": table,
                }
                options.json.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
