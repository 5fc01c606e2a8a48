"""Embeddings pooled over windows of 2 x 2, 4 x 4, ... cells, each level made of the one before.

A shard of a level is made of four of the finer level, as soon as these are made and before they are
forgotten: nothing is read back, and a shard of each level is in memory at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gigavim.outputs.arrays import ArrayWriter
from gigavim.store import layout
from gigavim.store.crew import Crew
from gigavim.store.tokens import TokenWriter

SIDE = layout.POOL_SHARD


@dataclass(frozen=True, slots=True)
class _Cells:
    """A shard of a level."""

    means: Tensor
    """(h, w, D) as stored; 0 where no token lies."""
    count: Tensor
    """(h, w) int64"""


@dataclass(frozen=True, slots=True)
class _Level:
    """Where a pooled level goes."""

    shape: tuple[int, ...]
    """(rows, cols)"""
    embeddings: ArrayWriter
    counts: ArrayWriter


def write_pooled(writer: TokenWriter, pools: tuple[int, ...], crew: Crew) -> None:
    """Have the crew write the pooled levels: 2, 4, 8, ..., of which the last is one shard."""
    grid = writer.grid
    levels = []
    for pool in pools:
        embeddings, counts = layout.create_pooled(
            writer.root, pool, rows=grid.rows, cols=grid.cols, width=writer.arrays.width,
            dtype=writer.dtype,
        )  # fmt: skip
        levels.append(_Level(counts.shape, ArrayWriter(embeddings), ArrayWriter(counts)))
    _write_shard(writer, levels, len(levels) - 1, 0, 0, crew)


def _write_shard(
    writer: TokenWriter,
    levels: list[_Level],
    level: int,
    row: int,
    col: int,
    crew: Crew,
) -> _Cells:
    """Write shard (row, col) of a level, after all that it is made of: the shard, halved."""
    height, width = (
        min(SIDE, side - place * SIDE) for side, place in zip(levels[level].shape, (row, col))
    )
    if level == 0:
        cells = _pooled_tokens(writer, row * SIDE, col * SIDE, height, width)
    else:
        kind = torch.float16 if writer.dtype == "float16" else torch.float32
        cells = _Cells(
            torch.zeros(height, width, writer.arrays.width, dtype=kind),
            torch.zeros(height, width, dtype=torch.int64),
        )
        half = SIDE // 2
        for y in range(2 if height > half else 1):
            for x in range(2 if width > half else 1):
                corner = 2 * row + y, 2 * col + x
                part = _write_shard(writer, levels, level - 1, *corner, crew)
                place = slice(y * half, (y + 1) * half), slice(x * half, (x + 1) * half)
                cells.means[place], cells.count[place] = part.means, part.count
    halved = _halved(cells)
    if cells.count.any():
        crew.do(_put_cells, levels[level], (row, col), cells, writer.seal)
    return halved


def _put_cells(
    level: _Level, shard: tuple[int, int], cells: _Cells, seal: Callable[[Path], object]
) -> None:
    means: npt.NDArray[Any] = cells.means.numpy()
    empty = (cells.count == 0).numpy()
    if empty.any():
        means[empty] = np.nan
    window = tuple(
        slice(place * SIDE, place * SIDE + side)
        for place, side in zip(shard, empty.shape, strict=True)
    )
    level.embeddings.write(window, means)
    seal(level.embeddings.file(*shard, 0))
    level.counts.write(window, cells.count.numpy().astype(np.uint32))


def _pooled_tokens(writer: TokenWriter, row: int, col: int, height: int, width: int) -> _Cells:
    """Means over 2 x 2 cells of tokens from (row, col) of the first level on."""
    cells = np.full((2 * height, 2 * width), -1, np.int64)
    index = writer.selection.index[2 * row : 2 * (row + height), 2 * col : 2 * (col + width)]
    cells[: index.shape[0], : index.shape[1]] = index
    grouped = cells.reshape(height, 2, width, 2).transpose(0, 2, 1, 3).reshape(-1, 4)
    count = (grouped >= 0).sum(1)
    places = torch.from_numpy(grouped[grouped >= 0])
    starts = torch.from_numpy(np.cumsum(count) - count)
    means = writer.means(places, starts).cpu()
    means = means.half() if writer.dtype == "float16" else means
    return _Cells(means.view(height, width, -1), torch.from_numpy(count).view(height, width))


def _halved(cells: _Cells) -> _Cells:
    """Means over 2 x 2 cells, weighted by their counts; odd sides are filled up with nothing."""
    count = cells.count[..., None]
    sums, total = _quarter(cells.means.to(torch.float32, copy=True).mul_(count)), _quarter(count)
    means = sums.div_(total.clamp(min=1))
    return _Cells(means.to(cells.means.dtype), total[..., 0])


def _quarter(values: Tensor) -> Tensor:
    """Sums over 2 x 2 of (h, w, D), odd sides padded with zeros."""
    height, width = values.shape[:2]
    if height % 2 or width % 2:
        values = torch.nn.functional.pad(values, (0, 0, 0, width % 2, 0, height % 2))
    upper, lower = values[0::2], values[1::2]
    return (upper[:, 0::2] + upper[:, 1::2]).add_(lower[:, 0::2]).add_(lower[:, 1::2])
