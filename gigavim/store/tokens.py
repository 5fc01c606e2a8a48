"""Embeddings from the swept sequence into a store, a shard at a time."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import zarr
from torch import Tensor

from gigavim.engine.sequence import TokenSequence
from gigavim.errors import OutputError
from gigavim.model.segmentation import SegmentationModel
from gigavim.model.sequence import class_slots, patch_slots
from gigavim.outputs.arrays import ArrayWriter, write_array
from gigavim.store import layout
from gigavim.store.crew import Crew
from gigavim.store.seal import Seal
from gigavim.tokens.grid import Index, TokenGrid, TokenSelection

BATCH_TOKENS = 2048
LARGEST = {"float16": float(np.finfo(np.float16).max), "float32": math.inf}
Advance = Callable[[float], object]


class TokenWriter:
    """Encoded tokens of a sequence, and the arrays of a store they go to.

    Args:
        root: the store's root, without token arrays.
        sequence: encoded, final norm included, (L, D).
        model: tells where class tokens are, and how many classes there are.
        grid: of the tokens. selection: which of its cells they are.
        dtype: of the stored embeddings.
        probabilities: gives the classes' shares (n, classes) of the patches first to last - 1,
            which are then stored too.
        seal: told of the embeddings' files as they are finished.
    """

    def __init__(
        self,
        root: zarr.Group,
        sequence: TokenSequence,
        model: SegmentationModel,
        grid: TokenGrid,
        selection: TokenSelection,
        *,
        dtype: layout.EmbeddingType,
        probabilities: Callable[[int, int], Tensor] | None,
        seal: Seal | None = None,
    ) -> None:
        self.root, self.grid, self.selection, self.dtype = root, grid, selection, dtype
        self.arrays = layout.TokenArrays(len(selection), sequence.width, dtype)
        self._sequence, self._kind = sequence, model.encoder.config.class_token
        self._probabilities = probabilities
        self._classes = model.head.classes
        self.seal: Callable[[Path], object] = (lambda file: None) if seal is None else seal.file
        # Looking at every number takes as long as to convert it.
        self._fits = model.encoder.norm_f.bound() <= LARGEST[dtype]
        classes = self._classes if probabilities is not None else None
        created = layout.create_tokens(root, self.arrays, classes=classes)
        self._made = {name: ArrayWriter(array) for name, array in created.items()}
        self._sums = np.zeros((-(-self.arrays.tokens // self.arrays.shard), self.arrays.width))
        """(shards, D) sums of embeddings."""

    def slots(self, places: Tensor) -> Tensor:
        """(n,) int64 places among the patches -> places in the sequence."""
        return patch_slots(places, len(self.selection), self._kind)

    def means(self, places: Tensor, starts: Tensor) -> Tensor:
        """Mean embeddings of groups of patches, (groups, D); see `TokenSequence.means`."""
        return self._sequence.means(self.slots(places), starts)

    def write(self, advance: Advance, crew: Crew) -> None:
        """Have the crew write embeddings and places, shard by shard.

        Raises:
            OutputError: a number does not fit float16.
        """
        for rows, total in zip(self._shards(), self._sums, strict=True):
            crew.later(self._put_shard, rows, total, advance)

    def write_probabilities(self, advance: Advance, crew: Crew) -> None:
        """Find the classes' shares, and have the crew write them."""
        for rows in self._shards():
            crew.do(self._made["probabilities"].write, rows, self._shares(rows))
            advance(rows.stop - rows.start)

    @torch.inference_mode()
    def _put_shard(self, rows: slice, total: npt.NDArray[np.float64], advance: Advance) -> None:
        """Write the embeddings and places of a shard; adds the sum of the former to `total`."""
        embeddings = np.empty((rows.stop - rows.start, self.arrays.width), self.dtype)
        stored = torch.from_numpy(embeddings)
        for batch in _batches(rows):
            tokens = self._between(batch.start, batch.stop)
            if not self._fits:
                check_range(tokens, self.dtype)
            stored[batch.start - rows.start : batch.stop - rows.start] = tokens
            total += tokens.sum(0).double().cpu().numpy()
        self._made["embeddings"].write(rows, embeddings)
        self.seal(self._made["embeddings"].file(rows.start // self.arrays.shard, 0))
        self._put_places(rows)
        advance(rows.stop - rows.start)

    def _shares(self, rows: slice) -> npt.NDArray[np.float16]:
        """The classes' shares of a shard's patches, (n, classes)."""
        assert self._probabilities is not None
        shares = np.empty((rows.stop - rows.start, self._classes), np.float16)
        for batch in _batches(rows):
            found = self._probabilities(batch.start, batch.stop)
            shares[batch.start - rows.start : batch.stop - rows.start] = found.cpu().numpy()
        return shares

    def _between(self, first: int, last: int) -> Tensor:
        """(last - first, D) neighbouring patches: a view where no class token lies among them."""
        begin, end = self.slots(torch.tensor([first, last - 1])).tolist()
        if end - begin == last - 1 - first:
            rows = self._sequence.rows(begin, end + 1)
            self._sequence.release(begin, end + 1)
            return rows
        return self._sequence.gather(self.slots(torch.arange(first, last)))

    def _put_places(self, rows: slice) -> None:
        row, col = np.divmod(self.selection.cells[rows], self.grid.cols)
        self._made["row_col"].write(rows, np.stack([row, col], 1).astype(np.int32))
        frame, stride = self.grid.frame, self.grid.stride_px
        xy = np.stack([
            frame.x_level0 + col * (stride * frame.scale_x),
            frame.y_level0 + row * (stride * frame.scale_y),
        ], 1)  # fmt: skip
        self._made["xy_level0"].write(rows, xy)

    def finish(self) -> None:
        """Write the embeddings of the whole slide; all shards are written."""
        group = self.root.create_group("slide")
        mean = (self._sums.sum(0) / max(self.arrays.tokens, 1)).astype(np.float32)
        write_array(layout.create_plain(group, "mean", mean.shape, "float32", ("feature",)), mean)
        slots = class_slots(self.arrays.tokens, self._kind)
        if slots:
            own = self._sequence.gather(torch.tensor(slots)).cpu().numpy()
            names = ("class_token", "feature")
            array = layout.create_plain(group, "class_tokens", own.shape, "float32", names)
            write_array(array, own)

    def _shards(self) -> Iterator[slice]:
        tokens, shard = self.arrays.tokens, self.arrays.shard
        for start in range(0, tokens, shard):
            yield slice(start, min(start + shard, tokens))


def write_index(root: zarr.Group, index: Index) -> None:
    """Write the place of each cell among the tokens."""
    array = layout.create_plain(
        root, "index", index.shape, str(index.dtype), ("row", "col"), fill_value=-1
    )
    write_array(array, index)


def check_range(tokens: Tensor, dtype: layout.EmbeddingType) -> None:
    """Raise `OutputError` where a number is too large for the type of the store."""
    least, most = (float(value) for value in tokens.aminmax())
    if max(-least, most) > LARGEST[dtype]:
        raise OutputError(
            f"an embedding holds {max(-least, most):.3g}, more than {dtype} can: store this"
            " model's embeddings with --embedding-dtype float32"
        )


def _batches(rows: slice) -> Iterator[slice]:
    """Parts of a shard that stay in a core's cache."""
    for start in range(rows.start, rows.stop, BATCH_TOKENS):
        yield slice(start, min(start + BATCH_TOKENS, rows.stop))
