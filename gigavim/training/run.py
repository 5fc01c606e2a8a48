"""A whole training: data, loop, validation, logs, checkpoints, and the model folder at the end."""

import contextlib
import copy
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gigavim.engine.devices import resolve_device
from gigavim.errors import ModelError, OutputError, SettingsError
from gigavim.extras import installed
from gigavim.model.card import ModelCard, TrainingRecord
from gigavim.model.checkpoint import load_model, save_model
from gigavim.model.segmentation import SegmentationModel
from gigavim.model.vim import Vim
from gigavim.model.weights import tie_rates, untied
from gigavim.training import loop, score
from gigavim.training.encode import layer_kernel, silence_odd_layers
from gigavim.training.memory import Budget
from gigavim.training.pack import Picture, read_pack, read_pictures, split
from gigavim.training.ranks import Ranks
from gigavim.training.recipe import IGNORED, Recipe

if TYPE_CHECKING:
    from gigavim.training.canvas import Canvases

log = logging.getLogger(__name__)

LOG_EVERY = 20
CHECKPOINT_SECONDS = 120.0
UNTIED = 0.01
"""Decay rates this far (a logarithm) from a fixed ratio have left it; half precision does less."""
MOSAIC_SIDES = (3, 11, 34)
"""Pictures a side of the mosaics of the final report; the largest ones on GPUs only."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a training left."""

    model: Path
    metrics: dict[str, float]
    step: int
    steps: int


def load_data(source: Path, recipe: Recipe) -> list[Picture]:
    """Read pictures from a packed file, or by the recipe's rules from a folder."""
    if source.is_dir():
        return list(read_pictures(source, recipe))
    return read_pack(source, recipe)


def canvases_of(pictures: Sequence[Picture], recipe: Recipe, device: torch.device) -> "Canvases":
    """Put pictures into a device's memory, to draw canvases of them.

    Raises `SettingsError` where kornia is not installed, which only training needs.
    """
    installed("kornia", "train")
    from gigavim.training.atlas import Atlas
    from gigavim.training.canvas import Canvases

    return Canvases(Atlas(pictures, device), recipe)


def make_folder(folder: Path) -> None:
    """Make the folder of a training; raises `OutputError` where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made ({error.strerror})") from error
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{folder}: cannot be written to")


def check_labels(train: Sequence[Picture], held_out: Sequence[score.Shown], recipe: Recipe) -> None:
    """Warn of classes that nothing shows to learn from.

    Args:
        held_out: as they are scored: at the model's resolution small things may be gone.

    Raises:
        SettingsError: nothing is labelled on one side of the split, or the held-out pictures lack
            the class that chooses the weights to keep.
    """
    seen = {
        "for training": {i for p in train for i in np.unique(p.labels).tolist()} - {IGNORED},
        "held out": {i for p in held_out for i in torch.unique(p.labels).tolist()} - {IGNORED},
    }
    for kind, values in seen.items():
        if not values:
            raise SettingsError(
                f"no picture {kind} shows any class of the recipe: its mask_values, mask_rgb or "
                "names do not fit the masks"
            )
    wanted = recipe.loss.monitor.partition(":")[2]
    if wanted and recipe.label(wanted) not in seen["held out"]:
        raise SettingsError(
            f"no picture held out shows {wanted}, by which loss.monitor chooses the weights to "
            "keep: hold out groups that do, or see whether the class fits the masks"
        )
    by_name = not any(c.mask_values or c.mask_rgb for c in recipe.classes)
    absent = [
        repr(c.name)
        for i, c in enumerate(recipe.classes)
        if i not in seen["for training"] and (by_name or c.has_rule)
    ]
    if absent:
        log.warning("no picture for training shows %s: not to be learnt so", ", ".join(absent))


def new_model(recipe: Recipe) -> SegmentationModel:
    """Make the untrained model of a recipe, from its encoder weights where it names some."""
    torch.manual_seed(recipe.schedule.seed)
    encoder = Vim(recipe.model.encoder)
    if recipe.model.encoder_weights:
        from gigavim.model.encoder import read_encoder, start_from

        weights = Path(recipe.model.encoder_weights)
        try:
            encoder = start_from(read_encoder(weights), recipe.model.encoder)
        except ModelError as error:
            raise (
                error if str(weights) in str(error) else ModelError(f"{weights}: {error}")
            ) from None
    return SegmentationModel(
        encoder, len(recipe.classes), recipe.model.head, recipe.model.head_width
    )


class Logs:
    """Numbers by step as JSON lines, and for TensorBoard where it is installed."""

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / "log.jsonl"
        kept = []
        if step and self.path.exists():  # what a later part of a resumed run said is said anew
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= step]
        self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self.board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        except ImportError:
            log.info("TensorBoard is not installed: only %s is written", self.path)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Note numbers of a step."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(
                json.dumps({"step": step} | {k: round(v, 6) for k, v in values.items()}) + "\n"
            )
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()


class Run:
    """One training of a recipe in an output folder."""

    def __init__(
        self,
        recipe: Recipe,
        pictures: Sequence[Picture],
        folder: Path,
        device: torch.device,
        *,
        max_memory_bytes: int | None = None,
    ) -> None:
        self.recipe, self.folder, self.device = recipe, folder, device
        self.ranks = ranks = Ranks(device)
        train, held_out = split(list(pictures), recipe)
        log.info("%d pictures for training, %d held out", len(train), len(held_out))
        self.shown = [score.show(p, recipe.model.mpp, device) for p in held_out]
        check_labels(train, self.shown, recipe)
        self.canvases = canvases_of(train, recipe, device)
        self.model = new_model(recipe).to(device)
        if recipe.model.encoder_weights and self._tied:
            self._tie()
        atlas = self.canvases.atlas
        self.budget = Budget.of(self.model, recipe, atlas, max_memory_bytes)
        self.shadow = copy.deepcopy(self.model)
        make_folder(folder)
        self.checkpoint = folder / "checkpoint.pt"
        if self.checkpoint.exists():
            self.progress = loop.resume(self.checkpoint, self.model, recipe)
            log.info("going on from step %d", self.progress.step)
            loop.plan_anew(self.progress, recipe)
            if self.progress.step >= self.progress.steps:
                log.info(
                    "%s is trained to its end: more --steps or --max-minutes train on, another "
                    "--output begins anew", folder,
                )  # fmt: skip
        else:
            generator = torch.Generator(device).manual_seed(recipe.schedule.seed)
            if not recipe.model.encoder_weights:
                images, _ = self.canvases.draw((2, 2), 16, generator)
                loop.init_patch_embedding(self.model, images)
            if recipe.schedule.half_depth:
                silence_odd_layers(self.model.encoder)
            self.progress = loop.start(self.model, recipe)
        self.logs = Logs(folder, self.progress.step) if ranks.rank == 0 else None
        self.losses: list[float] = []
        self.validated = -1
        self.interrupted = False
        self.tokens, self.since, self.saved = 0, time.monotonic(), time.monotonic()

    def _tie(self) -> None:
        """Tie the decay rates of an encoder from elsewhere, as all kernels will take them."""
        if untied(self.model) > UNTIED:
            log.warning(
                "the decay rates of %s are not in the ratio 1 : 2 : ... : N, to which training "
                "brings them here: the encoder will not be what it was. On a GPU, a recipe with "
                "model.tied_rates = false keeps them", self.recipe.model.encoder_weights,
            )  # fmt: skip
        tie_rates(self.model)

    def train(self) -> Result:
        """Train to the end and write the model folder, its metrics beside it.

        Raises:
            KeyboardInterrupt: at the end of the step in which it came, which a checkpoint keeps.
        """
        forward = loop.vim_forward(self.model, self.recipe, self.budget)
        with self._stopping_between_steps():
            loop.train(
                self.model,
                self.canvases,
                self.progress,
                loop.segmentation(forward, self.recipe),
                on_step=self._on_step,
                ranks=self.ranks,
                budget=self.budget,
            )
        if self.interrupted:
            log.info("step %d is kept: the same command goes on from it", self.progress.step)
            raise KeyboardInterrupt
        self.ranks.leave()
        if self.ranks.rank:
            return Result(self.folder / "model", {}, self.progress.step, self.progress.steps)
        loop.save(self.checkpoint, self.model, self.progress)
        if self.validated != self.progress.step:  # time was up between two validations
            self._validate()
        return self._finish()

    @contextlib.contextmanager
    def _stopping_between_steps(self) -> Iterator[None]:
        """Let the first Ctrl-C wait for the end of a step, and the second not.

        Several processes have to stop at the same step, so there the first one ends all at once.
        """
        if self.ranks.count > 1 or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT) or signal.default_int_handler

        def wait(_signal: int, _frame: object) -> None:
            self.interrupted = True
            signal.signal(signal.SIGINT, before)

        signal.signal(signal.SIGINT, wait)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _on_step(self, progress: loop.Progress, loss: float, tokens: int) -> bool:
        self.losses.append(loss)
        self.tokens += tokens * self.ranks.count
        ends = progress.step >= progress.steps
        if self.logs is not None and (progress.step % LOG_EVERY == 0 or ends):
            seconds = time.monotonic() - self.since
            values = {
                "loss": sum(self.losses) / len(self.losses),
                "rate": progress.optimizer.param_groups[0]["lr"],
                "tokens_per_second": self.tokens / max(seconds, 1e-9),
                "minutes": progress.seconds / 60,
            }
            self.logs.write(progress.step, values)
            log.info(
                "step %d of %s loss %.4f, %.0f tokens/s, %.1f min", progress.step,
                progress.steps if progress.steps < loop.UNPLANNED else "?",
                *list(values.values())[::2], values["minutes"],
            )  # fmt: skip
            self.losses, self.tokens, self.since = [], 0, time.monotonic()
        stop = False
        if progress.step % self.recipe.schedule.validate_every == 0 or ends:
            began = time.monotonic()
            self._validate()
            progress.seconds += time.monotonic() - began
            patience = self.recipe.schedule.patience
            stop = bool(patience) and progress.stale >= patience
            if stop:
                log.info("no better score for %d validations: stopping", patience)
        stop = stop or self.interrupted
        due = time.monotonic() - self.saved > CHECKPOINT_SECONDS
        if self.ranks.rank == 0 and (due or stop or ends):
            loop.save(self.checkpoint, self.model, progress)
            self.saved = time.monotonic()
        return stop

    def predictor(self, *, half: bool) -> score.Predictor:
        """The averaged model as validation sees it."""
        recipe = self.recipe.model
        return score.Predictor(
            self.shadow,
            recipe.scan_order,
            recipe.mean,
            recipe.std,
            half=half,
            tied=self._tied,
            chunk=self.budget.validation_chunk,
        )

    def _validate(self) -> None:
        progress = self.progress
        self.validated = progress.step
        self.shadow.load_state_dict(progress.average)
        scores = self._scores(half=self.device.type == "cuda")
        value = score.monitored(scores, self.recipe.loss.monitor)
        better = value > progress.best_score
        progress.stale = 0 if better else progress.stale + 1
        if better:
            progress.best_score, progress.best_step = value, progress.step
            progress.best = {k: v.clone() for k, v in progress.average.items()}
        if self.logs is not None:
            self.logs.write(progress.step, {f"val_{k}": v for k, v in scores.items()})
            log.info(
                "step %d %s %.4f (best %.4f), mIoU %.4f", progress.step,
                self.recipe.loss.monitor, value, progress.best_score, scores["miou"],
            )  # fmt: skip

    def _scores(self, *, half: bool) -> dict[str, float]:
        classes = len(self.recipe.classes)
        found = score.predict_all(self.predictor(half=half), self.shown)
        pairs = zip(found, self.shown, strict=True)
        counts = [score.confusion(f, item.labels, classes) for f, item in pairs]
        return score.summary(counts, self.shown, self.recipe.class_names)

    def _finish(self) -> Result:
        """Write the best average at half precision, and measure what was written."""
        progress, folder = self.progress, self.folder / "model"
        self.shadow.load_state_dict(progress.best)
        state = {k: v.half().float() for k, v in self.shadow.state_dict().items()}
        self.shadow.load_state_dict(state)
        if self._tied:
            tie_rates(self.shadow)
        metrics = self._metrics()
        save_model(folder, self.shadow, self._card(metrics), half=True)
        load_model(folder)  # what was written can be read
        text = json.dumps(metrics, indent=2) + "\n"
        (self.folder / "metrics.json").write_text(text, encoding="utf-8")
        return Result(folder, metrics, progress.step, progress.steps)

    @property
    def _tied(self) -> bool:
        config = self.recipe.model.encoder
        asked = self.recipe.model.tied_rates
        return asked or layer_kernel(self.device, config.d_state, config.d_model, asked).ties

    def _metrics(self) -> dict[str, float]:
        monitor = self.recipe.loss.monitor
        cuda = self.device.type == "cuda"
        metrics = self._scores(half=False)
        half = self._scores(half=True) if cuda else metrics
        metrics["bfloat16_changes"] = score.monitored(half, monitor) - score.monitored(
            metrics, monitor
        )
        shown = [n for n in self.recipe.class_names if f"{n}_dice" in metrics]
        name = monitor.partition(":")[2] or shown[-1]
        index = self.recipe.class_names.index(name)
        whole = self.predictor(half=False)
        sides = {tuple(item.labels.shape) for item in self.shown}
        small = max(max(side) for side in sides) <= 512
        if small:
            for per_side in MOSAIC_SIDES if cuda else MOSAIC_SIDES[:1]:
                try:
                    metrics |= score.by_length(whole, self.shown, name, index, per_side=per_side)
                except torch.OutOfMemoryError:  # the model is worth more than the figure
                    log.warning(
                        "mosaics of %d x %d pictures do not fit: left out", per_side, per_side
                    )
                    break
        else:
            metrics |= score.by_windows(whole, self.shown, self.recipe.class_names)
        return metrics

    def _card(self, metrics: dict[str, float]) -> ModelCard:
        recipe, progress = self.recipe, self.progress
        held_out = ", ".join(recipe.split.validation_groups)
        record = TrainingRecord(
            script=_command(recipe, progress),
            data=recipe.data.source,
            data_licence=recipe.data.licence,
            split=(
                f"by group: held out {held_out}, never by image; of the averaged weights, those of "
                f"step {progress.best_step}, best in {recipe.loss.monitor} there, are kept"
            ),
            seeds=(recipe.schedule.seed,),
            hours=round(progress.seconds / 3600, 3),
            hardware=hardware(self.device, self.ranks.count),
        )
        change = metrics["bfloat16_changes"]
        return recipe.card(
            record,
            tied_rates=self._tied,
            metrics={key: round(value, 4) for key, value in metrics.items()},
            precision_note=(
                "weights are stored in half precision, with which the metrics were taken; bfloat16 "
                f"products (float32 state and stream) change {recipe.loss.monitor} by {change:+.4f}"
            ),
        )


def _command(recipe: Recipe, progress: loop.Progress) -> str:
    minutes, weights = recipe.schedule.max_minutes, recipe.model.encoder_weights
    words = f"gigavim train {recipe.model.name}"
    if weights:
        words += f" --weights {Path(weights).name}"
    if minutes is None:
        return f"{words} --steps {progress.step}"
    return f"{words} --max-minutes {minutes:g} ({progress.step} steps)"


def hardware(device: torch.device, ranks: int) -> str:
    """What a training ran on, for people."""
    if device.type == "cuda":
        return f"{ranks} x {torch.cuda.get_device_name(device)}"
    return f"{os.cpu_count()} CPU cores"


@contextlib.contextmanager
def fast_products(device: torch.device, *, workers: int) -> Iterator[None]:
    """Let float32 products be rounded as training allows: bfloat16 on CPUs with AMX, else TF32."""
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision("medium" if device.type == "cpu" else "high")
    if workers > 1:
        torch.set_num_threads(1)  # one worker thread per core does better than shared products
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)


def pick_device(name: str) -> torch.device:
    """Turn "auto", "cpu", "cuda" or "cuda:1" into a device, this process's own under torchrun."""
    device = resolve_device(name)
    if device.type == "cuda" and ":" not in name and "LOCAL_RANK" in os.environ:
        return torch.device(f"cuda:{os.environ['LOCAL_RANK']}")
    return device
