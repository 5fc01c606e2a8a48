"""Tokens to labels, streamed in strips of the grid's rows.

A strip is decoded in windows, which see as many of their neighbours as the head wants. Where
patches overlap their logits are averaged; a strip hands the rows that the next strip's patches
still reach to that strip. So the result depends neither on how many rows a strip holds nor on how
many columns a window.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from gigavim.ahead import in_order
from gigavim.engine.devices import one_thread
from gigavim.model.heads import Head, Part
from gigavim.model.windows import Window, windows
from gigavim.tokens.grid import TokenGrid, TokenSelection

T = TypeVar("T")

BATCH_TOKENS = 8192
STRIP_PX = 64
"""Height of a strip, about, where tokens are decoded one by one."""
SEEN_STRIP_PX = 256
"""Height of a strip where they see their neighbours, which are decoded in vain beyond it."""
WINDOW_COLS = 64
MOST_SIDE_BY_SIDE = 4
"""Windows that a CPU decodes at a time, some 50 MB each, by threads of their own, with which torch
shares the cores out: its threads meet after every little product, and lose most of their speed as
soon as a core is busy elsewhere."""
OVERLAP_BYTES = 1 << 27
"""Of the logits of a strip of overlapping patches, where it has more than one row of them."""


class Gather(Protocol):
    """What the head decodes, by a token's place among the patches of the sequence."""

    def __call__(self, index: Tensor) -> Tensor:
        """(n,) int64 -> (n, feature_width) float32, where the head is."""
        ...


@dataclass(frozen=True, slots=True)
class LabelStrip:
    """Labels of whole rows of the map."""

    y: int
    labels: npt.NDArray[np.uint8]
    """(rows_px, width_px)"""
    tokens: int
    """How many tokens were decoded for it."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """Some tokens of a strip."""

    row: Tensor
    """(n,) int64 within the strip."""
    col: Tensor
    found: Tensor
    """(n, classes, patch, patch) logits, or what was made of them."""


Finish = Callable[[Tensor], Tensor]
"""What a thread makes of the logits of its tokens."""


def decode_strips(
    gather: Gather,
    head: Head,
    grid: TokenGrid,
    selection: TokenSelection,
    *,
    rows_at_once: int | None = None,
    cols_at_once: int = WINDOW_COLS,
    context: Tensor | None = None,
) -> Iterator[LabelStrip]:
    """Yield the label map from top to bottom; pixels of cells that are no tokens have label 0.

    Memory: one strip across the map (some 64 map rows, or 256 where the head sees neighbours), and
    the logits of a window.

    Args:
        rows_at_once: of the grid, in a strip; chosen if absent.
        cols_at_once: of the grid, in a window, where the head sees neighbours.
        context: what `survey` gave; surveyed now if absent.
    """
    context = survey(gather, head, selection) if context is None else context
    overlap = grid.patch_px - grid.stride_px
    step = rows_at_once or _strip_rows(head, grid)
    carry: Tensor | None = None
    on_cpu = next(head.parameters()).device.type == "cpu"
    cores = torch.get_num_threads() if on_cpu and head.halo else 1
    for row in range(0, grid.rows, step):
        index = selection.index[row : row + step]
        last = row + step >= grid.rows
        rows = (row, row + len(index))
        with one_thread() if cores > 1 else nullcontext():
            if overlap:
                strip = _decoded(gather, head, grid, selection, rows, cols_at_once, context)
                labels, carry = _overlapping(
                    _side_by_side(strip, cores), grid, index.shape, head.classes, carry, last=last
                )
            else:
                strip = _decoded(
                    gather, head, grid, selection, rows, cols_at_once, context, _patch_labels
                )
                labels = _adjacent(_side_by_side(strip, cores), grid, index.shape)
        y = row * grid.stride_px
        if y >= grid.frame.height_px:  # what is left only fills the last blocks
            return
        labels = labels[: grid.frame.height_px - y, : grid.frame.width_px]
        yield LabelStrip(y, labels, int((index >= 0).sum()))


def survey(gather: Gather, head: Head, selection: TokenSelection) -> Tensor | None:
    """What the head knows of all tokens; nothing, at no cost, where it asks for nothing."""
    if not head.surveys:
        return None
    total: Tensor | None = None
    for start in range(0, len(selection), BATCH_TOKENS):
        stop = min(start + BATCH_TOKENS, len(selection))
        features = gather(torch.arange(start, stop))
        cells = torch.from_numpy(selection.cells[start:stop].astype(np.int64)).to(features.device)
        cols = selection.index.shape[1]
        found = head.survey(features, cells // cols, cells % cols, _size(selection))
        total = found if total is None else total + found
    return total


def decode_window(
    gather: Gather, head: Head, selection: TokenSelection, window: Window, context: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Decode the tokens of a window.

    Returns:
        Rows and columns of its tokens within it, (n,) int64, and (n, classes, patch, patch) logits.
    """
    index = torch.from_numpy(selection.index[window.seen].astype(np.int64))
    kept = index >= 0
    features = gather(index[kept])
    seen = features.new_zeros(*index.shape, features.shape[1])
    place = kept.to(features.device)
    seen[place] = features
    mask = None if kept.all() else place[None]  # none is quicker than one that keeps everything
    part = Part(window.top_seen, window.left_seen, _size(selection), context)
    # Convolutions rounded to TF32 would let it show where the grid was cut.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        logits = head.decode(seen[None], mask, part)
    logits = logits[0, *window.inner]
    row, col = torch.nonzero(kept[window.inner], as_tuple=True)
    return row, col, logits[row.to(logits.device), col.to(logits.device)]


def mean_probabilities(
    gather: Gather,
    head: Head,
    selection: TokenSelection,
    first: int,
    last: int,
    *,
    context: Tensor | None = None,
) -> Tensor:
    """Class probabilities, the mean over its patch, of the tokens first..last-1: (n, classes).

    `context` is what `survey` gave; surveyed now if absent.
    """
    context = survey(gather, head, selection) if context is None else context
    if not head.halo:
        logits = head.decode(gather(torch.arange(first, last))[None, None])[0, 0]
        return logits.softmax(1).mean((2, 3))
    rows = selection.cells[first:last] // selection.index.shape[1]
    found = torch.empty(last - first, head.classes)
    rows_at_once = SEEN_STRIP_PX // head.stride_px or 1
    for top in range(int(rows.min()), int(rows.max()) + 1, rows_at_once):
        strip = (top, min(top + rows_at_once, selection.index.shape[0]))
        for window in windows(
            strip, selection.index.shape, halo=head.halo, cols_at_once=WINDOW_COLS
        ):
            place = selection.index[window.core]
            if ((place >= first) & (place < last)).any():
                row, col, logits = decode_window(gather, head, selection, window, context)
                own = torch.from_numpy(place.astype(np.int64))[row, col] - first
                asked = (own >= 0) & (own < last - first)
                found[own[asked]] = logits.softmax(1).mean((2, 3)).float().cpu()[asked]
    return found


def _size(selection: TokenSelection) -> tuple[int, int]:
    rows, cols = selection.index.shape
    return rows, cols


def _strip_rows(head: Head, grid: TokenGrid) -> int:
    """How many rows of the grid make a strip."""
    if grid.patch_px == grid.stride_px:
        return max(1, (SEEN_STRIP_PX if head.halo else STRIP_PX) // grid.stride_px)
    if not head.halo:
        return 1  # overlapping patches keep all their logits for a while: one row is enough of them
    row_bytes = head.classes * grid.patch_px**2 * grid.cols * 4
    return int(np.clip(OVERLAP_BYTES // row_bytes, 1, 8))


def _decoded(
    gather: Gather,
    head: Head,
    grid: TokenGrid,
    selection: TokenSelection,
    rows: tuple[int, int],
    cols_at_once: int,
    context: Tensor | None,
    finish: Finish = lambda logits: logits,
) -> Iterator[Callable[[], Decoded]]:
    """Tasks that decode the tokens of a strip, some at a time."""
    index = selection.index[slice(*rows)]
    if not head.halo:
        places = np.nonzero(index >= 0)
        slots = torch.from_numpy(index[places].astype(np.int64))
        row, col = (torch.from_numpy(place) for place in places)

        def some(part: slice) -> Decoded:
            logits = head.decode(gather(slots[part])[None, None])[0, 0]
            return Decoded(row[part], col[part], finish(logits))

        for start in range(0, len(slots), BATCH_TOKENS):
            yield partial(some, slice(start, start + BATCH_TOKENS))
        return

    def seen(window: Window) -> Decoded:
        row, col, logits = decode_window(gather, head, selection, window, context)
        return Decoded(row, col + window.left, finish(logits))

    for window in windows(rows, (grid.rows, grid.cols), halo=head.halo, cols_at_once=cols_at_once):
        if (selection.index[window.core] >= 0).any():
            yield partial(seen, window)


def _side_by_side(tasks: Iterable[Callable[[], T]], cores: int) -> Iterator[T]:
    """The results of tasks, a few of which are done side by side; few wait to be taken."""
    if cores == 1:
        yield from (task() for task in tasks)
        return
    inferring = torch.is_inference_mode_enabled()  # a thread's own
    threads = min(MOST_SIDE_BY_SIDE, cores)

    def run(task: Callable[[], T]) -> T:
        with torch.inference_mode(inferring):
            return task()

    share = (cores // threads,)
    with ThreadPoolExecutor(threads, "gigavim-decode", torch.set_num_threads, share) as pool:
        yield from in_order(pool, (partial(run, task) for task in tasks), depth=threads)


def _adjacent(
    strip: Iterator[Decoded], grid: TokenGrid, shape: tuple[int, ...]
) -> npt.NDArray[np.uint8]:
    """Labels of a strip of (rows, cols) whose patches do not overlap: each token's own winner."""
    rows, cols = shape
    patch = grid.patch_px
    cells = torch.zeros(rows, cols, patch, patch, dtype=torch.uint8)
    for part in strip:
        cells[part.row, part.col] = part.found
    return cells.permute(0, 2, 1, 3).reshape(rows * patch, cols * patch).numpy()


def _overlapping(
    strip: Iterator[Decoded],
    grid: TokenGrid,
    shape: tuple[int, ...],
    classes: int,
    carry: Tensor | None,
    *,
    last: bool,
) -> tuple[npt.NDArray[np.uint8], Tensor]:
    """Labels of the rows that no later patch reaches, and the logit sums of those that one does.

    The winner of a mean is the winner of the sum, so no counts are kept.
    """
    patch, stride = grid.patch_px, grid.stride_px
    overlap = patch - stride
    rows, cols = shape
    height, width = rows * stride + overlap, cols * stride + overlap
    dense = torch.zeros(classes * patch * patch, rows * cols)
    for part in strip:
        dense[:, part.row * cols + part.col] = part.found.flatten(1).T.float().cpu()
    sums = F.fold(dense[None], (height, width), patch, stride=stride)[0]
    if carry is not None:
        sums[:, :overlap] += carry
    done = height if last else height - overlap
    # Where no token reaches all sums are zero and the first class, the background, wins.
    return _winners(sums[:, :done], 0).numpy(), sums[:, done:]


def _patch_labels(logits: Tensor) -> Tensor:
    """(n, classes, patch, patch) to (n, patch, patch) uint8."""
    return _winners(logits, 1).cpu()


def _winners(logits: Tensor, dim: int) -> Tensor:
    """The class of the largest logit, uint8; the first one of equals."""
    # `argmax` over an outer dimension takes eight times as long on a CPU.
    return logits.max(dim).indices.to(torch.uint8)
