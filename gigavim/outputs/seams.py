"""Regions cut by the seams between tiles, joined exactly.

Two pieces belong together where they share an edge of a pixel along a seam. Pieces are gathered by
a union-find over those edges, and united once the sweep has passed them (`outputs.stitch`). Holes
inside a tile take no part in that.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from gigavim.outputs.rings import Rings, put_rings, starts_of
from gigavim.outputs.stitch import stitch

BATCH_CORNERS = 200_000


@dataclass(frozen=True, slots=True)
class TilePieces:
    """The polygons of one tile, in map pixels; labels are (n,) int64."""

    x: int
    y: int
    width: int
    height: int
    inner_labels: np.ndarray
    inner: Rings
    """Polygons that touch no seam, in their final form."""
    seam_labels: np.ndarray
    seam: Rings
    """Polygons that touch one."""


@dataclass
class Seams:
    """The pieces of a sweep over tiles, row by row, that may still grow."""

    width: int
    """Of the map, in pixels."""
    tile_px: int
    """Seams lie at the multiples of this."""
    _parent: dict[int, int] = field(default_factory=dict)
    _members: dict[int, list[int]] = field(default_factory=dict)
    """Of each root."""
    _pieces: dict[int, Rings] = field(default_factory=dict)
    _labels: dict[int, int] = field(default_factory=dict)
    _above: np.ndarray = field(init=False)
    """(width,) piece above each pixel edge of the seam at the top of this row, -1 where none."""
    _below: np.ndarray = field(init=False)
    """The same for the seam at the bottom of this row."""
    _left: np.ndarray | None = None
    """(height,) piece left of each pixel edge of the seam at the left of the next tile."""
    _next: int = 0

    def __post_init__(self) -> None:
        self._above = np.full(self.width, -1, np.int64)
        self._below = np.full(self.width, -1, np.int64)

    def add(self, tile: TilePieces) -> None:
        """Take the tile to the right of the last one."""
        numbers = np.arange(self._next, self._next + len(tile.seam), dtype=np.int64)
        self._next += len(tile.seam)
        for place, (number, label) in enumerate(zip(numbers.tolist(), tile.seam_labels.tolist())):
            self._parent[number] = number
            self._members[number] = [number]
            self._labels[number] = label
            self._pieces[number] = tile.seam[place]
        sides = _Sides.of(tile, numbers)
        span = slice(tile.x, tile.x + tile.width)
        self._join(self._above[span], sides.top)
        if self._left is not None:
            self._join(self._left, sides.left)
        self._left = sides.right
        self._below[span] = sides.bottom

    def finish_row(self, *, last: bool) -> Iterator[tuple[np.ndarray, Rings]]:
        """Close the row of tiles: (n,) labels and outlines of the regions that grow no more.

        They come in batches of bounded size, or one by one where they are larger.
        """
        self._left = None
        self._above, self._below = self._below, np.full(self.width, -1, np.int64)
        growing: set[int] = set()
        if not last:
            edge = self._above[self._above >= 0]
            growing = {self._root(number) for number in np.unique(edge).tolist()}
        labels: list[int] = []
        outlines: list[Rings] = []
        corners = 0
        for root in [root for root in self._members if root not in growing]:
            members = self._members.pop(root)
            labels.append(self._labels[root])
            outlines.append(unite([self._pieces.pop(n) for n in members], self.tile_px))
            corners += len(outlines[-1].xy)
            for number in members:
                del self._parent[number], self._labels[number]
            if corners > BATCH_CORNERS:
                yield _batch(labels, outlines)
                labels, outlines, corners = [], [], 0
        if labels:
            yield _batch(labels, outlines)

    def _join(self, one: np.ndarray, other: np.ndarray) -> None:
        both = (one >= 0) & (other >= 0)
        for a, b in np.unique(np.stack([one[both], other[both]], 1), axis=0).tolist():
            if self._labels[a] != self._labels[b]:
                continue
            root, child = self._root(a), self._root(b)
            if root == child:
                continue
            if len(self._members[root]) < len(self._members[child]):
                root, child = child, root
            self._parent[child] = root
            self._members[root] += self._members.pop(child)

    def _root(self, number: int) -> int:
        while (parent := self._parent[number]) != number:
            self._parent[number] = number = self._parent[parent]
        return number


@dataclass(frozen=True, slots=True)
class _Sides:
    """Which piece lies at each pixel edge of a tile's four sides; -1 where none."""

    left: np.ndarray
    top: np.ndarray
    right: np.ndarray
    bottom: np.ndarray

    @classmethod
    def of(cls, tile: TilePieces, numbers: np.ndarray) -> "_Sides":
        xy, owner = tile.seam.exteriors()
        start, end = xy[:-1], xy[1:]
        same = owner[:-1] == owner[1:]

        def side(axis: int, place: int, origin: int, length: int) -> np.ndarray:
            at = same & (start[:, axis] == place) & (end[:, axis] == place)
            edges = np.full(length, -1, np.int64)
            a, b = start[at, 1 - axis] - origin, end[at, 1 - axis] - origin
            spans = zip(np.minimum(a, b).tolist(), np.maximum(a, b).tolist(), owner[:-1][at])
            for low, high, piece in spans:
                edges[low:high] = numbers[piece]
            return edges

        return cls(
            left=side(0, tile.x, tile.y, tile.height),
            top=side(1, tile.y, tile.x, tile.width),
            right=side(0, tile.x + tile.width, tile.y, tile.height),
            bottom=side(1, tile.y + tile.height, tile.x, tile.width),
        )


def _batch(labels: list[int], outlines: list[Rings]) -> tuple[np.ndarray, Rings]:
    joined = Rings.joined(outlines)
    outlines.clear()  # they may be large, and are in `joined` now
    return np.array(labels, np.int64), joined.normal()


def unite(pieces: list[Rings], tile_px: int) -> Rings:
    """The union of pieces of one 4-connected region, as they were traced; `pieces` is emptied."""
    if len(pieces) == 1:
        return pieces[0]
    whole = Rings.joined(pieces)
    pieces.clear()  # they may be large, and are in `whole` now
    xy, lengths = whole.xy, np.diff(whole.ring_starts)
    # Rings that touch no seam are holes as they are.
    at_seam = (xy[:, 0] % tile_px == 0) | (xy[:, 1] % tile_px == 0)
    cut = np.logical_or.reduceat(at_seam, whole.ring_starts[:-1])
    cut[whole.polygon_starts[:-1]] = True
    corner_cut = np.repeat(cut, lengths)
    joined, joined_starts = stitch(xy[corner_cut], starts_of(lengths[cut]), tile_px)
    # The exterior goes round everything, so its corner is the first of all.
    first = np.lexsort((joined[:, 0], joined[:, 1]))[0]
    exterior = int(np.searchsorted(joined_starts, first, side="right")) - 1
    rings = np.split(joined, joined_starts[1:-1])
    rings.insert(0, rings.pop(exterior))
    starts = starts_of(np.concatenate([[len(ring) for ring in rings], lengths[~cut]]))
    corners = np.empty((starts[-1], 2), np.int32)
    np.concatenate(rings, out=corners[: len(joined)])
    put_rings(corners[len(joined) :], xy, whole.ring_starts, ~cut)
    return Rings(corners, starts, np.array([0, len(starts) - 1], np.int64))
