"""From a slide's path to its maps: the function that joins all stages.

open -> model -> grid, tissue, tokens -> plan -> embed -> sweep -> decode -> files
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gigavim.choice import Choice, choose_model
from gigavim.config import Settings, TokenSettings
from gigavim.engine.decode import decode_strips
from gigavim.engine.devices import resolve_device, usable_cores
from gigavim.engine.embed import PatchProjection, embed_slide
from gigavim.engine.memory import parse_bytes
from gigavim.engine.plan import Plan, plan_sweep
from gigavim.engine.sequence import TokenSequence
from gigavim.engine.sweep import sweep
from gigavim.errors import OutputError, SlideError
from gigavim.frames import MapFrame
from gigavim.model.sequence import patch_slots
from gigavim.names import as_text, result_stem
from gigavim.outputs.atomic import OutputSet
from gigavim.outputs.labels import Coverage, LabelStore
from gigavim.outputs.results import write_results
from gigavim.progress import Progress, Silent
from gigavim.provenance import provenance
from gigavim.slides import open_slide
from gigavim.slides.base import Slide
from gigavim.tokens.grid import TokenGrid, TokenSelection, make_grid, select_tokens
from gigavim.tokens.stream import stream_blocks
from gigavim.tokens.tissue import kept_cells, tissue_mask
from gigavim_kernels.backends import Precision, resolve_precision

MOST_READERS = 8
MOST_WRITING_BYTES = 350_000_000


@dataclass(frozen=True, slots=True)
class Segmentation:
    """What `segment` made."""

    slide: Path
    outputs: dict[str, Path]
    """Written files by format."""
    summary: dict[str, Any]
    """Also written as JSON: areas, tokens, timings, provenance."""

    def areas(self) -> list[str]:
        """One line per class for people: name, share of the map, area."""
        lines = []
        for entry in self.summary["classes"]:
            sizes = [
                f"{entry[key]:,.3f} {unit}"
                for key, unit in (("area_mm2", "mm2"), ("area_ha", "ha"))
                if entry.get(key) is not None
            ]
            lines.append(f"{entry['name']:<12} {entry['fraction']:6.1%}  {' '.join(sizes)}")
        return lines


@dataclass(frozen=True, slots=True)
class Job:
    """Everything decided about a slide before work starts."""

    slide: Slide
    choice: Choice
    grid: TokenGrid
    selection: TokenSelection
    device: torch.device
    precision: Precision
    threads: int
    readers: int
    plan: Plan


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


def segment(
    path: str | Path,
    *,
    settings: Settings | None = None,
    stem: str | None = None,
    progress: Progress | None = None,
) -> Segmentation:
    """Segment a slide and write its maps.

    Args:
        path: a slide's file, or a folder that is one slide.
        settings: as in gigavim.toml; the defaults if absent.
        stem: first part of the results' names; the slide's own if absent.
        progress: told of each stage.

    Returns:
        The written files and the summary. Files appear whole or not at all; existing ones are
        replaced only with `output.overwrite`.

    Raises:
        SlideError: the slide cannot be used (see `gigavim.errors`).
        ModelError: the model cannot be used, or not for this slide.
        ResourceError: it does not fit the memory or disk allowed.
        OutputError: results cannot be written, or are there already.
    """
    path, settings, progress = Path(path), settings or Settings(), progress or Silent()
    watch = Stopwatch()
    with watch.stage("open"):
        slide = _open(path, settings)
    georeferenced = slide.georeference is not None
    folder = Path(settings.output.directory)
    targets = result_paths(folder, stem or result_stem(path), settings, georeferenced)
    with slide, OutputSet(overwrite=settings.output.overwrite) as outputs:
        parts = {kind: outputs.path(target) for kind, target in targets.items()}
        job = _prepare(slide, settings, scratch=_scratch_parent(settings), watch=watch)
        with _scratch_folder(settings) as scratch:
            labels, unreadable = _predict(job, settings, scratch, watch, progress)
            with progress.stage("write", len(parts), "files") as advance:
                summary = write_results(
                    parts,
                    slide,
                    labels,
                    job.grid.frame,
                    job.choice.card.classes,
                    qupath_bounds=settings.output.qupath_bounds,
                    facts=_facts(job, settings, unreadable, watch),
                    advance=advance,
                )
    return Segmentation(path, targets, summary)


def plan_segmentation(path: str | Path, settings: Settings | None = None) -> Plan:
    """Say what segmenting a slide would take, without doing it; errors as in `segment`."""
    settings = settings or Settings()
    with _open(Path(path), settings) as slide:
        return _prepare(slide, settings, scratch=None, watch=Stopwatch()).plan


def result_paths(
    folder: Path, stem: str, settings: Settings, georeferenced: bool
) -> dict[str, Path]:
    """The files of a slide's results by format, the summary among them."""
    usual = ["geotiff" if georeferenced else "ome-tiff", "geojson", "overlay"]
    names = {
        "ome-tiff": f"{stem}.labels.ome.tif",
        "geotiff": f"{stem}.labels.tif",
        "geojson": f"{stem}.geojson",
        "geojson.gz": f"{stem}.geojson.gz",
        "overlay": f"{stem}.overlay.png",
        "summary": f"{stem}.summary.json",
    }
    kinds = dict.fromkeys([*(settings.output.formats or usual), "summary"])
    if "geotiff" in kinds and not georeferenced:
        raise OutputError(
            f"{stem}: a GeoTIFF needs a georeferenced input, and this one is not: leave out"
            " --format geotiff."
        )
    return {kind: folder / names[kind] for kind in kinds}


def _open(path: Path, settings: Settings) -> Slide:
    channels = settings.input.channels
    picked = (channels[0], channels[1], channels[2]) if len(channels) == 3 else None
    return open_slide(path, mpp=settings.input.slide_mpp or None, channels=picked)


def _prepare(slide: Slide, settings: Settings, *, scratch: Path | None, watch: Stopwatch) -> Job:
    """Choose the model, the tokens and the plan."""
    compute = settings.compute
    device = resolve_device(compute.device)
    precision = resolve_precision(compute.precision, device)
    choice = choose_model(slide, settings.model)
    config, threads = choice.model.encoder.config, compute.threads or usable_cores()
    grid = make_grid(
        slide,
        mpp=choice.mpp,
        patch_px=config.patch_px,
        stride_px=config.stride_px,
        order=choice.card.scan_order,
    )
    with watch.stage("tissue"):
        selection = _tokens(slide, grid, settings.tokens)
    readers = settings.tokens.num_workers or min(usable_cores(), MOST_READERS)
    with watch.stage("plan"):
        plan = plan_sweep(
            len(selection) + config.class_tokens,
            choice.model.encoder.block_weights(),
            device=device,
            precision=precision,
            max_memory_bytes=_limit(compute.max_memory),
            max_gpu_memory_bytes=_limit(compute.max_gpu_memory),
            scratch_dir=scratch,
            threads=threads,
            other_bytes=_other_bytes(grid, readers, settings.tokens.block_px),
        )
    return Job(slide, choice, grid, selection, device, precision, threads, readers, plan)


def _tokens(slide: Slide, grid: TokenGrid, settings: TokenSettings) -> TokenSelection:
    mode = settings.tissue if settings.tissue in ("auto", "none") else Path(settings.tissue)
    tissue = tissue_mask(slide, mode=mode)
    kept = kept_cells(grid, tissue, min_tissue=settings.min_tissue)
    if not kept.any():
        raise SlideError(
            f"{slide.path}: no tissue found, so there is nothing to segment. If the slide is not"
            " empty, use --tissue none, or give a mask with --tissue FILE."
        )
    return select_tokens(grid, kept)


def _predict(
    job: Job, settings: Settings, scratch: Path, watch: Stopwatch, progress: Progress
) -> tuple[LabelStore, npt.NDArray[np.bool_]]:
    """Tokens through the encoder to a label store in the scratch folder."""
    encoder = job.choice.model.encoder
    with TokenSequence(
        job.plan.tokens,
        encoder.config.d_model,
        location=job.plan.location,
        device=job.device,
        scratch_dir=scratch,
    ) as sequence:
        with watch.stage("read"):
            unreadable = _embed(job, settings, sequence, progress)
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
            )
        with watch.stage("decode"):
            labels = _decode(job, sequence, scratch, progress)
    coverage = np.where(job.selection.index >= 0, Coverage.PREDICTED, Coverage.SKIPPED)
    coverage[unreadable] = Coverage.UNREADABLE
    labels.write_coverage(0, 0, coverage.astype(np.uint8))
    return labels, unreadable


def _embed(
    job: Job, settings: Settings, sequence: TokenSequence, progress: Progress
) -> npt.NDArray[np.bool_]:
    card, encoder, grid = job.choice.card, job.choice.model.encoder, job.grid
    projection = PatchProjection(
        encoder, card.mean, card.std, device=job.device, precision=job.precision
    )
    blocks = stream_blocks(
        job.slide,
        grid,
        job.selection.index >= 0,
        block_px=settings.tokens.block_px,
        workers=job.readers,
    )
    megapixels = len(job.selection) * grid.stride_px**2 / 1e6
    with progress.stage("read", megapixels, "Mpx") as advance:
        return embed_slide(
            blocks,
            sequence,
            encoder,
            projection,
            grid,
            job.selection,
            source=job.slide.path,
            max_unreadable=settings.output.max_unreadable,
            progress=lambda pixels: advance(pixels / 1e6),
        )


def _decode(job: Job, sequence: TokenSequence, scratch: Path, progress: Progress) -> LabelStore:
    grid, model, frame = job.grid, job.choice.model, job.grid.frame
    home, count, kind = sequence.device, len(job.selection), model.encoder.config.class_token
    norm, head = model.encoder.norm_f.to(home), model.head.to(home)
    labels = LabelStore.create(
        scratch / "labels",
        height=frame.height_px,
        width=frame.width_px,
        cell_px=grid.stride_px,
        cells_hw=(grid.rows, grid.cols),
    )

    def gather(index: Tensor) -> Tensor:
        return sequence.gather(patch_slots(index, count, kind))

    def decoder(tokens: Tensor) -> Tensor:
        logits: Tensor = head(norm(tokens))
        return logits

    classes = len(job.choice.card.classes)
    with torch.inference_mode(), progress.stage("decode", count, "tokens") as advance:
        for strip in decode_strips(gather, decoder, grid, job.selection, classes=classes):
            labels.write_rows(strip.y, strip.labels)
            advance(strip.tokens)
    labels.flush()
    return labels


def _facts(
    job: Job, settings: Settings, unreadable: npt.NDArray[np.bool_], watch: Stopwatch
) -> dict[str, Any]:
    """What the summary says beyond the map itself."""
    frame: MapFrame = job.grid.frame
    return {
        "slide": as_text(job.slide.path),
        "warnings": list(job.choice.warnings),
        "map": {
            "width_px": frame.width_px,
            "height_px": frame.height_px,
            "mpp_x": frame.mpp_x,
            "mpp_y": frame.mpp_y,
            "x_level0": frame.x_level0,
            "y_level0": frame.y_level0,
            "scale_x": frame.scale_x,
            "scale_y": frame.scale_y,
        },
        "tokens": {
            "count": len(job.selection),
            "grid": [job.grid.rows, job.grid.cols],
            "patch_px": job.grid.patch_px,
            "stride_px": job.grid.stride_px,
            "order": str(job.grid.order),
            "unreadable": int(unreadable.sum()),
        },
        "plan": job.plan.describe(),
        "seconds": {name: round(value, 3) for name, value in watch.seconds.items()},
        "provenance": provenance(job.slide, job.choice, job.plan, settings),
    }


def _limit(text: str) -> int | None:
    return None if text == "auto" else parse_bytes(text)


def _other_bytes(grid: TokenGrid, readers: int, block_px: int) -> int:
    """RAM beside the encoder's: the larger of reading and writing, and the maps of cells."""
    # Blocks in flight, each with its source and its resampled pixels.
    reading = (2 * readers + 2) * block_px**2 * 3 * 2
    # Polygons open across tile rows: measured 0.3 GB for 4e8 map pixels full of nuclei.
    writing = min(grid.frame.width_px * grid.frame.height_px, MOST_WRITING_BYTES)
    return max(reading, writing) + grid.rows * grid.cols * (8 + 4 + 2)


def _scratch_parent(settings: Settings) -> Path:
    chosen = settings.compute.scratch_dir
    return Path(chosen) if chosen else Path(settings.output.directory)


@contextmanager
def _scratch_folder(settings: Settings) -> Iterator[Path]:
    parent = _scratch_parent(settings)
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
