"""A label map on disk: zarr arrays, written and read by windows."""

import shutil
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import zarr
from zarr.codecs import BloscCodec, BloscShuffle

from gigavim.outputs.arrays import ArrayWriter
from gigavim.outputs.atomic import explained

CHUNK_HW = (256, 2048)
"""Low and wide: labels arrive as strips of rows, of which a whole row of chunks is held."""
SHARD_COLS = 1 << 16
"""A shard is one row of chunks, so that each is written once; wider maps have several a row."""
WINDOW_PX = 2048
"""Side of the windows in which a map is gone through; a multiple of both sides of a chunk."""


class Coverage(IntEnum):
    """What became of a token cell."""

    SKIPPED = 0
    """Outside the slide's content, or taken for background without asking the model."""
    PREDICTED = 1
    UNREADABLE = 2
    """The file's pixels could not be decoded there."""


class LabelMap(Protocol):
    """What the writers need: a label map of any size that is read by windows."""

    @property
    def height(self) -> int:
        """Rows."""

    @property
    def width(self) -> int:
        """Columns."""

    def read(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        """(y1 - y0, x1 - x0) uint8 labels of the window, which lies inside the map."""


class LabelStore:
    """A (height, width) uint8 label map and the coverage of its token cells, on disk.

    Memory holds the windows asked for and at most one row of chunks (256 rows of the map). Labels
    and coverage that were never written are 0. Reading by several threads is safe.
    """

    def __init__(self, folder: str | Path, group: zarr.Group | None = None) -> None:
        self.folder = Path(folder)
        group = group if group is not None else zarr.open_group(self.folder, mode="r+")
        self._labels = _array(group, "labels")
        self._coverage = _array(group, "coverage")
        self.cell_px: int = int(self._coverage.attrs["cell_px"])  # type: ignore[arg-type]
        """Side of a coverage cell, in map pixels."""
        self._writers: dict[str, ArrayWriter] = {}
        self._pending: list[np.ndarray] = []
        self._pending_y = 0
        """Row of the map at which the pending strips begin."""

    @classmethod
    def create(
        cls,
        folder: str | Path,
        *,
        height: int,
        width: int,
        cell_px: int,
        cells_hw: tuple[int, int],
        lasting: bool = False,
    ) -> Self:
        """A new store in `folder`, which is replaced if it holds something.

        Args:
            height: rows of the map. width: its columns.
            cell_px: side of a coverage cell in map pixels (the stride of the tokens).
            cells_hw: (rows, columns) of coverage cells; they may reach over the map.
            lasting: into few files.

        Raises:
            OutputError: the disk refuses.
        """
        folder = Path(folder)
        # Shuffled bits of few classes are nearly constant: lz4 then packs at memory speed.
        codec = BloscCodec(cname="lz4", clevel=5, shuffle=BloscShuffle.bitshuffle)
        common: dict[str, Any] = {"dtype": "uint8", "fill_value": 0, "compressors": codec}
        with explained(folder):
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
            group = zarr.create_group(folder)
            rows, cols = _chunks(height, width)
            across = min(-(-width // cols) * cols, SHARD_COLS)
            group.create_array(
                "labels",
                shape=(height, width),
                chunks=(rows, cols),
                shards=(rows, max(across, 1)) if lasting else None,
                dimension_names=("y", "x"),
                **common,
            )
            coverage = group.create_array(
                "coverage",
                shape=cells_hw,
                chunks=_chunks(*cells_hw),
                dimension_names=("row", "col"),
                **common,
            )
            coverage.attrs["cell_px"] = cell_px
            return cls(folder)

    @property
    def height(self) -> int:
        """Rows of the map."""
        return int(self._labels.shape[0])

    @property
    def width(self) -> int:
        """Columns of the map."""
        return int(self._labels.shape[1])

    def write_rows(self, y: int, strip: np.ndarray) -> None:
        """Write the (h, width) uint8 labels of rows y to y + h - 1.

        Strips that follow on each other are gathered until they fill whole chunks.
        """
        held = sum(len(rows) for rows in self._pending)
        if held and y != self._pending_y + held:
            self.flush()
            held = 0
        if not held:
            self._pending_y = y
        end = y + len(strip)
        if not held and y % CHUNK_HW[0] == 0 and end % CHUNK_HW[0] == 0:
            self.write(y, 0, strip)  # whole chunks as they are
            return
        self._pending.append(np.array(strip))
        if end >= self.height or end // CHUNK_HW[0] > self._pending_y // CHUNK_HW[0]:
            self.flush(keep=0 if end >= self.height else end % CHUNK_HW[0])

    def flush(self, *, keep: int = 0) -> None:
        """Write the strips that are still held, but for the last `keep` rows."""
        if self._pending:
            rows = self._pending[0] if len(self._pending) == 1 else np.concatenate(self._pending)
            ready = len(rows) - keep
            y = self._pending_y
            self._pending = [rows[ready:].copy()] if keep else []
            self._pending_y = y + ready
            self.write(y, 0, rows[:ready])

    def write(self, y: int, x: int, window: np.ndarray) -> None:
        """Write the (h, w) uint8 labels of the window whose top-left pixel is (y, x)."""
        self._put(self._labels, y, x, window)

    def read(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        """(y1 - y0, x1 - x0) uint8 labels; the window lies inside the map."""
        if self._pending:
            self.flush()
        _check_window(self._labels.shape, y0, y1, x0, x1)
        return np.asarray(self._labels[y0:y1, x0:x1])

    def write_coverage(self, row: int, col: int, cells: np.ndarray) -> None:
        """Write (rows, cols) uint8 `Coverage` values from cell (row, col) on."""
        self._put(self._coverage, row, col, cells)

    def read_coverage(self) -> np.ndarray:
        """(rows, cols) uint8 `Coverage` of every cell."""
        return np.asarray(self._coverage[:])

    def coverage_at(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        """(y1 - y0, x1 - x0) uint8 `Coverage` of a window; the last cells have the rest."""
        _check_window(self._labels.shape, y0, y1, x0, x1)
        rows = np.minimum(np.arange(y0, y1) // self.cell_px, self._coverage.shape[0] - 1)
        cols = np.minimum(np.arange(x0, x1) // self.cell_px, self._coverage.shape[1] - 1)
        if not len(rows) or not len(cols):
            return np.zeros((len(rows), len(cols)), np.uint8)
        cells = np.asarray(self._coverage[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1])
        return cells[np.ix_(rows - rows[0], cols - cols[0])]

    def files(self, y0: int, y1: int) -> list[Path]:
        """Where the labels are whose chunks begin in rows y0 to y1 - 1; written from here."""
        chunk = self._labels.shards or self._labels.chunks
        rows = range(-(-y0 // chunk[0]), -(-y1 // chunk[0]))
        cols = range(-(-self.width // chunk[1]))
        writer = self._writer(self._labels)
        return [writer.file(row, col) for row in rows for col in cols]

    def remove(self) -> None:
        """Delete the scratch folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _put(self, array: "zarr.Array[Any]", y: int, x: int, window: np.ndarray) -> None:
        if window.dtype != np.uint8 or window.ndim != 2:
            raise ValueError(f"labels are 2-d uint8, not {window.ndim}-d {window.dtype}")
        height, width = window.shape
        _check_window(array.shape, y, y + height, x, x + width)
        with explained(self.folder):
            region = slice(y, y + height), slice(x, x + width)
            self._writer(array).write(region, window)

    def _writer(self, array: "zarr.Array[Any]") -> ArrayWriter:
        if array.name not in self._writers:
            self._writers[array.name] = ArrayWriter(array)
        return self._writers[array.name]


def windows(height: int, width: int, *, side_px: int) -> Iterator[tuple[int, int, int, int]]:
    """The (y0, y1, x0, x1) of square windows that tile a map, row by row."""
    for y in range(0, height, side_px):
        for x in range(0, width, side_px):
            yield y, min(y + side_px, height), x, min(x + side_px, width)


def halve(source: LabelMap, folder: Path, *, offset: int) -> LabelStore:
    """A store of every second label of every second row, from `offset` (0 or 1) on.

    Its sides are half the source's, rounded up; the last pixel is clamped to the source.
    """
    height, width = -(-source.height // 2), -(-source.width // 2)
    half = LabelStore.create(folder, height=height, width=width, cell_px=1, cells_hw=(1, 1))
    for y0, y1, x0, x1 in windows(height, width, side_px=WINDOW_PX):
        window = source.read(2 * y0, min(2 * y1, source.height), 2 * x0, min(2 * x1, source.width))
        half.write(y0, x0, every_second(window, (y1 - y0, x1 - x0), offset=offset))
    return half


def every_second(window: np.ndarray, shape_hw: tuple[int, int], *, offset: int) -> np.ndarray:
    """(h, w) of every second label of every second row of a window, clamped to it."""
    rows, cols = (
        np.minimum(np.arange(side) * 2 + offset, there - 1)
        for side, there in zip(shape_hw, window.shape)
    )
    return np.ascontiguousarray(window[np.ix_(rows, cols)])


def _array(group: zarr.Group, name: str) -> "zarr.Array[Any]":
    array = group[name]
    assert isinstance(array, zarr.Array)
    return array


def _chunks(height: int, width: int) -> tuple[int, int]:
    return max(1, min(height, CHUNK_HW[0])), max(1, min(width, CHUNK_HW[1]))


def _check_window(shape: tuple[int, ...], y0: int, y1: int, x0: int, x1: int) -> None:
    if not (0 <= y0 <= y1 <= shape[0] and 0 <= x0 <= x1 <= shape[1]):
        raise ValueError(f"window [{y0}, {y1}) x [{x0}, {x1}) is outside the map of {shape}")
