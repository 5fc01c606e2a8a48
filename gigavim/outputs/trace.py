"""Outlines of the regions of a small label image, along pixel edges, compiled and without the GIL.

Regions are 4-connected sets of pixels of one value. Their outlines are walked with the region on
the right: at a corner where two pixels of a region touch diagonally the walk changes to the other
pixel, so that the ring stays with one 4-connected piece of the region's outside. By planarity the
two pixels that are outside there belong to different pieces; no ring meets itself, and rings that
meet in a point do so as the simple features standard allows.
"""

import numpy as np
import numpy.typing as npt

from gigavim.compiled import compiled
from gigavim.outputs.rings import Rings, starts_of

Numbers = npt.NDArray[np.int32]

STEP_X = np.array([1, 0, -1, 0], np.int32)
"""By direction: east, south, west, north; y grows downwards."""
STEP_Y = np.array([0, 1, 0, -1], np.int32)
# The pixel ahead to the left and to the right of a corner (y, x), by direction, as (dy, dx).
LEFT = np.array([[-1, 0], [0, 0], [0, -1], [-1, -1]], np.int32)
RIGHT = np.array([[0, 0], [0, -1], [-1, -1], [-1, 0]], np.int32)


def outlines(values: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int64], Rings]:
    """The regions of all values but 0 of an (h, w) image: (n,) value and outline of each."""
    parts, part_values = _components(values)
    xy, ring_ends, ring_part = _rings(parts)
    order = np.argsort(ring_part, kind="stable")  # the exterior was met first
    starts = np.concatenate(([0], ring_ends))
    lengths = np.diff(starts)[order]
    ring_starts = starts_of(lengths)
    gather = np.repeat(starts[:-1][order] - ring_starts[:-1], lengths) + np.arange(len(xy))
    per_part = np.bincount(ring_part, minlength=len(part_values))[1:]
    return part_values[1:].astype(np.int64), Rings(xy[gather], ring_starts, starts_of(per_part))


@compiled
def _root(parent: Numbers, place: int) -> int:
    while parent[place] != place:
        parent[place] = parent[parent[place]]
        place = parent[place]
    return place


@compiled
def _components(values: npt.NDArray[np.uint8]) -> tuple[Numbers, npt.NDArray[np.uint8]]:
    """(h, w) int32 numbers of the 4-connected regions from 1 on, 0 where the value is 0.

    And (regions + 1,) the value of each.
    """
    height, width = values.shape
    parts = np.zeros((height, width), np.int32)
    parent = np.empty(height * width // 2 + width + 2, np.int32)
    parent[0] = 0
    made = 1
    for y in range(height):
        for x in range(width):
            value = values[y, x]
            if value == 0:
                continue
            left = parts[y, x - 1] if x > 0 and values[y, x - 1] == value else 0
            above = parts[y - 1, x] if y > 0 and values[y - 1, x] == value else 0
            if left == 0 and above == 0:
                if made == len(parent):
                    grown = np.empty(2 * len(parent), np.int32)
                    grown[:made] = parent
                    parent = grown
                parent[made] = made
                parts[y, x] = made
                made += 1
            elif left == 0 or above == 0 or left == above:
                parts[y, x] = max(left, above)
            else:
                a, b = _root(parent, left), _root(parent, above)
                parts[y, x] = min(a, b)
                parent[max(a, b)] = min(a, b)
    number = np.zeros(made, np.int32)
    count = 0
    for place in range(1, made):  # a root is the least of its set
        if parent[place] == place:
            count += 1
            number[place] = count
        else:
            number[place] = number[_root(parent, place)]
    of_part = np.zeros(count + 1, np.uint8)
    for y in range(height):
        for x in range(width):
            part = number[parts[y, x]]
            parts[y, x] = part
            of_part[part] = values[y, x]
    return parts, of_part


@compiled
def _rings(parts: Numbers) -> tuple[Numbers, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Corners (n, 2) int32 of all rings, (rings,) where each ends, and (rings,) its region."""
    height, width = parts.shape
    seen = np.zeros((height, width), np.bool_)
    xy = np.empty((1024, 2), np.int32)
    ends = np.empty(256, np.int64)
    owners = np.empty(256, np.int64)
    corners = rings = 0
    for top in range(height):
        for start in range(width):
            part = parts[top, start]
            if part == 0 or seen[top, start] or (top > 0 and parts[top - 1, start] == part):
                continue
            # Walk from the corner at which this edge's run began, so that it is a corner indeed.
            y, x, heading, first = top, start, 0, corners
            while True:
                if heading == 0:
                    seen[y, x] = True
                y += STEP_Y[heading]
                x += STEP_X[heading]
                ly, lx = y + LEFT[heading, 0], x + LEFT[heading, 1]
                ry, rx = y + RIGHT[heading, 0], x + RIGHT[heading, 1]
                if 0 <= ly < height and 0 <= lx < width and parts[ly, lx] == part:
                    turned = (heading + 3) % 4
                elif 0 <= ry < height and 0 <= rx < width and parts[ry, rx] == part:
                    turned = heading
                else:
                    turned = (heading + 1) % 4
                if turned != heading:
                    if corners + 2 > len(xy):
                        grown = np.empty((2 * len(xy), 2), np.int32)
                        grown[:corners] = xy[:corners]
                        xy = grown
                    xy[corners, 0] = x
                    xy[corners, 1] = y
                    corners += 1
                    heading = turned
                if y == top and x == start and heading == 0:
                    break
            xy[corners] = xy[first]
            corners += 1
            if rings == len(ends):
                more = np.empty(2 * rings, np.int64)
                more[:rings] = ends
                ends = more
                others = np.empty(2 * rings, np.int64)
                others[:rings] = owners
                owners = others
            ends[rings] = corners
            owners[rings] = part
            rings += 1
    return xy[:corners], ends[:rings], owners[:rings]
