"""Quality on held-out pictures: confusion, Dice and IoU; by picture, group, length and border."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gigavim.model.heads import Part
from gigavim.model.pictures import Look, side_slices
from gigavim.model.segmentation import SegmentationModel
from gigavim.model.windows import windows
from gigavim.tokens.order import ScanOrder
from gigavim.training.encode import encode
from gigavim.training.pack import Picture
from gigavim.training.recipe import IGNORED

WINDOW_TOKENS = 64
"""Side of the windows in which a grid is decoded."""
BATCH_PX = 1 << 22


@dataclass(frozen=True, slots=True)
class Shown:
    """A labelled picture at a model's resolution, on its device."""

    image: Tensor
    """(3, h, w) float32 in [0, 1]."""
    labels: Tensor
    """(h, w) uint8."""
    group: str
    name: str


class Labeller(Protocol):
    """Anything that labels pictures."""

    def labels(self, images: Tensor) -> Tensor:
        """(n, 3, h, w) in [0, 1] to (n, h, w) uint8."""
        ...


@dataclass(frozen=True, slots=True)
class Predictor:
    """A model with what it needs to see a picture as it was trained."""

    model: SegmentationModel
    order: ScanOrder
    mean: Sequence[float]
    std: Sequence[float]
    half: bool = False
    """Multiply in bfloat16."""
    tied: bool = False
    """Take the decay rates of a channel's states as tied, see `encode`."""
    chunk: int | None = None
    """Tokens of a layer at once on GPUs; None: the kernel's own choice."""
    window_px: int | None = None
    """Cut images into windows of this side and see each by itself, in place of whole images."""

    @torch.no_grad()
    def labels(self, images: Tensor) -> Tensor:
        """Label images (n, 3, h, w) in [0, 1], each in one sequence: returns (n, h, w) uint8."""
        height, width = images.shape[2:]
        config = self.model.encoder.config
        if config.stride_px != config.patch_px or self.window_px is not None:
            return self.logits(images).max(1).indices.to(torch.uint8)
        grid, patch = self._features(images), config.patch_px
        count, rows, cols, _ = grid.shape
        found = torch.empty(count, rows, patch, cols, patch, dtype=torch.uint8, device=grid.device)
        context = self.model.head.survey_grid(grid)
        for top in range(0, rows, WINDOW_TOKENS):
            strip = (top, min(top + WINDOW_TOKENS, rows))
            for window in windows(
                strip, (rows, cols), halo=self.model.head.halo, cols_at_once=WINDOW_TOKENS
            ):
                part = Part(window.top_seen, window.left_seen, (rows, cols), context)
                seen = self.model.head.decode(grid[:, *window.seen], None, part)
                logits = seen[:, *window.inner]
                labels = logits.max(3).indices.to(torch.uint8)  # (n, rows, cols, P, P)
                found[:, window.core[0], :, window.core[1]] = labels.transpose(2, 3)
        return found.view(count, rows * patch, cols * patch)[:, :height, :width]

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Segment images (n, 3, h, w) in [0, 1]: returns (n, classes, h, w) float32."""
        height, width = images.shape[2:]
        if self.window_px is not None and max(height, width) > self.window_px:
            return self._in_windows(images, self.window_px)
        return self.model.logits(self._features(images))[..., :height, :width]

    def _in_windows(self, images: Tensor, side: int) -> Tensor:
        height, width = images.shape[2:]
        found = images.new_empty(len(images), self.model.head.classes, height, width)
        for window in side_slices((height, width), side):
            found[:, :, *window] = self.logits(images[:, :, *window])
        return found

    def _features(self, images: Tensor) -> Tensor:
        """Mirror images to whole blocks, encode them: (n, rows, cols, features) float32."""
        look = Look(self.order, self.mean, self.std, every_cell=self.window_px is not None)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.half):
            run = partial(encode, self.model.encoder, chunk=self.chunk, tied=self.tied)
            found = look.features(self.model, images, run)
        return found.grid.float()


def show(picture: Picture, mpp: float, device: torch.device) -> Shown:
    """Bring a picture to a resolution: colours by area, labels by the largest share."""
    image = torch.tensor(picture.image).to(device).permute(2, 0, 1)[None].float() / 255
    labels = torch.tensor(picture.labels).to(device)
    size = tuple(max(1, round(s * picture.mpp / mpp)) for s in labels.shape)
    if size == tuple(labels.shape):
        return Shown(image[0], labels, picture.group, picture.name)
    image = F.interpolate(image, size, mode="bilinear", antialias=True)
    values = torch.unique(labels)
    shares = (labels == values[:, None, None]).float()[None]
    winner = F.interpolate(shares, size, mode="bilinear", antialias=True)[0].argmax(0)
    return Shown(image[0].clamp(0, 1), values[winner], picture.group, picture.name)


def predict_all(predictor: Labeller, shown: Sequence[Shown]) -> list[Tensor]:
    """Label every picture by itself, pictures of one size together."""
    found: dict[int, Tensor] = {}
    sizes: dict[tuple[int, ...], list[int]] = {}
    for place, item in enumerate(shown):
        sizes.setdefault(tuple(item.labels.shape), []).append(place)
    for size, places in sizes.items():
        step = max(1, BATCH_PX // (size[0] * size[1]))
        for start in range(0, len(places), step):
            batch = places[start : start + step]
            labels = predictor.labels(torch.stack([shown[p].image for p in batch]))
            found |= dict(zip(batch, labels, strict=True))
    return [found[place] for place in range(len(shown))]


def confusion(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """(classes, classes) int64 on the CPU: pixels by truth (rows) and prediction (columns)."""
    known = truth != IGNORED
    pairs = truth[known].long() * classes + predicted[known].long()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes).cpu()


def is_shown(counts: Tensor, index: int) -> bool:
    """Whether the truth of a confusion holds a class."""
    return bool(counts[index].any())


def dice(counts: Tensor, index: int) -> float:
    """Dice of a class; one where it is neither predicted nor there."""
    total = int(counts[index].sum() + counts[:, index].sum())
    return 2 * int(counts[index, index]) / total if total else 1.0


def iou(counts: Tensor, index: int) -> float:
    """Intersection over union of a class; one where it is neither predicted nor there."""
    union = int(counts[index].sum() + counts[:, index].sum() - counts[index, index])
    return int(counts[index, index]) / union if union else 1.0


def mean_iou(counts: Tensor) -> float:
    """The mean IoU of the classes that are there."""
    there = [i for i in range(len(counts)) if is_shown(counts, i)]
    return sum(iou(counts, i) for i in there) / max(1, len(there))


def mean_dice(counts: Tensor) -> float:
    """The mean Dice of the classes that are there."""
    there = [i for i in range(len(counts)) if is_shown(counts, i)]
    return sum(dice(counts, i) for i in there) / max(1, len(there))


def summary(
    counts: Sequence[Tensor], shown: Sequence[Shown], names: Sequence[str]
) -> dict[str, float]:
    """Pooled Dice and IoU of every class, their means, and mean Dice per picture and group.

    A class that no picture shows has no scores, nor has it any in a group that does not show it:
    what is not there cannot be found. Where only some pictures show a class, the others count one
    in the mean of pictures if it is not found there either, else zero.
    """
    pooled = torch.stack(list(counts)).sum(0)
    result = {"miou": mean_iou(pooled), "accuracy": int(pooled.trace()) / max(1, int(pooled.sum()))}
    groups = sorted({item.group for item in shown})
    for index, name in enumerate(names):
        if not is_shown(pooled, index):
            continue
        result[f"{name}_dice"] = dice(pooled, index)
        result[f"{name}_iou"] = iou(pooled, index)
        result[f"{name}_dice_per_image"] = sum(dice(c, index) for c in counts) / len(counts)
        for group in groups:
            own = [c for c, item in zip(counts, shown, strict=True) if item.group == group]
            if any(is_shown(c, index) for c in own):
                result[f"{name}_dice_{group}"] = sum(dice(c, index) for c in own) / len(own)
    return result


def score_key(monitor: str) -> str:
    """Where `summary` has the score that a recipe names: "miou", or of a class "iou:CLASS" pooled,
    "dice:CLASS" per picture."""
    kind, _, name = monitor.partition(":")
    return "miou" if not name else f"{name}_{kind}{'_per_image' if kind == 'dice' else ''}"


def monitored(scores: dict[str, float], monitor: str) -> float:
    """The score that a recipe names, out of a `summary`."""
    return scores[score_key(monitor)]


def by_length(
    predictor: Predictor, shown: Sequence[Shown], name: str, index: int, *, per_side: int
) -> dict[str, float]:
    """Lay pictures of one size out as a square mosaic and segment it in one sequence.

    Returns:
        Tokens; Dice of the class per picture of the mosaic and of the same pictures alone; pooled
        Dice in the outer ring of tokens of every block and inside.
    """
    classes = predictor.model.head.classes
    side = min(min(item.labels.shape) for item in shown)
    alone = [
        dice(confusion(p[:side, :side], item.labels[:side, :side], classes), index)
        for p, item in zip(predict_all(predictor, shown), shown, strict=True)
    ]
    device = shown[0].image.device
    mosaic = torch.empty(3, per_side * side, per_side * side, device=device)
    truth = torch.empty(mosaic.shape[1:], dtype=torch.uint8, device=device)
    windows, used = [], []
    for place in range(per_side**2):
        item = place * 5 % len(shown)  # neighbours come from other slides
        y, x = (k * side for k in divmod(place, per_side))
        window = (slice(y, y + side), slice(x, x + side))
        mosaic[:, *window] = shown[item].image[:, :side, :side]
        truth[window] = shown[item].labels[:side, :side]
        windows.append(window)
        used.append(alone[item])
    found = predictor.labels(mosaic[None])[0]
    scores = [dice(confusion(found[w], truth[w], classes), index) for w in windows]
    ring = border_ring(found.shape[0], predictor)
    inside = dice(confusion(found[~ring], truth[~ring], classes), index)
    step = predictor.model.encoder.config.stride_px
    tokens = (-(-per_side * side // step)) ** 2
    return {
        f"{name}_dice_per_image_{tokens}_tokens": sum(scores) / len(scores),
        f"{name}_dice_same_images_alone_{tokens}_tokens": sum(used) / len(used),
        f"{name}_dice_block_border_{tokens}_tokens": dice(
            confusion(found[ring], truth[ring], classes), index
        ),
        f"{name}_dice_block_inside_{tokens}_tokens": inside,
    }


def border_ring(side_px: int, predictor: Predictor) -> Tensor:
    """(side_px, side_px) bool: pixels of the outermost tokens of their block."""
    block = predictor.order.block or 1
    device = predictor.model.encoder.norm_f.weight.device
    token = torch.arange(side_px, device=device) // predictor.model.encoder.config.stride_px % block
    inside = (token > 0) & (token < block - 1)
    return ~(inside[:, None] & inside[None])


def by_windows(
    predictor: Predictor, shown: Sequence[Shown], names: Sequence[str], *, blocks: int = 2
) -> dict[str, float]:
    """Quality where pictures are cut into windows of so many blocks a side, each seen by itself."""
    side = blocks * (predictor.order.block or 16) * predictor.model.encoder.config.stride_px
    counts = []
    for item in shown:
        h, w = item.labels.shape
        places = [(y, x) for y in range(0, h, side) for x in range(0, w, side)]
        pieces = [
            Shown(
                item.image[:, y : y + side, x : x + side],
                item.labels[y : y + side, x : x + side],
                item.group,
                item.name,
            )
            for y, x in places
        ]
        found = predict_all(predictor, pieces)
        pairs = zip(found, pieces, strict=True)
        total = [confusion(f, piece.labels, len(names)) for f, piece in pairs]
        counts.append(torch.stack(total).sum(0))
    scores = summary(counts, shown, names)
    return {f"{key}_in_windows": scores[key] for key in ("miou", "accuracy")}
