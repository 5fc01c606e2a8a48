"""Embeddings from the swept sequence into a store: one by one, and pooled over windows."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
import zarr
from torch import Tensor

from gigavim.engine.sequence import TokenSequence
from gigavim.errors import OutputError
from gigavim.model.segmentation import SegmentationModel
from gigavim.model.sequence import class_slots, patch_slots
from gigavim.outputs.labels import windows
from gigavim.store import layout
from gigavim.tokens.grid import Index, TokenGrid, TokenSelection

BATCH_TOKENS = 8192
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
    ) -> None:
        self.root, self.grid, self.selection, self.dtype = root, grid, selection, dtype
        self.arrays = layout.TokenArrays(len(selection), sequence.width, dtype)
        self._sequence, self._kind = sequence, model.encoder.config.class_token
        self._probabilities = probabilities
        self._classes = model.head.classes

    def slots(self, places: Tensor) -> Tensor:
        """(n,) int64 places among the patches -> places in the sequence."""
        return patch_slots(places, len(self.selection), self._kind)

    def means(self, places: Tensor, starts: Tensor) -> Tensor:
        """Mean embeddings of groups of patches, (groups, D); see `TokenSequence.means`."""
        return self._sequence.means(self.slots(places), starts)

    def write(self, advance: Advance) -> None:
        """Write the token arrays shard by shard, then the embeddings of the whole slide.

        Raises:
            OutputError: a number does not fit float16.
        """
        classes = self._classes if self._probabilities is not None else None
        layout.create_tokens(self.root, self.arrays, classes=classes)
        total = np.zeros(self.arrays.width)
        with Behind() as behind:
            for start in range(0, self.arrays.tokens, self.arrays.shard):
                stop = min(start + self.arrays.shard, self.arrays.tokens)
                total += self._write_shard(start, stop, behind)
                advance(stop - start)
        self._write_slide(total / max(self.arrays.tokens, 1))

    def _write_shard(self, start: int, stop: int, behind: "Behind") -> npt.NDArray[np.float64]:
        """One shard of each token array: (D,) the sum of its embeddings."""
        total = np.zeros(self.arrays.width)
        embeddings = np.empty((stop - start, self.arrays.width), self.dtype)
        shares = np.empty((stop - start, self._classes), np.float16)
        for first in range(start, stop, BATCH_TOKENS):
            last = min(first + BATCH_TOKENS, stop)
            tokens = self._between(first, last)
            batch = slice(first - start, last - start)
            embeddings[batch] = as_stored(tokens, self.dtype)
            total += tokens.sum(0).double().cpu().numpy()
            if self._probabilities is not None:
                shares[batch] = self._probabilities(first, last).cpu().numpy()
        behind.do(lambda: self._put_shard(slice(start, stop), embeddings, shares))
        return total

    def _between(self, first: int, last: int) -> Tensor:
        """(last - first, D) neighbouring patches: a view where no class token lies among them."""
        begin, end = self.slots(torch.tensor([first, last - 1])).tolist()
        if end - begin == last - 1 - first:
            rows = self._sequence.rows(begin, end + 1)
            self._sequence.release(begin, end + 1)
            return rows
        return self._sequence.gather(self.slots(torch.arange(first, last)))

    def _put_shard(
        self, rows: slice, embeddings: npt.NDArray[Any], shares: npt.NDArray[Any]
    ) -> None:
        put(self.root, "tokens/embeddings", rows, embeddings)
        if self._probabilities is not None:
            put(self.root, "tokens/probabilities", rows, shares)
        row, col = np.divmod(self.selection.cells[rows], self.grid.cols)
        put(self.root, "tokens/row_col", rows, np.stack([row, col], 1).astype(np.int32))
        frame, stride = self.grid.frame, self.grid.stride_px
        xy = np.stack([
            frame.x_level0 + col * (stride * frame.scale_x),
            frame.y_level0 + row * (stride * frame.scale_y),
        ], 1)  # fmt: skip
        put(self.root, "tokens/xy_level0", rows, xy)

    def _write_slide(self, mean: npt.NDArray[np.float64]) -> None:
        group = self.root.create_group("slide")
        width = self.arrays.width
        layout.create_plain(group, "mean", (width,), "float32", ("feature",))[...] = mean
        slots = class_slots(self.arrays.tokens, self._kind)
        if slots:
            own = self._sequence.gather(torch.tensor(slots)).cpu().numpy()
            names = ("class_token", "feature")
            layout.create_plain(group, "class_tokens", own.shape, "float32", names)[...] = own


class Behind:
    """Does one thing at a time on a thread, one behind its caller; errors come out at the next."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="gigavim-store")
        self._last: Future[None] | None = None

    def do(self, work: Callable[[], None]) -> None:
        """Wait for the work before, and begin this."""
        if self._last is not None:
            self._last.result()
        self._last = self._pool.submit(work)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._pool.shutdown()
        if kind is None and self._last is not None:
            self._last.result()


def write_index(root: zarr.Group, index: Index) -> None:
    """Write the place of each cell among the tokens."""
    array = layout.create_plain(
        root, "index", index.shape, str(index.dtype), ("row", "col"), fill_value=-1
    )
    array[...] = index


def write_pooled(writer: TokenWriter, pools: tuple[int, ...], advance: Advance) -> None:
    """Write mean embeddings over windows of 2 x 2, 4 x 4, ... cells, each level a shard at a time.

    The first level is made of the tokens, each other one of the level before, as it is stored.
    """
    grid, root = writer.grid, writer.root
    for pool in pools:
        group = layout.create_pooled(
            root, pool, rows=grid.rows, cols=grid.cols, width=writer.arrays.width,
            dtype=writer.dtype,
        )  # fmt: skip
        height, width = array_of(group, "count").shape
        with Behind() as behind:
            for y0, y1, x0, x1 in windows(height, width, side_px=layout.POOL_SHARD):
                window = slice(y0, y1), slice(x0, x1)
                if pool == pools[0]:
                    means, count = _pooled_tokens(writer, window)
                    advance(int(count.sum()))
                else:
                    means, count = _pooled_level(root, pool // 2, window)
                if count.any():
                    behind.do(partial(_put_level, group, window, means, count, writer.dtype))


def _put_level(
    group: zarr.Group,
    window: tuple[slice, slice],
    means: Tensor,
    count: Tensor,
    dtype: layout.EmbeddingType,
) -> None:
    stored = (means.half() if dtype == "float16" else means).numpy()
    stored[count.numpy() == 0] = np.nan
    put(group, "embeddings", window, stored)
    put(group, "count", window, count.numpy().astype(np.uint32))


def _pooled_tokens(writer: TokenWriter, window: tuple[slice, slice]) -> tuple[Tensor, Tensor]:
    """(h, w, D) means and (h, w) counts over 2 x 2 cells."""
    height, width = (part.stop - part.start for part in window)
    rows, cols = (slice(2 * part.start, 2 * part.stop) for part in window)
    cells = np.full((2 * height, 2 * width), -1, np.int64)
    index = writer.selection.index[rows, cols]
    cells[: index.shape[0], : index.shape[1]] = index
    grouped = cells.reshape(height, 2, width, 2).transpose(0, 2, 1, 3).reshape(-1, 4)
    count = (grouped >= 0).sum(1)
    places = torch.from_numpy(grouped[grouped >= 0])
    starts = torch.from_numpy(np.cumsum(count) - count)
    means = writer.means(places, starts).cpu()
    return means.view(height, width, -1), torch.from_numpy(count).view(height, width)


def _pooled_level(
    root: zarr.Group, finer: int, window: tuple[slice, slice]
) -> tuple[Tensor, Tensor]:
    """As `_pooled_tokens`, of 2 x 2 cells of a finer level."""
    rows, cols = (slice(2 * part.start, 2 * part.stop) for part in window)
    group = f"pooled/{finer}"
    count = torch.from_numpy(np.asarray(array_of(root, f"{group}/count")[rows, cols], np.int64))
    means = torch.from_numpy(np.asarray(array_of(root, f"{group}/embeddings")[rows, cols]))
    sums = torch.nan_to_num_(means.float()).mul_(count[..., None])
    total, counted = _quarter(sums), _quarter(count[..., None])
    return total / counted.clamp(min=1), counted[..., 0]


def _quarter(values: Tensor) -> Tensor:
    """Sums over 2 x 2 of (h, w, D), odd sides padded with zeros."""
    height, width = values.shape[:2]
    padded = torch.nn.functional.pad(values, (0, 0, 0, width % 2, 0, height % 2))
    rows, cols, depth = padded.shape
    return padded.view(rows // 2, 2, cols // 2, 2, depth).sum((1, 3))


def as_stored(tokens: Tensor, dtype: layout.EmbeddingType) -> npt.NDArray[np.floating[Any]]:
    """Embeddings in the type of the store.

    Raises:
        OutputError: one is too large for float16.
    """
    if dtype == "float32":
        return tokens.float().cpu().numpy()
    least, most = (float(value) for value in tokens.aminmax())
    if max(-least, most) > np.finfo(np.float16).max:
        raise OutputError(
            f"an embedding holds {max(-least, most):.3g}, more than float16 can: store this"
            " model's embeddings with --embedding-dtype float32"
        )
    return tokens.half().cpu().numpy()


def array_of(group: zarr.Group, name: str) -> "zarr.Array[Any]":
    """An array of a group."""
    array = group[name]
    assert isinstance(array, zarr.Array)
    return array


def put(group: zarr.Group, name: str, where: Any, values: npt.NDArray[Any]) -> None:
    """Write a region of an array."""
    array_of(group, name)[where] = values
