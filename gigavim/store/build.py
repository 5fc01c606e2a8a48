"""A store out of a swept sequence: labels, embeddings and masks, each streamed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr
from torch import Tensor

from gigavim.config import Settings
from gigavim.engine.decode import Gather, LabelStrip, decode_strips, mean_probabilities, survey
from gigavim.engine.devices import usable_cores
from gigavim.model.sequence import patch_slots
from gigavim.names import as_text
from gigavim.outputs.arrays import write_array
from gigavim.outputs.atomic import explained
from gigavim.outputs.labels import CHUNK_HW, Coverage, LabelStore
from gigavim.outputs.summary import count_labels
from gigavim.pipeline import Job, Stopwatch, Swept
from gigavim.progress import Advance, Progress
from gigavim.provenance import provenance
from gigavim.store import layout
from gigavim.store.crew import WRITERS, Crew
from gigavim.store.pooled import write_pooled
from gigavim.store.reader import EmbeddingStore
from gigavim.store.seal import Seal
from gigavim.store.tokens import TokenWriter, write_index


@dataclass(frozen=True, slots=True)
class Content:
    """What a store shall hold beside the label map."""

    embeddings: bool
    dtype: layout.EmbeddingType = "float16"
    probabilities: bool = False


def build_store(
    folder: Path,
    job: Job,
    run: Swept,
    settings: Settings,
    content: Content,
    *,
    watch: Stopwatch,
    progress: Progress,
    seal: Seal | None = None,
) -> EmbeddingStore:
    """Fill an empty folder with what the swept sequence says.

    Embeddings are written while the map is decoded: what the one leaves of the cores, waiting for
    memory or the disk, the other has. Memory holds a few strips of the map and shards of tokens.

    Args:
        seal: of a store that lasts; told of the large files as they are finished.

    Raises:
        OutputError: the disk refuses, or an embedding does not fit float16.
    """
    grid, head = job.grid, job.choice.model.head
    pools = layout.pool_factors(grid.rows, grid.cols) if content.embeddings else ()
    with (
        explained(folder),
        progress.stage("decode", len(job.selection), "tokens") as advance,
        Crew(1) as beside,
    ):
        root = zarr.create_group(folder, overwrite=True)
        to_map, to_tokens, to_shares = _divided(
            advance, (4, content.embeddings, 4 * content.probabilities)
        )
        with watch.stage("store"):
            _write_pictures(root, job.tissue.mask, run.picture)
            if content.embeddings:
                writer = _token_writer(root, job, run, content, seal)
                if content.probabilities:
                    with torch.inference_mode(), Crew() as crew:
                        writer.write_probabilities(to_shares, crew)
                beside.later(_write_embeddings, writer, pools, to_tokens, beside, seal)
                if not head.halo and run.sequence.device.type == "cpu":
                    beside.wait()  # torch's own threads decode, and bear no company
        with watch.stage("decode"):
            pixels = _write_labels(folder / "map", job, run, to_map, beside, seal)
        with watch.stage("store"):
            beside.wait()
        layout.write_info(root, _info(job, settings, run, content, pools, pixels, watch))
    return EmbeddingStore.open(folder)


def _divided(advance: Advance, shares: Sequence[float]) -> list[Advance]:
    """A share of one bar for each of several threads."""
    lock, whole = Lock(), sum(shares)

    def part(share: float, tokens: float) -> None:
        with lock:
            advance(tokens * share / whole)

    return [partial(part, share) for share in shares]


def decoded(job: Job, run: Swept) -> Iterator[LabelStrip]:
    """The label map of the swept sequence, in strips from top to bottom."""
    if run.labels is not None:
        yield from _made(run.labels, job)
        return
    head = job.choice.model.head.to(run.sequence.device)
    yield from decode_strips(_features(job, run), head, job.grid, job.selection)


def _made(labels: LabelStore, job: Job) -> Iterator[LabelStrip]:
    """The strips of a map that is there already."""
    stride, index = job.grid.stride_px, job.selection.index
    step = max(1, CHUNK_HW[0] // stride)
    for row in range(0, -(-labels.height // stride), step):
        y = row * stride
        strip = labels.read(y, min(y + step * stride, labels.height), 0, labels.width)
        yield LabelStrip(y, strip, int((index[row : row + step] >= 0).sum()))


def _write_labels(
    folder: Path, job: Job, run: Swept, advance: Advance, beside: Crew, seal: Seal | None
) -> tuple[int, ...] | None:
    """Write the map and its coverage; the pixels of each class, if it holds nothing else.

    Ends early where a job of the crew fails.
    """
    grid, frame = job.grid, job.grid.frame
    pixels, classes = np.zeros(256, np.int64), len(job.choice.card.classes)
    labels = LabelStore.create(
        folder,
        height=frame.height_px,
        width=frame.width_px,
        cell_px=grid.stride_px,
        cells_hw=(grid.rows, grid.cols),
        lasting=True,
    )

    def put(strip: LabelStrip) -> None:
        labels.write_rows(strip.y, strip.labels)
        np.add(pixels, count_labels(strip.labels, classes), out=pixels)
        if seal is not None:
            end = strip.y + len(strip.labels)
            whole = end if end == frame.height_px else end // CHUNK_HW[0] * CHUNK_HW[0]
            for file in labels.files(strip.y - strip.y % CHUNK_HW[0], whole):
                seal.file(file)

    with torch.inference_mode(), Crew(1) as writer:
        for strip in decoded(job, run):
            beside.check()
            writer.do(put, strip)
            advance(strip.tokens)
    labels.flush()
    coverage = np.where(job.selection.index >= 0, Coverage.PREDICTED, Coverage.SKIPPED)
    coverage[run.unreadable] = Coverage.UNREADABLE
    labels.write_coverage(0, 0, coverage.astype(np.uint8))
    return None if pixels[classes:].any() else tuple(pixels[:classes].tolist())


def _features(job: Job, run: Swept) -> Gather:
    """What the head decodes, by a token's place among the patches."""
    count, kind = len(job.selection), job.choice.model.encoder.config.class_token
    head = job.choice.model.head.to(run.sequence.device)

    def gather(index: Tensor) -> Tensor:
        slots = patch_slots(index, count, kind)
        side = None if run.side is None else run.side.gather(slots)
        return head.features(run.sequence.gather(slots), side)

    return gather


def _write_pictures(
    root: zarr.Group, tissue: npt.NDArray[np.bool_], picture: npt.NDArray[np.uint8] | None
) -> None:
    mask = tissue.astype(np.uint8)
    write_array(layout.create_plain(root, "tissue", mask.shape, "uint8", ("y", "x")), mask)
    if picture is not None:
        names = ("y", "x", "rgb")
        array = layout.create_plain(root, "thumbnail", picture.shape, "uint8", names)
        write_array(array, picture)


def _token_writer(
    root: zarr.Group, job: Job, run: Swept, content: Content, seal: Seal | None
) -> TokenWriter:
    """What writes the tokens; their arrays are made."""
    gather, head = _features(job, run), job.choice.model.head
    with torch.inference_mode():
        context = None
        if content.probabilities and run.shares is None:
            context = survey(gather, head, job.selection)

    def probabilities(first: int, last: int) -> Tensor:
        if run.shares is not None:
            return run.shares.rows(first, last)
        return mean_probabilities(gather, head, job.selection, first, last, context=context)

    return TokenWriter(
        root, run.sequence, job.choice.model, job.grid, job.selection, dtype=content.dtype,
        probabilities=probabilities if content.probabilities else None, seal=seal,
    )  # fmt: skip


@torch.inference_mode()
def _write_embeddings(
    writer: TokenWriter,
    pools: tuple[int, ...],
    advance: Advance,
    beside: Crew,
    seal: Seal | None,
) -> None:
    """Write tokens, pooled levels and what finds them; the work of one job of a crew."""
    write_index(writer.root, writer.selection.index)
    # A thread compresses on others already; what decodes should keep most of the cores.
    with Crew(max(1, min(WRITERS, usable_cores() // 2)), within=beside) as crew:
        writer.write(advance, crew)
        if pools:
            # At once with the shards: while the one waits for the disk, the other has the cores.
            with Crew(1, within=beside) as other:
                write_pooled(writer, pools, other)
    writer.finish()
    if seal is not None:
        for part in ("thumbnail", "tissue", "index", "slide", "tokens", *("pooled",) * bool(pools)):
            seal.folder(part)


def _info(
    job: Job,
    settings: Settings,
    run: Swept,
    content: Content,
    pools: tuple[int, ...],
    class_pixels: tuple[int, ...] | None,
    watch: Stopwatch,
) -> layout.StoreInfo:
    slide, grid, config = job.slide, job.grid, job.choice.model.encoder.config
    bounds, level0 = slide.bounds, slide.levels[0]
    return layout.StoreInfo(
        version=(layout.MAJOR, layout.MINOR),
        slide=layout.SlideInfo(
            name=as_text(slide.path.name),
            path=as_text(slide.path.absolute()),
            fingerprint=slide.fingerprint(),
            bounds_level0=(
                bounds.x_level0, bounds.y_level0, bounds.width_level0, bounds.height_level0
            ),
            size_level0=(level0.width, level0.height),
        ),
        frame=layout.FrameInfo.of(grid.frame),
        grid=layout.GridInfo(
            rows=grid.rows,
            cols=grid.cols,
            patch_px=grid.patch_px,
            stride_px=grid.stride_px,
            order=str(grid.order),
        ),
        tissue=layout.FrameInfo.of(job.tissue.frame),
        classes=job.choice.card.classes,
        tokens=len(job.selection),
        width=config.d_model,
        has_embeddings=content.embeddings,
        pools=pools,
        slide_embedding="class_tokens" if config.class_tokens else "mean",
        class_pixels=class_pixels,
        facts=_facts(job, settings, int(run.unreadable.sum()), watch),
    )  # fmt: skip


def _facts(job: Job, settings: Settings, unreadable: int, watch: Stopwatch) -> dict[str, Any]:
    """What a summary says beyond the map itself."""
    frame, grid = job.grid.frame, job.grid
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
            "grid": [grid.rows, grid.cols],
            "patch_px": grid.patch_px,
            "stride_px": grid.stride_px,
            "order": str(grid.order),
            "unreadable": unreadable,
        },
        "plan": job.plan.describe(),
        "seconds": {name: round(value, 3) for name, value in watch.seconds.items()},
        "provenance": provenance(job.slide, job.choice, job.plan, settings),
    }
