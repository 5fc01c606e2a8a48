"""Quality, alike for alike: `python -m benchmarks.quality TABLE --data FILE --json OUT`.

Every row of a table is trained on the same data with the same canvases, loss, optimiser, seed and
minutes, and scored on the same held-out groups. TABLE is one of

- peers: Vim-Ti with either head and Vim nano, a U-Net (MONAI's), and a network of DeiT-Ti's shape
  (timm's) with the linear head of ours; canvases up to 16 blocks, as attention over more would see
  few of them;
- orders: scan orders, everything else equal; by length of the sequence and at block borders;
- strides: patches of 8 px every 8, of 16 every 16, and of 16 every 8, from scratch and going on
  from the row before, as the paper's long-sequence fine-tuning does;
- heads: what turns tokens into pixels;
- directions: the paper's bidirectional variants (its Table 4). "Bidirectional sequence", which
  turns sequences at random, is not among them: canvases are turned at random in every row;
- class_tokens: where the class token stands, and pooling (its Table 5), on the classification of
  canvases that `benchmarks.image_level` explains.

Meant for one GPU; `--steps` in place of `--minutes` makes a quick trial anywhere. MONAI and timm
are wanted for `peers` only, and are no dependencies of gigavim; rows that need them are left out
where they are not installed.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Generator, Tensor, nn

from benchmarks import image_level
from gigavim.model.config import HeadKind, VimConfig
from gigavim.model.heads import LinearHead, stitch
from gigavim.model.pictures import mirrored_to
from gigavim.model.segmentation import SegmentationModel
from gigavim.training import loop, score
from gigavim.training.atlas import Atlas
from gigavim.training.canvas import Canvases
from gigavim.training.pack import Picture, read_pack, split
from gigavim.training.recipe import Recipe, load_recipe
from gigavim.training.run import fast_products, hardware, new_model, pick_device

MOSAIC_SIDES = (3, 11, 34)
PEER_BLOCKS = 16


@dataclass(frozen=True)
class Row:
    """A row of a table: what is trained."""

    name: str
    recipe: Recipe
    make: Callable[[Recipe], nn.Module] = new_model
    goes_on_from: str | None = None
    """The row whose weights, where they fit, it starts from, at a third of the learning rate."""
    is_image_level: bool = False


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
        config = VimConfig(d_model=192, depth=12, patch_px=patch_px, stride_px=patch_px)
        self.head = LinearHead(config, classes)

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
    tiny = with_encoder(recipe, d_model=192, depth=24)
    nano = with_encoder(recipe, d_model=96, depth=11)
    linear, fpn = ({"head": kind, "head_width": 0} for kind in ("linear", "fpn"))
    return [
        Row("Vim-Ti + linear head", with_parts(tiny, model=linear)),
        Row("Vim-Ti + fpn head", with_parts(tiny, model=fpn)),
        Row("Vim nano + linear head", with_parts(nano, model=linear)),
        Row("U-Net (MONAI BasicUNet)", recipe, unet),
        Row("DeiT-Ti + linear head", recipe, deit),
    ]


def orders(recipe: Recipe) -> list[Row]:
    side = recipe.model.scan_order.block or 16
    names = (f"blocks({side})", f"blocks({side}, hilbert)", "raster", "serpentine", "hilbert")
    return [Row(name, with_parts(recipe, model={"order": name})) for name in names]


def strides(recipe: Recipe) -> list[Row]:
    pairs = ((8, 8), (16, 16), (16, 8))
    rows = [
        Row(
            f"patch {patch} stride {stride}", with_encoder(recipe, patch_px=patch, stride_px=stride)
        )
        for patch, stride in pairs
    ]
    return [*rows, Row(f"{rows[1].name}, then stride 8", rows[2].recipe, new_model, rows[1].name)]


def heads(recipe: Recipe) -> list[Row]:
    return [
        Row(kind, with_parts(recipe, model={"head": kind, "head_width": 0}))
        for kind in get_args(HeadKind)
    ]


def directions(recipe: Recipe) -> list[Row]:
    return [
        Row(kind, with_encoder(recipe, bidirectional=kind, divide_out=kind == "v2"))
        for kind in ("none", "layer_pairs", "v1", "v2")
    ]


def class_tokens(recipe: Recipe) -> list[Row]:
    largest = min(4, recipe.schedule.largest_blocks)
    recipe = with_parts(recipe, schedule={"largest_blocks": largest})
    kinds = [(kind, "class") for kind in ("middle", "head", "double")]
    return [
        Row(
            f"class token: {kind}" if kind != "none" else f"no class token, {pooling} pooling",
            with_encoder(recipe, class_token=kind, pooling=pooling),
            is_image_level=True,
        )
        for kind, pooling in [*kinds, ("none", "mean"), ("none", "max")]
    ]


TABLES = {
    "peers": peers,
    "orders": orders,
    "strides": strides,
    "heads": heads,
    "directions": directions,
    "class_tokens": class_tokens,
}


@dataclass(frozen=True)
class Peer:
    """Labels pictures with a network that takes sides that are multiples of 32 px."""

    model: nn.Module
    canvases: Canvases

    @torch.no_grad()
    def labels(self, images: Tensor) -> Tensor:
        """See `score.Labeller`."""
        height, width = images.shape[2:]
        padded = mirrored_to(images, (-(-height // 32) * 32, -(-width // 32) * 32))
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            logits = self.model(self.canvases.normalise(padded))
        return logits[..., :height, :width].max(1).indices.to(torch.uint8)


def train(row: Row, atlas: Atlas, start: nn.Module | None) -> tuple[nn.Module, loop.Progress, int]:
    """Train a row from the weights of another, or from none.

    Returns:
        The averaged model, its progress and the pixels it saw.
    """
    canvases, device = Canvases(atlas, row.recipe), atlas.device
    torch.manual_seed(row.recipe.schedule.seed)
    model = row.make(row.recipe).to(device)
    if start is not None:
        take_over(model, start)
    if isinstance(model, SegmentationModel):
        if start is None:
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


def take_over(model: nn.Module, start: nn.Module) -> None:
    """Load the weights that another model has in the same shape: of another stride, the encoder."""
    own, given = model.state_dict(), start.state_dict()
    fitting = {name: w for name, w in given.items() if name in own and own[name].shape == w.shape}
    model.load_state_dict(own | fitting)


def measure(
    row: Row, model: nn.Module, atlas: Atlas, shown: list[score.Shown], *, long: bool
) -> Any:
    """Scores of a trained row; by length too where pictures are small and the model a Vim."""
    recipe, names = row.recipe, row.recipe.class_names
    labeller: score.Labeller = Peer(model, Canvases(atlas, recipe))
    if isinstance(model, SegmentationModel):
        labeller = score.Predictor(
            model, recipe.model.scan_order, recipe.model.mean, recipe.model.std,
            half=atlas.device.type == "cuda", tied=recipe.model.tied_rates,
        )  # fmt: skip
    found = score.predict_all(labeller, shown)
    pairs = zip(found, shown, strict=True)
    counts = [score.confusion(f, item.labels, len(names)) for f, item in pairs]
    scores = score.summary(counts, shown, names)
    result = {recipe.loss.monitor: score.monitored(scores, recipe.loss.monitor)}
    found_iou = {name: scores.get(f"{name}_iou") for name in names}
    result |= {"miou": scores["miou"]}
    result |= {f"{name} IoU": value for name, value in found_iou.items() if value is not None}
    if long and isinstance(labeller, score.Predictor):
        name = recipe.loss.monitor.partition(":")[2] or names[-1]
        for side in MOSAIC_SIDES if atlas.device.type == "cuda" else MOSAIC_SIDES[:1]:
            result |= score.by_length(labeller, shown, name, names.index(name), per_side=side)
    return result


@dataclass
class Bench:
    """The data, and what was trained so far."""

    atlas: Atlas
    held_out: list[Picture]
    by_length: bool
    done: dict[str, nn.Module] = field(default_factory=dict)

    def dense(self, row: Row) -> dict[str, float]:
        """Train and score a row that segments."""
        start = None
        if row.goes_on_from is not None:
            start = self.done[row.goes_on_from]
            rate = row.recipe.schedule.peak_rate / 3
            row = replace(row, recipe=with_parts(row.recipe, schedule={"peak_rate": rate}))
        model, progress, pixels = train(row, self.atlas, start)
        self.done[row.name] = model
        mpp, device = row.recipe.model.mpp, self.atlas.device
        shown = [score.show(picture, mpp, device) for picture in self.held_out]
        small = max(max(item.labels.shape) for item in shown) <= 512
        facts = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "steps": progress.step,
            "training_seconds": progress.seconds,
            "megapixels": pixels / 1e6,
        }
        return facts | measure(row, model, self.atlas, shown, long=small and self.by_length)

    def image_level(self, row: Row) -> dict[str, float]:
        """Train and score a row that classifies canvases."""
        unseen = Atlas(self.held_out, self.atlas.device)
        progress, scores = image_level.train(row.recipe, self.atlas, unseen)
        return {"steps": progress.step, "training_seconds": progress.seconds} | scores


def rows_of(table: str, recipe: Recipe, only: str | None) -> list[Row]:
    """The row called `only`, else those whose name contains it; and those that they go on from."""
    rows = TABLES[table](recipe)
    named = [row for row in rows if row.name == only]
    chosen = named or [row for row in rows if only is None or only in row.name]
    needed = {row.goes_on_from for row in chosen}
    return [row for row in rows if row in chosen or row.name in needed]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--recipe", default="histo-nuclei")
    parser.add_argument("--data", type=Path, required=True, help="made with `gigavim train --pack`")
    parser.add_argument("--minutes", type=float, help="per row")
    parser.add_argument("--steps", type=int, help="per row, in place of minutes")
    parser.add_argument("--only", help="the row of this name, or rows whose name contains it")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    recipe = load_recipe(options.recipe, steps=options.steps, max_minutes=options.minutes)
    device = pick_device(options.device)
    train_on, held_out = split(read_pack(options.data, recipe), recipe)
    bench = Bench(Atlas(train_on, device), held_out, options.table == "orders")
    table: dict[str, Any] = {}
    with fast_products(device, workers=1):
        for row in rows_of(options.table, recipe, options.only):
            began = time.monotonic()
            try:
                values = bench.image_level(row) if row.is_image_level else bench.dense(row)
                table[row.name] = {key: round(value, 4) for key, value in values.items()}
            except ImportError as error:
                table[row.name] = {"left out": str(error)}
            print(f"{row.name}: {json.dumps(table[row.name])}", flush=True)
            print(f"  {time.monotonic() - began:.0f} s in all", flush=True)
            if options.json:
                about = {
                    "table": options.table,
                    "recipe": recipe.model.name,
                    "device": hardware(device, 1),
                    "rows": table,
                }
                options.json.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
