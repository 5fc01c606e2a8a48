"""Train the nuclei model: `python -m gigavim.training.nuclei pack|train|evaluate|export`."""

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from torch import Generator, Tensor

from gigavim.frames import ClassSpec
from gigavim.model.card import ModelCard, TrainingRecord
from gigavim.model.checkpoint import load_model, save_model
from gigavim.model.heads import SegmentationModel
from gigavim.model.registry import REGISTRY
from gigavim.model.vim import Vim
from gigavim.tokens.order import ScanOrder
from gigavim.training import evaluate, loop
from gigavim.training.data import VALIDATION_GROUPS, Fields, load, pack, split
from gigavim.training.encode import silence_odd_layers, tie_rates
from gigavim.training.mosaic import MODEL_MPP, canvas, sources

log = logging.getLogger(__name__)

NAME = "histo-nuclei-nano"
MEAN, STD = (0.72, 0.56, 0.68), (0.20, 0.22, 0.18)
ORDER = ScanOrder.parse("blocks(16)")
CLASSES = (
    ClassSpec("background", (235, 235, 240), None, "none"),
    ClassSpec("tissue", (236, 155, 186), None, "annotation"),
    ClassSpec("nuclei", (72, 40, 148), "tissue", "detection"),
)


DATA = (
    "NuInsSeg (Mahbod et al., Scientific Data 2024, doi 10.1038/s41597-024-03117-2): 453 H&E "
    "fields of 24 human and mouse slides, 401 of 19 slides for training"
)
DESCRIPTION = (
    "Background, tissue and nuclei on H&E at 0.5 um per pixel. Vim nano, one sequence in blocks of "
    "16 x 16 tokens. Nuclei are semantic: touching nuclei are one region. Background is "
    "what is bright (smoothed darkest channel at least 0.88 of empty glass) and colourless "
    "(channels within 0.075 of it): empty lumina and fat too. The pixel size of the training "
    "fields is not published; training covers 0.16 to 0.27 um, the metrics take 0.23. "
    "Not for diagnosis."
)


def new_model() -> SegmentationModel:
    """Make an untrained Vim nano with its head."""
    return SegmentationModel(Vim(REGISTRY["vim-nano"]), len(CLASSES))


class Canvases:
    """Draws batches of training canvases."""

    def __init__(self, fields: Fields, block_px: int) -> None:
        self.sources, self.block_px = sources(fields), block_px
        self.mean, self.std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))

    def __call__(
        self, shapes: Sequence[tuple[int, int]], generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Make one canvas per (rows, cols) of blocks."""
        made = [
            canvas(self.sources, rows * self.block_px, cols * self.block_px, generator)
            for rows, cols in shapes
        ]
        images = torch.stack([(image - self.mean) / self.std for image, _ in made])
        return images, torch.stack([labels for _, labels in made])


def block_px(model: SegmentationModel) -> int:
    """Side of a block of tokens in pixels."""
    return model.head.patch_px * (ORDER.block or 1)


@click.group()
def main() -> None:
    """Pack the data, train, evaluate and export the nuclei model."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_float32_matmul_precision("medium")  # products in bfloat16 where the CPU has AMX
    torch.set_num_threads(1)  # one worker thread per core does better than shared products


@main.command("pack")
@click.argument("root", type=click.Path(exists=True, path_type=Path))
@click.argument("groups_csv", type=click.Path(exists=True, path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
def pack_command(root: Path, groups_csv: Path, target: Path) -> None:
    """Pack the fields under ROOT/*/{images,masks} into TARGET (.npz)."""
    log.info("%d fields packed into %s", pack(root, groups_csv, target), target)


@main.command("train")
@click.argument("packed", type=click.Path(exists=True, path_type=Path))
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--steps", default=3000, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--rate", default=2e-3, show_default=True, help="Peak learning rate.")
@click.option("--save-every", default=200, show_default=True)
def train_command(
    packed: Path, checkpoint: Path, steps: int, seed: int, rate: float, save_every: int
) -> None:
    """Train on PACKED, or go on from CHECKPOINT where it exists."""
    torch.manual_seed(seed)
    fields, held_out = split(load(packed))
    shown = evaluate.crops(held_out)
    schedule = loop.Schedule(steps=steps, seed=seed, peak_rate=rate)
    model = new_model()
    draw = Canvases(fields, block_px(model))
    progress = loop.resume(checkpoint, model, schedule) if checkpoint.exists() else None
    if progress is None:
        images, _ = draw([(2, 2)] * 16, torch.Generator().manual_seed(seed))
        loop.init_patch_embedding(model, images)
        silence_odd_layers(model.encoder)
    recent: list[float] = []
    started = time.monotonic()

    def report(progress: loop.Progress, loss: float) -> None:
        recent.append(loss)
        if progress.step % 50 == 0:
            seconds = (time.monotonic() - started) / len(recent)
            mean = sum(recent[-20:]) / len(recent[-20:])
            log.info("step %d loss %.4f (%.2f s a step)", progress.step, mean, seconds)
        if progress.step % save_every == 0 or progress.step == schedule.steps:
            loop.save(checkpoint, model, progress)
            averaged = new_model()
            averaged.load_state_dict(progress.average)
            scores, _ = evaluate.by_image(averaged, shown, ORDER, MEAN, STD)
            log.info(
                "step %d %s", progress.step, json.dumps({k: round(v, 4) for k, v in scores.items()})
            )

    loop.train(model, ORDER, draw, schedule, progress=progress, on_step=report)


@main.command("evaluate")
@click.argument("packed", type=click.Path(exists=True, path_type=Path))
@click.option("--model", "name", default=NAME, show_default=True, help="Shipped name or folder.")
def evaluate_command(packed: Path, name: str) -> None:
    """Print the held-out quality of a model as JSON: by slide, by scale and by sequence length."""
    model, card = load_model(name)
    scores = measure(model, split(load(packed))[1])
    click.echo(json.dumps(scores, indent=2))
    for key, value in card.metrics.items():
        if abs(scores.get(key, value) - value) > 0.002:
            log.warning("%s: the card of %s says %.4f", key, name, value)


@main.command("export")
@click.argument("packed", type=click.Path(exists=True, path_type=Path))
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--hours", default=0.0, help="Training time, for the card.")
@click.option("--hardware", default="", help="Where it was trained, for the card.")
def export_command(
    packed: Path, checkpoint: Path, folder: Path, hours: float, hardware: str
) -> None:
    """Measure the averaged weights of CHECKPOINT and write them with their card to FOLDER."""
    model = new_model()
    progress = loop.resume(checkpoint, model, loop.Schedule(steps=1))
    model.load_state_dict(progress.average)
    tie_rates(model.encoder)
    scores = measure(model.eval(), split(load(packed))[1])
    training = TrainingRecord(
        script=(
            f"python -m gigavim.training.nuclei train nuclei.npz checkpoint.pt "
            f"--steps {progress.step}, the number of steps being changed while it ran"
        ),
        data=DATA,
        data_licence="CC BY 4.0",
        split=f"by slide: held out {', '.join(VALIDATION_GROUPS)}, never by image",
        seeds=(0,),
        hours=hours,
        hardware=hardware,
    )
    save_model(folder, model, new_card(model, training, scores))
    click.echo(json.dumps(scores, indent=2))


def new_card(
    model: SegmentationModel, training: TrainingRecord, scores: dict[str, float]
) -> ModelCard:
    """Describe a trained model."""
    return ModelCard(
        name=NAME,
        description=DESCRIPTION,
        config=model.encoder.config,
        mpp=MODEL_MPP,
        mpp_range=(0.1, 0.65),
        illumination="brightfield",
        mean=MEAN,
        std=STD,
        classes=CLASSES,
        order=str(ORDER),
        licence="Apache-2.0; trained on CC BY 4.0 data, which asks for attribution",
        training=training,
        metrics={key: round(value, 4) for key, value in scores.items()},
        precision_note=(
            "bfloat16 products (float32 state and stream) change the mean Dice by "
            f"{scores['nuclei_dice_bfloat16'] - scores['nuclei_dice_per_image']:+.4f}"
        ),
    )


def measure(model: SegmentationModel, held_out: Fields) -> dict[str, float]:
    """All numbers of the card: at 0.23 um per field pixel, at 0.18, and by sequence length."""
    torch.set_float32_matmul_precision("highest")
    torch.set_flush_denormal(True)
    shown = evaluate.crops(held_out)
    scores, alone = evaluate.by_image(model, shown, ORDER, MEAN, STD)
    finer, _ = evaluate.by_image(model, evaluate.crops(held_out, field_mpp=0.18), ORDER, MEAN, STD)
    scores["nuclei_dice_if_field_mpp_0.18"] = finer["nuclei_dice_per_image"]
    torch.set_float32_matmul_precision("medium")
    rounded, _ = evaluate.by_image(model, shown, ORDER, MEAN, STD)
    scores["nuclei_dice_bfloat16"] = rounded["nuclei_dice_per_image"]
    torch.set_float32_matmul_precision("highest")
    for side in (3, 11):
        row = evaluate.by_length(model, shown, alone, ORDER, MEAN, STD, fields_per_side=side)
        tokens = row.pop("tokens")
        scores |= {f"{key}_{tokens:.0f}_tokens": value for key, value in row.items()}
    return scores


if __name__ == "__main__":
    main()
