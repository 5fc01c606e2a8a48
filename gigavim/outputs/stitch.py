"""Rings of neighbouring tiles' pieces joined into the rings of one region, by cancelling edges.

Where two pieces of a region meet along a seam, both have the seam's pixel edges, in opposite
directions. Without these pairs what is left of the pieces' rings chains into the region's rings.
"""

import numpy as np
import numpy.typing as npt

from gigavim.compiled import compiled

Numbers = npt.NDArray[np.int64]
Corners = npt.NDArray[np.int32]


def stitch(xy: Corners, ring_starts: Numbers, tile_px: int) -> tuple[Corners, Numbers]:
    """Join the rings of a region's pieces.

    Args:
        xy: (n, 2) corners, ring after ring, each closed, with the region on the right (y down).
        ring_starts: (rings + 1,) into `xy`.
        tile_px: seams lie at its multiples.

    Returns:
        The same two of the whole region's rings.
    """
    width = int(xy[:, 0].max()) + 1
    edges, key = _edges(xy, ring_starts, tile_px, width)
    edges = edges[_unpaired(key, np.argsort(key, kind="stable"))]
    del key
    start = edges[:, 1].astype(np.int64) * width + edges[:, 0]
    order = np.argsort(start, kind="stable")
    edges, start = edges[order], start[order]
    rings: tuple[Corners, Numbers] = _chain(edges, start, width)
    return rings


@compiled
def _edges(xy: Corners, ring_starts: Numbers, tile_px: int, width: int) -> tuple[Corners, Numbers]:
    """Edges (m, 4) as x, y of both ends, those along seams cut into pixels.

    And (m,) keys, equal for the same edge of a seam in either direction, and for no others.
    """
    count = 0
    for ring in range(len(ring_starts) - 1):
        for i in range(ring_starts[ring], ring_starts[ring + 1] - 1):
            count += _pieces(xy[i], xy[i + 1], tile_px)
    edges = np.empty((count, 4), np.int32)
    key = np.empty(count, np.int64)
    place = 0
    for ring in range(len(ring_starts) - 1):
        for i in range(ring_starts[ring], ring_starts[ring + 1] - 1):
            pieces = _pieces(xy[i], xy[i + 1], tile_px)
            seam = xy[i, 0] == xy[i + 1, 0] and xy[i, 0] % tile_px == 0
            seam = seam or (xy[i, 1] == xy[i + 1, 1] and xy[i, 1] % tile_px == 0)
            step_x = (xy[i + 1, 0] - xy[i, 0]) // pieces
            step_y = (xy[i + 1, 1] - xy[i, 1]) // pieces
            for piece in range(pieces):
                edges[place, 0] = xy[i, 0] + piece * step_x
                edges[place, 1] = xy[i, 1] + piece * step_y
                edges[place, 2] = edges[place, 0] + step_x
                edges[place, 3] = edges[place, 1] + step_y
                x, y = min(edges[place, 0], edges[place, 2]), min(edges[place, 1], edges[place, 3])
                upright = np.int64(edges[place, 0] == edges[place, 2])
                key[place] = 2 * (np.int64(y) * width + x) + upright if seam else -1 - place
                place += 1
    return edges, key


@compiled
def _unpaired(key: Numbers, order: Numbers) -> npt.NDArray[np.bool_]:
    """Which edges are in no pair; `order` sorts the keys."""
    kept = np.ones(len(key), np.bool_)
    for place in range(len(order) - 1):
        if key[order[place]] == key[order[place + 1]]:
            kept[order[place]] = kept[order[place + 1]] = False
    return kept


@compiled
def _pieces(start: Corners, end: Corners, tile_px: int) -> int:
    """Into how many edges a side is cut: its pixels on a seam, else one."""
    if start[0] == end[0] and start[0] % tile_px == 0:
        return int(abs(end[1] - start[1]))
    if start[1] == end[1] and start[1] % tile_px == 0:
        return int(abs(end[0] - start[0]))
    return 1


@compiled
def _chain(edges: Corners, start: Numbers, width: int) -> tuple[Corners, Numbers]:
    """Rings of directed edges sorted by their start, turning left where two go on."""
    count = len(edges)
    used = np.zeros(count, np.bool_)
    xy = np.empty((2 * count, 2), np.int32)
    starts = np.zeros(count + 1, np.int64)
    corners = rings = 0
    for first in range(count):
        if used[first]:
            continue
        edge, heading, begin = first, -1, corners
        departed = _heading(edges[first, 2] - edges[first, 0], edges[first, 3] - edges[first, 1])
        while True:
            used[edge] = True
            x, y, to_x, to_y = edges[edge]
            turned = _heading(to_x - x, to_y - y)
            if turned != heading:
                xy[corners, 0] = x
                xy[corners, 1] = y
                corners += 1
                heading = turned
            if (
                to_x == edges[first, 0]
                and to_y == edges[first, 1]
                and _closes(edges, start, used, first, heading, width)
            ):
                break
            edge = _next(edges, start, used, np.int64(to_y) * width + to_x, heading)
        if heading == departed:  # the ring began on a straight edge
            for corner in range(begin, corners - 1):
                xy[corner] = xy[corner + 1]
            corners -= 1
        xy[corners] = xy[begin]
        corners += 1
        rings += 1
        starts[rings] = corners
    return xy[:corners], starts[: rings + 1]


@compiled
def _heading(x: int, y: int) -> int:
    """East, south, west, north as 0 to 3."""
    if y == 0:
        return 0 if x > 0 else 2
    return 1 if y > 0 else 3


@compiled
def _next(
    edges: Corners, start: Numbers, used: npt.NDArray[np.bool_], key: int, heading: int
) -> int:
    """The edge that goes on from a corner: left before straight on before right; -1 if none."""
    best, best_rank = -1, 4
    place = int(np.searchsorted(start, key))
    while place < len(start) and start[place] == key:
        if not used[place]:
            turn = _heading(edges[place, 2] - edges[place, 0], edges[place, 3] - edges[place, 1])
            rank = (turn - heading + 1) % 4
            if rank < best_rank:
                best, best_rank = place, rank
        place += 1
    return best


@compiled
def _closes(
    edges: Corners,
    start: Numbers,
    used: npt.NDArray[np.bool_],
    first: int,
    heading: int,
    width: int,
) -> bool:
    """Whether a ring that is back at its first corner ends there, or goes on by an edge to the left
    of its first one."""
    key = np.int64(edges[first, 1]) * width + edges[first, 0]
    other = _next(edges, start, used, key, heading)
    if other < 0:
        return True
    ours = _heading(edges[first, 2] - edges[first, 0], edges[first, 3] - edges[first, 1])
    theirs = _heading(edges[other, 2] - edges[other, 0], edges[other, 3] - edges[other, 1])
    return bool((ours - heading + 1) % 4 < (theirs - heading + 1) % 4)
