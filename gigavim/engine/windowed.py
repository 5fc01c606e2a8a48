"""Windows of a slide, each a sequence of its own: what a tool sees that works tile by tile.

A window is cut out of the map, mirrored at its right and lower side to whole blocks of patches,
and segmented as if it were a whole picture (`gigavim.model.pictures`, which evaluation uses too):
nothing of its neighbours is seen, by the encoder or by the head. Windows at the map's border are
what is left there.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from gigavim.engine.embed import check_unreadable, touched_cells
from gigavim.engine.images import ImageEncoder
from gigavim.engine.sequence import TokenSequence
from gigavim.errors import ModelError
from gigavim.model.pictures import Look, side_slices
from gigavim.model.segmentation import SegmentationModel
from gigavim.model.sequence import class_slots, patch_slots, without_class_tokens
from gigavim.model.vim import grid_places
from gigavim.tokens.grid import TokenGrid, TokenSelection
from gigavim.tokens.stream import PatchBlock
from gigavim_kernels.backends import Precision

Labels = npt.NDArray[np.uint8]
PutLabels = Callable[[int, int, Labels], None]
"""Takes labels (h, w) and where on the map they belong: y and x of their corner."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a model made of n windows of one size."""

    labels: Labels
    """(n, h, w)"""
    tokens: Tensor
    """(n, rows, cols, D) final-normed, of the cells that begin in the window."""
    class_tokens: Tensor
    """(n, k, D)"""
    shares: Tensor
    """(n, rows, cols, classes), the mean probabilities over a cell's pixels."""


class WindowModel:
    """A model made ready on a device for windows.

    Args:
        model: moved to the device.
        look: how it sees pictures, with `every_cell`.
        precision: of the encoder's matrix products. threads: of the CPU, all if absent.
    """

    def __init__(
        self,
        model: SegmentationModel,
        look: Look,
        *,
        device: torch.device,
        precision: Precision,
        threads: int | None = None,
    ) -> None:
        self.model, self.look, self.device = model.to(device), look, device
        self._encoder = ImageEncoder(
            model.encoder, device=device, precision=precision, threads=threads
        )

    @torch.no_grad()
    def __call__(self, windows: npt.NDArray[np.uint8]) -> Seen:
        """Segment windows (n, h, w, 3).

        Raises:
            ModelError: the numbers are no longer finite.
        """
        config, order = self.model.encoder.config, self.look.order
        count, height, width, _ = windows.shape
        images = torch.from_numpy(windows).to(self.device).permute(0, 3, 1, 2).float() / 255
        # Convolutions rounded to TF32 would differ from those of a CPU.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found = self.look.features(self.model, images, self._encoder.encode)
            logits = self.model.logits(found.grid)
        if not torch.isfinite(found.encoded[:, -1]).all():
            raise ModelError(
                "the encoder's numbers are not finite: the weights are damaged, or do not bear "
                "this precision: try --precision fp32, or fetch them again"
            )
        rows, cols = (-(-s // config.stride_px) for s in (height, width))
        whole_hw = self.look.grid_hw(config, (height, width))
        patches = without_class_tokens(found.encoded, config.class_token)
        laid = patches.index_select(1, grid_places(*whole_hw, order, patches.device))
        slots = class_slots(patches.shape[1], config.class_token)
        within = logits[..., : rows * config.stride_px, : cols * config.stride_px]
        return Seen(
            logits[..., :height, :width].max(1).indices.to(torch.uint8).cpu().numpy(),
            laid.view(count, *whole_hw, -1)[:, :rows, :cols],
            found.encoded[:, list(slots)],
            F.avg_pool2d(within.softmax(1), config.stride_px).permute(0, 2, 3, 1),
        )


@dataclass(slots=True)
class Kept:
    """What is kept of tokens beyond labels."""

    sequence: TokenSequence
    """(L, D), with rows for class tokens, which become the means of the windows'."""
    shares: TokenSequence | None
    """(patches, classes)"""


def segment_windows(
    blocks: Iterable[PatchBlock],
    model: WindowModel,
    grid: TokenGrid,
    selection: TokenSelection,
    put_labels: PutLabels,
    *,
    batch: int,
    kept: Kept | None,
    source: Path,
    max_unreadable: float = 0.01,
    progress: Callable[[int], object] = lambda tokens: None,
) -> npt.NDArray[np.bool_]:
    """Segment the windows that hold tokens, and say which tokens could not be read, (rows, cols).

    Args:
        blocks: of `gigavim.tokens.stream_blocks`.
        grid: of `gigavim.tokens.grid.make_window_grid`.
        batch: windows at once; it changes nothing but memory and speed.
        kept: where tokens go, if they are to be kept.
        source: the slide's file, for the message of an error.
        max_unreadable: share of tokens that may lie on unreadable pixels.
        progress: called with a number of tokens that are done.

    Raises:
        CorruptSlideError: more than `max_unreadable` of the tokens cannot be read.
        ModelError: as of `WindowModel`.
    """
    unreadable: npt.NDArray[np.bool_] = np.zeros((grid.rows, grid.cols), np.bool_)
    total, windows = torch.zeros(()), 0
    for block in blocks:
        if block.unreadable is not None:
            here = block.rect.of(selection.index) >= 0
            touched = touched_cells(block.unreadable, grid, block.rows, block.cols)
            block.rect.of(unreadable)[:] = touched & here
            check_unreadable(source, int(unreadable.sum()), len(selection), max_unreadable)
        for corners, pixels in _batches(block, grid, selection, batch):
            seen = model(pixels)
            for labels, (row, col) in zip(seen.labels, corners, strict=True):
                put_labels(row * grid.stride_px, col * grid.stride_px, labels)
            index = _places(selection, corners, (seen.tokens.shape[1], seen.tokens.shape[2]))
            if kept is not None:
                _keep(kept, index, seen, model)
            total, windows = total + seen.class_tokens.sum(0).cpu().double(), windows + len(corners)
            progress(len(index))
    kind = model.model.encoder.config.class_token
    if kept is not None and (slots := class_slots(len(selection), kind)):
        kept.sequence.scatter(torch.tensor(slots), (total / max(1, windows)).float())
    return unreadable


def kept_windows(grid: TokenGrid, selection: TokenSelection) -> int:
    """How many windows hold tokens."""
    return int((selection.index[:: grid.block, :: grid.block] >= 0).sum())


def _keep(kept: Kept, index: Tensor, seen: Seen, model: WindowModel) -> None:
    config = model.model.encoder.config
    slots = patch_slots(index, len(kept.sequence) - config.class_tokens, config.class_token)
    kept.sequence.scatter(slots, seen.tokens.flatten(0, 2))
    if kept.shares is not None:
        kept.shares.scatter(index, seen.shares.flatten(0, 2))


def _places(
    selection: TokenSelection, corners: list[tuple[int, int]], cells_hw: tuple[int, int]
) -> Tensor:
    """Places in the sequence of all cells of windows, (n * rows * cols,) int64."""
    rows, cols = cells_hw
    index = [selection.index[row : row + rows, col : col + cols] for row, col in corners]
    return torch.from_numpy(np.stack(index).astype(np.int64).ravel())


def _batches(
    block: PatchBlock, grid: TokenGrid, selection: TokenSelection, batch: int
) -> Iterator[tuple[list[tuple[int, int]], npt.NDArray[np.uint8]]]:
    """The windows of a block that are tokens: rows and columns of their first cells, pixels.

    All of a batch, (n, h, w, 3), have one size.
    """
    stride, side = grid.stride_px, grid.block
    picture = block.pixels
    height = min(block.rows * stride, grid.frame.height_px - block.row * stride)
    width = min(block.cols * stride, grid.frame.width_px - block.col * stride)
    by_size: dict[tuple[int, ...], list[tuple[tuple[int, int], npt.NDArray[np.uint8]]]] = {}
    for y, x in side_slices((height, width), side * stride):
        corner = block.row + y.start // stride, block.col + x.start // stride
        if selection.index[corner] >= 0:
            pixels = picture[y, x]
            by_size.setdefault(pixels.shape, []).append((corner, pixels))
    for windows in by_size.values():
        for start in range(0, len(windows), batch):
            part = windows[start : start + batch]
            yield [corner for corner, _ in part], np.stack([pixels for _, pixels in part])
