"""What every run over a slide has in common: open, decide, embed patches, sweep.

open -> model -> grid, tissue, tokens -> plan -> embed -> sweep; what is made of the swept sequence
is the business of `gigavim.store.build`, and of the writers after it.
"""

import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gigavim.choice import Choice, choose_model
from gigavim.config import Settings
from gigavim.engine.devices import resolve_device, usable_cores
from gigavim.engine.embed import PatchProjection, embed_slide
from gigavim.engine.memory import parse_bytes
from gigavim.engine.plan import Plan, plan_sweep
from gigavim.engine.sequence import TokenSequence
from gigavim.engine.sweep import sweep
from gigavim.engine.taps import Taps
from gigavim.engine.window_plan import plan_windows
from gigavim.engine.windowed import Kept, WindowModel, kept_windows, segment_windows
from gigavim.errors import OutputError, SlideError, UnsupportedSlideError
from gigavim.model.pictures import Look
from gigavim.model.vim import Vim
from gigavim.outputs.labels import LabelStore
from gigavim.progress import Progress
from gigavim.slides import open_slide
from gigavim.slides.base import Slide
from gigavim.store.layout import is_store
from gigavim.tokens.grid import (
    TokenGrid,
    TokenSelection,
    cells_on_map,
    make_grid,
    make_window_grid,
    select_tokens,
)
from gigavim.tokens.picture import PICTURE_BYTES, StreamedPicture, streamed_picture
from gigavim.tokens.stream import PatchBlock, stream_blocks
from gigavim.tokens.tissue import TissueMask, kept_cells, tissue_mask
from gigavim_kernels.backends import Precision, resolve_precision

MOST_READERS = 8
PICTURE_PX = 2048
NORM_TOKENS = 4096
MOST_WRITING_BYTES = 350_000_000


@dataclass(frozen=True, slots=True)
class Job:
    """Everything decided about a slide before work starts."""

    slide: Slide
    choice: Choice
    grid: TokenGrid
    tissue: TissueMask
    selection: TokenSelection
    device: torch.device
    precision: Precision
    threads: int
    readers: int
    plan: Plan


@dataclass(frozen=True, slots=True)
class Swept:
    """The sequence after the encoder, its final norm included."""

    sequence: TokenSequence
    side: TokenSequence | None
    """What the head's taps left of each token, (L, side_width)."""
    unreadable: npt.NDArray[np.bool_]
    """(rows, cols) which tokens lie on pixels that could not be read."""
    picture: npt.NDArray[np.uint8] | None
    """(h, w, 3) the slide's bounds, if it was asked for."""
    labels: LabelStore | None = None
    """The map, where windows were segmented by themselves; else it is still to be decoded."""
    shares: TokenSequence | None = None
    """Class probabilities (patches, classes), likewise, if they were asked for."""


class Stopwatch:
    """Wall seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the block's time to a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + spent


def open_input(path: Path, settings: Settings) -> Slide:
    """Open a slide as the settings correct it.

    Raises:
        SlideError: it cannot be read, or is an embedding store.
    """
    if is_store(path):
        raise UnsupportedSlideError(
            f"{path}: is an embedding store, not a slide: `gigavim convert` and `gigavim info` take"
            " it, and `gigavim.open_embeddings`"
        )
    channels = settings.input.channels
    picked = (channels[0], channels[1], channels[2]) if len(channels) == 3 else None
    return open_slide(path, mpp=settings.input.slide_mpp or None, channels=picked)


def prepare(
    slide: Slide,
    settings: Settings,
    *,
    scratch: Path | None,
    watch: Stopwatch,
    keeps_tokens: bool = True,
) -> Job:
    """Choose the model, the tokens and the plan; errors as of `gigavim.segment`.

    Without `keeps_tokens` windows that are sequences of their own leave labels and nothing else.
    """
    compute = settings.compute
    device = resolve_device(compute.device)
    precision = resolve_precision(compute.precision, device)
    choice = choose_model(slide, settings.model, device)
    threads = compute.threads or usable_cores()
    grid = _grid(slide, choice, settings)
    with watch.stage("tissue"):
        mode = settings.tokens.tissue
        tissue = tissue_mask(slide, mode=mode if mode in ("auto", "none") else Path(mode))
        kept = kept_cells(grid, tissue, min_tissue=settings.tokens.min_tissue)
        if settings.model.context == "window":
            rows, cols = cells_on_map(grid)
            kept[rows:], kept[:, cols:] = False, False
        selection = _tokens(slide, grid, kept)
    readers = settings.tokens.num_workers or min(usable_cores(), MOST_READERS)
    with watch.stage("plan"):
        plan = _planned(
            choice, grid, selection, settings, keeps_tokens=keeps_tokens, device=device,
            precision=precision, scratch_dir=scratch, threads=threads,
            other_bytes=_other_bytes(grid, readers, settings.tokens.block_px),
        )  # fmt: skip
    return Job(slide, choice, grid, tissue, selection, device, precision, threads, readers, plan)


def _planned(
    choice: Choice,
    grid: TokenGrid,
    selection: TokenSelection,
    settings: Settings,
    *,
    keeps_tokens: bool,
    **how: Any,
) -> Plan:
    """The plan of a sweep, or of windows; `how` is what both are told."""
    config, head = choice.model.encoder.config, choice.model.head
    length = len(selection) + config.class_tokens
    how["max_memory_bytes"] = _limit(settings.compute.max_memory)
    how["max_gpu_memory_bytes"] = _limit(settings.compute.max_gpu_memory)
    if settings.model.context == "slide":
        weights = choice.model.encoder.block_weights()
        return plan_sweep(length, weights, side_width=head.side_width, **how)
    side = settings.model.window_px
    shares = head.classes * settings.embedding.probabilities
    return plan_windows(
        kept_windows(grid, selection),
        _look(choice).grid_hw(config, (side, side)),
        choice.model,
        kept_tokens=length,
        kept_width=(config.d_model + shares) * keeps_tokens,
        **how,
    )


def _grid(slide: Slide, choice: Choice, settings: Settings) -> TokenGrid:
    config = choice.model.encoder.config
    sizes: dict[str, Any] = {
        "mpp": choice.mpp,
        "patch_px": config.patch_px,
        "stride_px": config.stride_px,
    }
    if settings.model.context == "window":
        return make_window_grid(slide, window_px=settings.model.window_px, **sizes)
    return make_grid(slide, order=choice.card.scan_order, **sizes)


def _look(choice: Choice) -> Look:
    card = choice.card
    return Look(card.scan_order, card.mean, card.std, every_cell=True)


@contextmanager
def swept(
    job: Job,
    settings: Settings,
    scratch: Path,
    watch: Stopwatch,
    progress: Progress,
    *,
    picture_px: int = PICTURE_PX,
) -> Iterator[Swept]:
    """Embed the slide's patches and run the encoder over them; the sequence is freed at the end.

    A picture of the slide with `picture_px` on its longer side at most is made by the way; 0: none.
    """
    if job.plan.windows:
        with _windowed(job, settings, scratch, watch, progress, picture_px) as run:
            yield run
        return
    model = job.choice.model
    encoder = model.encoder

    def kept(width: int) -> TokenSequence:
        return TokenSequence(
            job.plan.tokens,
            width,
            location=job.plan.location,
            device=job.device,
            scratch_dir=scratch,
        )

    with ExitStack() as stack:
        sequence = stack.enter_context(kept(encoder.config.d_model))
        taps = Taps(model.head, sequence, kept) if model.head.taps else None
        side = stack.enter_context(taps.side) if taps is not None else None
        streamed = streamed_picture(job.slide, job.grid, picture_px) if picture_px else None
        with watch.stage("read"):
            unreadable = _embed(job, settings, sequence, progress, streamed)
        picture = None
        if picture_px:
            with watch.stage("picture"):
                picture = streamed.finish() if streamed else job.slide.thumbnail(picture_px)
        depth = len(encoder.block_weights())
        with watch.stage("encode"), progress.stage("encode", len(sequence), "tokens") as advance:
            sweep(
                sequence,
                encoder.block_weights(),
                device=job.device,
                precision=job.precision,
                chunk=job.plan.chunk,
                threads=job.threads,
                progress=lambda tokens: advance(tokens / depth),
                on_block=taps,
            )
            _normalise(sequence, encoder)
        yield Swept(sequence, side, unreadable, picture)


@contextmanager
def _windowed(
    job: Job,
    settings: Settings,
    scratch: Path,
    watch: Stopwatch,
    progress: Progress,
    picture_px: int,
) -> Iterator[Swept]:
    """What `swept` does where each window is a sequence of its own: labels are made as well."""
    choice, grid, frame = job.choice, job.grid, job.grid.frame
    config, count = choice.model.encoder.config, len(job.selection)
    keeps = job.plan.width > 0

    def kept(length: int, width: int) -> TokenSequence:
        return TokenSequence(
            length if keeps else 0,
            width,
            location=job.plan.location,
            device=job.device,
            scratch_dir=scratch,
        )

    labels = LabelStore.create(
        scratch / "labels",
        height=frame.height_px,
        width=frame.width_px,
        cell_px=grid.stride_px,
        cells_hw=(grid.rows, grid.cols),
    )
    with ExitStack() as stack:
        sequence = stack.enter_context(kept(count + config.class_tokens, config.d_model))
        shares = None
        if keeps and settings.embedding.probabilities:
            shares = stack.enter_context(kept(count, choice.model.head.classes))
        streamed = streamed_picture(job.slide, grid, picture_px) if picture_px else None
        blocks: Iterable[PatchBlock] = _blocks(job, settings)
        with watch.stage("encode"), progress.stage("encode", count, "tokens") as advance:
            unreadable = segment_windows(
                blocks if streamed is None else streamed.watch(blocks),
                WindowModel(
                    choice.model,
                    _look(choice),
                    device=job.device,
                    precision=job.precision,
                    threads=job.threads,
                ),
                grid,
                job.selection,
                labels.write,
                batch=max(1, job.plan.chunk * job.plan.windows // job.plan.tokens),
                kept=Kept(sequence, shares) if keeps else None,
                source=job.slide.path,
                max_unreadable=settings.output.max_unreadable,
                progress=advance,
            )
        picture = None
        if picture_px:
            with watch.stage("picture"):
                picture = streamed.finish() if streamed else job.slide.thumbnail(picture_px)
        yield Swept(sequence, None, unreadable, picture, labels, shares)


def scratch_parent(settings: Settings) -> Path:
    """Where working files go."""
    chosen = settings.compute.scratch_dir
    return Path(chosen) if chosen else Path(settings.output.directory)


@contextmanager
def scratch_folder(settings: Settings) -> Iterator[Path]:
    """A folder for working files, removed at the end."""
    parent = scratch_parent(settings)
    with ExitStack() as stack:
        try:
            scratch = tempfile.TemporaryDirectory(prefix=".scratch-", dir=parent)
            folder = stack.enter_context(scratch)
        except OSError as error:
            raise OutputError(
                f"{parent}: no working files can be made there ({error.strerror}); name an existing"
                " folder with --scratch-dir."
            ) from error
        yield Path(folder)


def _tokens(slide: Slide, grid: TokenGrid, kept: npt.NDArray[np.bool_]) -> TokenSelection:
    if not kept.any():
        raise SlideError(
            f"{slide.path}: no tissue found, so there is nothing to segment. If the slide is not"
            " empty, use --tissue none, or give a mask with --tissue FILE."
        )
    return select_tokens(grid, kept)


def _embed(
    job: Job,
    settings: Settings,
    sequence: TokenSequence,
    progress: Progress,
    picture: StreamedPicture | None,
) -> npt.NDArray[np.bool_]:
    card, encoder, grid = job.choice.card, job.choice.model.encoder, job.grid
    projection = PatchProjection(
        encoder, card.mean, card.std, device=job.device, precision=job.precision
    )
    blocks = _blocks(job, settings)
    megapixels = len(job.selection) * grid.stride_px**2 / 1e6
    with progress.stage("read", megapixels, "Mpx") as advance:
        return embed_slide(
            blocks if picture is None else picture.watch(blocks),
            sequence,
            encoder,
            projection,
            grid,
            job.selection,
            source=job.slide.path,
            max_unreadable=settings.output.max_unreadable,
            progress=lambda pixels: advance(pixels / 1e6),
        )


def _blocks(job: Job, settings: Settings) -> Iterator[PatchBlock]:
    return stream_blocks(
        job.slide,
        job.grid,
        job.selection.index >= 0,
        block_px=settings.tokens.block_px,
        workers=job.readers,
    )


def _normalise(sequence: TokenSequence, encoder: Vim) -> None:
    """Apply the final norm in place."""
    norm = encoder.norm_f.to(sequence.device)
    with torch.inference_mode():
        for start in range(0, len(sequence), NORM_TOKENS):
            stop = min(start + NORM_TOKENS, len(sequence))
            sequence.store(start, norm(sequence.rows(start, stop)))
            sequence.release(start, stop)


def _limit(text: str) -> int | None:
    return None if text == "auto" else parse_bytes(text)


def _other_bytes(grid: TokenGrid, readers: int, block_px: int) -> int:
    """RAM beside the encoder's: the larger of reading and writing, and the maps of cells."""
    block_px = max(block_px, grid.block * grid.stride_px)  # blocks hold whole windows
    # Blocks in flight, each with its source and its resampled pixels, and the picture of them.
    pixels = grid.frame.width_px * grid.frame.height_px
    reading = (2 * readers + 2) * block_px**2 * 3 * 2
    reading += min(pixels, PICTURE_PX**2) * PICTURE_BYTES
    # Polygons open across tile rows: measured 0.3 GB for 4e8 map pixels full of nuclei.
    writing = min(pixels, MOST_WRITING_BYTES)
    return max(reading, writing) + grid.rows * grid.cols * (8 + 4 + 2)
