"""Regions cut by the seams between tiles, joined exactly.

Two pieces belong together where they share an edge of a pixel along a seam. Pieces are gathered by
a union-find over those edges, and united once the sweep has passed them (`outputs.stitch`). Holes
inside a tile take no part in that.
"""

from dataclasses import dataclass, field

import numpy as np
import shapely

from gigavim.outputs.stitch import stitch


@dataclass(frozen=True, slots=True)
class TilePieces:
    """The polygons of one tile, in map pixels; labels are (n,) int64."""

    x: int
    y: int
    width: int
    height: int
    inner_labels: np.ndarray
    inner: np.ndarray
    """Polygons that touch no seam, in their final form."""
    seam_labels: np.ndarray
    seam: np.ndarray
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
    _polygons: dict[int, shapely.Polygon] = field(default_factory=dict)
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
        for number, label, polygon in zip(numbers.tolist(), tile.seam_labels.tolist(), tile.seam):
            self._parent[number] = number
            self._members[number] = [number]
            self._labels[number] = label
            self._polygons[number] = polygon
        sides = _Sides.of(tile, numbers)
        span = slice(tile.x, tile.x + tile.width)
        self._join(self._above[span], sides.top)
        if self._left is not None:
            self._join(self._left, sides.left)
        self._left = sides.right
        self._below[span] = sides.bottom

    def finish_row(self, *, last: bool) -> tuple[np.ndarray, np.ndarray]:
        """Close the row of tiles: (n,) labels and polygons of the regions that grow no more."""
        self._left = None
        self._above, self._below = self._below, np.full(self.width, -1, np.int64)
        growing: set[int] = set()
        if not last:
            edge = self._above[self._above >= 0]
            growing = {self._root(number) for number in np.unique(edge).tolist()}
        ended = [root for root in self._members if root not in growing]
        labels = np.array([self._labels[root] for root in ended], np.int64)
        polygons = np.empty(len(ended), object)
        for place, root in enumerate(ended):
            members = self._members.pop(root)
            polygons[place] = unite(
                [self._polygons.pop(number) for number in members], self.tile_px
            )
            for number in members:
                del self._parent[number], self._labels[number]
        return labels, canonical(polygons)

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
        xy, owner = shapely.get_coordinates(shapely.get_exterior_ring(tile.seam), return_index=True)
        start, end = xy[:-1].astype(np.int64), xy[1:].astype(np.int64)
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


def unite(pieces: list[shapely.Polygon], tile_px: int) -> shapely.Polygon:
    """The union of pieces of one 4-connected region, as they were traced."""
    if len(pieces) == 1:
        return pieces[0]
    _, xy, (ring_starts, polygon_starts) = shapely.to_ragged_array(pieces)
    whole = xy.astype(np.int64)
    # Rings that touch no seam are holes as they are.
    on_seam = (whole % tile_px == 0).any(1)
    cut = np.logical_or.reduceat(on_seam, ring_starts[:-1])
    cut[polygon_starts[:-1]] = True
    ring_of = np.repeat(np.arange(len(cut)), np.diff(ring_starts))
    lengths = np.diff(ring_starts)
    joined, joined_starts = stitch(whole[cut[ring_of]], _starts(lengths[cut]), tile_px)
    rings = np.concatenate([joined, whole[~cut[ring_of]]])
    starts = np.concatenate([joined_starts, joined_starts[-1] + _starts(lengths[~cut])[1:]])
    # The exterior goes round everything, so its corner is the first of all.
    first = np.lexsort((joined[:, 0], joined[:, 1]))[0]
    exterior = int(np.searchsorted(joined_starts, first, side="right")) - 1
    order = np.concatenate([[exterior], np.delete(np.arange(len(starts) - 1), exterior)])
    ordered = _starts(np.diff(starts)[order])
    gather = np.repeat(starts[order] - ordered[:-1], np.diff(ordered)) + np.arange(len(rings))
    polygon = shapely.from_ragged_array(
        shapely.GeometryType.POLYGON,
        rings[gather].astype(np.float64),
        (ordered, np.array([0, len(order)])),
    )
    made: shapely.Polygon = polygon[0]
    return made


def _starts(lengths: np.ndarray) -> np.ndarray:
    """(n + 1,) where each of n parts begins, and where the last ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def canonical(polygons: np.ndarray) -> np.ndarray:
    """(n,) polygons in the form that depends on nothing but their shape (`polygons.Regions`)."""
    return normal(drop_collinear(polygons))


def normal(polygons: np.ndarray) -> np.ndarray:
    """(n,) polygons, whose vertices are corners only, in that form."""
    return np.asarray(shapely.reverse(shapely.normalize(polygons)))


def drop_collinear(polygons: np.ndarray) -> np.ndarray:
    """(n,) polygons without the vertices at which their axis-parallel rings do not turn."""
    if not len(polygons):
        return polygons
    _, xy, (ring_starts, polygon_starts) = shapely.to_ragged_array(polygons)
    first, last = ring_starts[:-1], ring_starts[1:] - 1  # last repeats first
    before = np.arange(-1, len(xy) - 1)
    before[first] = last - 1
    after = np.arange(1, len(xy) + 1)
    after[last] = first + 1
    turns = ((xy[before] != xy).any(1)) & ~((xy[before] == xy) & (xy == xy[after])).any(1)
    turns[last] = False
    # A ring closes with its own first vertex that is left.
    kept = np.add.reduceat(turns.astype(np.int64), first)
    starts = np.concatenate([[0], np.cumsum(kept + 1)])
    corners = np.empty((starts[-1], 2))
    closing = starts[1:] - 1
    open_ends = np.ones(len(corners), bool)
    open_ends[closing] = False
    corners[open_ends] = xy[turns]
    corners[closing] = corners[starts[:-1]]
    return np.asarray(
        shapely.from_ragged_array(shapely.GeometryType.POLYGON, corners, (starts, polygon_starts))
    )
