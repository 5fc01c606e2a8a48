"""Polygons on the corners of pixels as ragged arrays: 8 bytes a corner, where GEOS takes 24."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np
import numpy.typing as npt
import shapely

from gigavim.compiled import compiled

Corners = npt.NDArray[np.int32]
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rings:
    """Polygons, the exterior first in each; rings end in their first corner.

    In x right, y up exteriors run counter-clockwise and holes clockwise.
    """

    xy: Corners
    """(corners, 2)"""
    ring_starts: Numbers
    """(rings + 1,) into `xy`."""
    polygon_starts: Numbers
    """(n + 1,) into rings."""

    def __len__(self) -> int:
        return len(self.polygon_starts) - 1

    @classmethod
    def joined(cls, parts: Sequence["Rings"]) -> "Rings":
        """The polygons of all parts."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            np.concatenate([np.empty((0, 2), np.int32), *(part.xy for part in parts)]),
            starts_of(np.concatenate([[], *(np.diff(part.ring_starts) for part in parts)])),
            starts_of(np.concatenate([[], *(np.diff(part.polygon_starts) for part in parts)])),
        )

    def __getitem__(self, place: int) -> Self:
        """One polygon; a view."""
        first, last = self.polygon_starts[place : place + 2]
        starts = self.ring_starts[first : last + 1]
        xy = self.xy[starts[0] : starts[-1]]
        return type(self)(xy, starts - starts[0], np.array([0, last - first], np.int64))

    def where(self, wanted: npt.NDArray[np.bool_]) -> Self:
        """Some of the polygons; `wanted` is (n,)."""
        rings, lengths = np.diff(self.polygon_starts), np.diff(self.ring_starts)
        of_ring = np.repeat(wanted, rings)
        xy = self.xy[np.repeat(of_ring, lengths)]
        return type(self)(xy, starts_of(lengths[of_ring]), starts_of(rings[wanted]))

    def polygons(self) -> npt.NDArray[np.object_]:
        """(n,) shapely polygons."""
        made = shapely.from_ragged_array(
            shapely.GeometryType.POLYGON,
            self.xy.astype(np.float64),
            (self.ring_starts, self.polygon_starts),
        )
        return np.asarray(made)

    def areas(self) -> npt.NDArray[np.float64]:
        """(n,)"""
        areas: npt.NDArray[np.float64] = _areas(self.xy, self.ring_starts, self.polygon_starts)
        return areas

    def first_corners(self) -> Corners:
        """(n, 2) where each exterior begins."""
        return self.xy[self.ring_starts[self.polygon_starts[:-1]]]

    def exteriors(self) -> tuple[Corners, Numbers]:
        """Corners (m, 2) of the exteriors, and (m,) the polygon of each."""
        outer = np.zeros(len(self.ring_starts) - 1, np.bool_)
        outer[self.polygon_starts[:-1]] = True
        lengths = np.diff(self.ring_starts)
        xy = self.xy[np.repeat(outer, lengths)]
        return xy, np.repeat(np.arange(len(self)), lengths[outer])

    def bounds(self) -> Corners:
        """(n, 4) left, top, right, bottom."""
        if not len(self):
            return np.empty((0, 4), np.int32)
        starts, outer = self.ring_starts[:-1], self.polygon_starts[:-1]
        least, most = np.minimum.reduceat(self.xy, starts), np.maximum.reduceat(self.xy, starts)
        return np.concatenate([least[outer], most[outer]], 1)

    def normal(self) -> Self:
        """Rings begin at their lowest x, then y; holes go by corners, x and y, the most first.

        That is GEOS's normal form, reversed.
        """
        least = _least(self.xy, self.ring_starts)
        x, y = self.xy[least].T.astype(np.int64)
        holes = np.ones(len(least), np.bool_)
        holes[self.polygon_starts[:-1]] = False
        polygon = np.repeat(np.arange(len(self)), np.diff(self.polygon_starts))
        corners = np.diff(self.ring_starts)
        order = np.lexsort((-y, -x, -corners, holes, polygon))
        xy, ring_starts = _gathered(self.xy, self.ring_starts, least, order)
        return type(self)(xy, ring_starts, self.polygon_starts)

    def geojson(self, xy: npt.NDArray[np.generic]) -> list[list[npt.NDArray[np.generic]]]:
        """The rings of each polygon as slices of `xy`, (corners, 2) in whatever coordinates."""
        rings = [xy[start:stop] for start, stop in pairwise(self.ring_starts.tolist())]
        return [rings[first:last] for first, last in pairwise(self.polygon_starts.tolist())]


def starts_of(lengths: npt.NDArray[np.generic]) -> Numbers:
    """(n + 1,) where each of n parts begins, and where the last ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


@compiled
def _areas(xy: Corners, ring_starts: Numbers, polygon_starts: Numbers) -> npt.NDArray[np.float64]:
    areas = np.zeros(len(polygon_starts) - 1, np.float64)
    for polygon in range(len(areas)):
        twice = np.int64(0)
        for ring in range(polygon_starts[polygon], polygon_starts[polygon + 1]):
            for i in range(ring_starts[ring], ring_starts[ring + 1] - 1):
                twice += np.int64(xy[i, 0]) * xy[i + 1, 1] - np.int64(xy[i + 1, 0]) * xy[i, 1]
        areas[polygon] = twice / 2
    return areas


@compiled
def _least(xy: Corners, ring_starts: Numbers) -> Numbers:
    """(rings,) the corner of lowest x, then y, of each ring."""
    found = np.empty(len(ring_starts) - 1, np.int64)
    for ring in range(len(found)):
        best = ring_starts[ring]
        for i in range(ring_starts[ring] + 1, ring_starts[ring + 1] - 1):
            if xy[i, 0] < xy[best, 0] or (xy[i, 0] == xy[best, 0] and xy[i, 1] < xy[best, 1]):
                best = i
        found[ring] = best
    return found


@compiled
def _gathered(
    xy: Corners, ring_starts: Numbers, least: Numbers, order: Numbers
) -> tuple[Corners, Numbers]:
    """The rings in an order, each begun at its corner `least`."""
    made = np.empty_like(xy)
    starts = np.zeros(len(order) + 1, np.int64)
    place = 0
    for i in range(len(order)):
        ring = order[i]
        begin, end = ring_starts[ring], ring_starts[ring + 1] - 1  # without the repeated corner
        for corner in range(least[ring], end):
            made[place] = xy[corner]
            place += 1
        for corner in range(begin, least[ring] + 1):
            made[place] = xy[corner]
            place += 1
        starts[i + 1] = place
    return made, starts


@compiled
def put_rings(
    out: Corners, xy: Corners, ring_starts: Numbers, wanted: npt.NDArray[np.bool_]
) -> None:
    """Copy the corners of wanted rings to `out`, without the copy between that indexing makes."""
    place = 0
    for ring in range(len(wanted)):
        if wanted[ring]:
            for corner in range(ring_starts[ring], ring_starts[ring + 1]):
                out[place] = xy[corner]
                place += 1
