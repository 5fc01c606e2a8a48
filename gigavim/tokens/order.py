"""The order in which the cells of a token grid stand in the sequence.

A state space model sees a two-dimensional neighbourhood through one-dimensional distances, so the
order is part of a model: it has to be that of its training. Needs numpy only; takes the memory of
the answer plus a small multiple of that of the mask.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt

from gigavim.errors import SettingsError

Kind = Literal["raster", "serpentine", "hilbert", "blocks"]
Across = Literal["serpentine", "hilbert"]
Cells = npt.NDArray[np.int64]

# A grid is padded to whole blocks, so a block far larger than a training crop only costs memory.
LARGEST_BLOCK = 1024

_CELLS_AT_ONCE = 1 << 15

_PATTERN = re.compile(
    r"(?P<kind>[a-z]+)\s*(?:\(\s*(?P<block>\d{1,6})\s*(?:,\s*(?P<across>[a-z]+)\s*)?\))?"
)


@dataclass(frozen=True, slots=True)
class ScanOrder:
    """How a grid is walked, written "raster", "serpentine", "hilbert" or "blocks(14, hilbert)".

    Raises `SettingsError` for a combination that means nothing.
    """

    kind: Kind
    block: int | None = None
    """Side of a block in cells; of `blocks` only. Inside a block the walk is a raster."""
    across: Across = "serpentine"
    """The walk from block to block."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind) or self.across not in get_args(Across):
            raise _nonsense(str(self))
        if (self.kind == "blocks") != (self.block is not None):
            raise _nonsense(str(self))
        if self.block is not None and not 1 <= self.block <= LARGEST_BLOCK:
            raise _nonsense(str(self))
        if self.kind != "blocks" and self.across != "serpentine":
            raise _nonsense(f"{self.kind}, {self.across}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read an order as `str()` writes it; raises `SettingsError` for anything else."""
        match = _PATTERN.fullmatch(text.strip().lower())
        if match is None:
            raise _nonsense(text)
        block, across = match["block"], match["across"]
        fields: dict[str, Any] = {"kind": match["kind"]}
        if block is not None:
            fields["block"] = int(block)
        if across is not None:
            fields["across"] = across
        try:
            return cls(**fields)
        except SettingsError:
            raise _nonsense(text) from None

    def __str__(self) -> str:
        if self.block is None:
            return self.kind
        across = "" if self.across == "serpentine" else f", {self.across}"
        return f"{self.kind}({self.block}{across})"


def scan_cells(kept: npt.NDArray[np.bool_], order: ScanOrder) -> Cells:
    """List the kept cells of a grid in scan order.

    `kept` is (rows, cols) bool; the answer is (L,) int64, flat indices row * cols + col, one for
    every True. A cell that is not kept is skipped and leaves the order of the others as it was.
    """
    kept = np.ascontiguousarray(kept, dtype=np.bool_)
    if kept.ndim != 2:
        raise ValueError(f"a grid has two dimensions, not {kept.ndim}")
    if kept.size == 0:
        return np.empty(0, np.int64)
    return _WALKS[order.kind](kept, order)


def _raster(kept: npt.NDArray[np.bool_], order: ScanOrder) -> Cells:
    return np.flatnonzero(kept).astype(np.int64, copy=False)


def _serpentine(kept: npt.NDArray[np.bool_], order: ScanOrder) -> Cells:
    cols = kept.shape[1]
    folded = kept.copy()
    folded[1::2] = kept[1::2, ::-1]
    cells = _raster(folded, order)
    for part in _parts(len(cells)):
        row, col = np.divmod(cells[part], cols)
        col[row % 2 == 1] *= -1
        col[row % 2 == 1] += cols - 1
        cells[part] = row * cols + col
    return cells


def _hilbert(kept: npt.NDArray[np.bool_], order: ScanOrder) -> Cells:
    """Walk the Hilbert curve of the enclosing power-of-two square, leaving out what is outside.

    The places on the curve are sorted and then turned back into cells, which takes one array where
    sorting the cells by their places would take three.
    """
    rows, cols = kept.shape
    bits = max(rows - 1, cols - 1).bit_length()
    cells = _raster(kept, order)
    for part in _parts(len(cells)):
        row, col = np.divmod(cells[part], cols)
        cells[part] = _place_on_curve(row, col, bits)
    cells.sort()
    for part in _parts(len(cells)):
        row, col = _cell_on_curve(cells[part], bits)
        cells[part] = row * cols + col
    return cells


def _blocks(kept: npt.NDArray[np.bool_], order: ScanOrder) -> Cells:
    side = order.block
    assert side is not None, "ScanOrder holds a block side for this kind"
    rows, cols = kept.shape
    padded = np.pad(kept, ((0, -rows % side), (0, -cols % side)))
    tiled = padded.reshape(padded.shape[0] // side, side, padded.shape[1] // side, side)
    block_cols = tiled.shape[2]
    blocks_kept: npt.NDArray[np.bool_] = np.any(tiled, axis=(1, 3))
    walk = scan_cells(blocks_kept, ScanOrder(order.across))
    cells = np.empty(int(np.count_nonzero(kept)), np.int64)
    filled = 0
    for part in _parts(len(walk), max(1, _CELLS_AT_ONCE // side**2)):
        block_row, block_col = np.divmod(walk[part], block_cols)
        of_block = tiled[block_row, :, block_col, :]  # (n, side, side)
        place, row, col = np.nonzero(of_block)
        row += block_row[place] * side
        col += block_col[place] * side
        cells[filled : filled + len(row)] = row * cols + col
        filled += len(row)
    return cells


# The Hilbert curve as an automaton over quadrants, from the coarsest bit to the finest. A quadrant
# is 2 * row_bit + col_bit; _TURN[state, quadrant] is its place on the curve (0..3) and
# _NEXT[state, quadrant] the state inside it. State 0 goes down, right, up; state 1 is its mirror at
# the main diagonal, state 2 that at the other one, and state 3 at both.
_TURN = np.array([[0, 3, 1, 2], [0, 1, 3, 2], [2, 3, 1, 0], [2, 1, 3, 0]], np.int64)
_NEXT = np.array([[1, 2, 0, 0], [0, 1, 3, 1], [2, 0, 2, 3], [3, 3, 1, 2]], np.int64)
_QUADRANT = np.argsort(_TURN, axis=1)
_NEXT_BY_TURN = np.take_along_axis(_NEXT, _QUADRANT, axis=1)


def _place_on_curve(row: Cells, col: Cells, bits: int) -> Cells:
    place = np.zeros_like(row)
    state = np.zeros_like(row)
    for bit in range(bits - 1, -1, -1):
        key = state << 2 | (row >> bit & 1) << 1 | (col >> bit & 1)
        place = place << 2 | _TURN.take(key)
        state = _NEXT.take(key)
    return place


def _cell_on_curve(place: Cells, bits: int) -> tuple[Cells, Cells]:
    row = np.zeros_like(place)
    col = np.zeros_like(place)
    state = np.zeros_like(place)
    for bit in range(bits - 1, -1, -1):
        key = state << 2 | (place >> 2 * bit & 3)
        quadrant = _QUADRANT.take(key)
        row = row << 1 | quadrant >> 1
        col = col << 1 | quadrant & 1
        state = _NEXT_BY_TURN.take(key)
    return row, col


def _parts(length: int, step: int = _CELLS_AT_ONCE) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _nonsense(text: str) -> SettingsError:
    return SettingsError(
        f"no scan order is called {text!r}: use raster, serpentine, hilbert, blocks(N) or "
        f"blocks(N, hilbert) with N from 1 to {LARGEST_BLOCK}"
    )


_WALKS: dict[str, Callable[[npt.NDArray[np.bool_], ScanOrder], Cells]] = {
    "raster": _raster,
    "serpentine": _serpentine,
    "hilbert": _hilbert,
    "blocks": _blocks,
}
