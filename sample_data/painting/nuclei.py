"""Cell nuclei: where they lie, how large and dark they are, and their drawing.

A nucleus is a row (x, y, half_length, half_width, angle, density, softness, open, key): level-0
pixels of 0.5 micrometres, haematoxylin density, width of the blurred edge as a share of the
radius, and how vesicular (0: clumped and dark, 1: pale with a rim and a nucleolus).
"""

import math

import numpy as np

from painting.noise import compiled, perlin, smoothstep, uniform
from painting.structures import CELL_WIDTH_PX, epithelium_px, outline_px
from painting.tissue import (
    FAT_RIM,
    FOLLICLE,
    GLAND,
    STROMA,
    VESSEL,
    fibre_angle,
    inside_px,
    loose_zone,
)

STROMA_PITCH_PX = 24.0
LYMPH_PITCH_PX = 12.8
REACH_PX = 20  # farthest a nucleus reaches from its centre

_PLACE = 40_000
_FIELDS = 9


@compiled
def _spread(i: int, j: int, key: int) -> float:
    """A bell-shaped number of mean 0 and standard deviation 1."""
    total = uniform(i, j, key) + uniform(i, j, key + 1) + uniform(i, j, key + 2)
    return 2.0 * (total - 1.5)


@compiled
def _stroma_nucleus(
    i: int, j: int, x: float, y: float, angle: float, loose: float, key: int, row: np.ndarray
) -> None:
    """A fibroblast along the fibres or, more often in loose stroma, an inflammatory cell."""
    row[0], row[1] = x, y
    row[8] = uniform(i, j, key + 30) * 1e6
    if uniform(i, j, key + 20) < 0.12 + 0.43 * loose:
        size = 6.3 + 0.6 * _spread(i, j, key + 21)
        row[2] = size * (1.0 + 0.25 * uniform(i, j, key + 24))
        row[3] = size
        row[4] = 6.2832 * uniform(i, j, key + 25)
        row[5] = 0.98 + 0.10 * _spread(i, j, key + 26)
        row[7] = 0.15
    else:
        row[2] = 10.5 + 1.5 * _spread(i, j, key + 21)
        row[3] = 2.9 + 1.1 * uniform(i, j, key + 24) + 1.3 * loose * uniform(i, j, key + 27)
        row[4] = angle + 0.22 * _spread(i, j, key + 28)
        row[5] = 0.80 + 0.14 * _spread(i, j, key + 26)
        row[7] = 0.35
    row[6] = 0.16 + 0.35 * uniform(i, j, key + 29) ** 3


@compiled
def _lattice_nuclei(
    x0: int,
    y0: int,
    kind: np.ndarray,
    pieces: np.ndarray,
    seed: int,
    lymph: bool,
    found: np.ndarray,
    count: int,
) -> int:
    """Nuclei of stroma, fat and vessel walls, or the dense ones of follicles (`lymph`)."""
    height, width = kind.shape
    pitch = LYMPH_PITCH_PX if lymph else STROMA_PITCH_PX
    key = seed + _PLACE + (500 if lymph else 0)
    for j in range(int(y0 // pitch) - 1, int((y0 + height) // pitch) + 2):
        for i in range(int(x0 // pitch) - 1, int((x0 + width) // pitch) + 2):
            x = (i + 0.5 + 0.8 * (uniform(i, j, key) - 0.5) + 0.5 * (j % 2)) * pitch
            y = (j + 0.5 + 0.8 * (uniform(i, j, key + 1) - 0.5)) * pitch
            row, column = int(y) - y0, int(x) - x0
            if row < 0 or column < 0 or row >= height or column >= width:
                continue
            here = kind[row, column]
            chance = uniform(i, j, key + 2)
            if lymph:
                if here == FOLLICLE and chance < 0.9:
                    found[count, 0], found[count, 1] = x, y
                    size = 6.1 + 0.6 * _spread(i, j, key + 3)
                    found[count, 2] = size * (1.0 + 0.2 * uniform(i, j, key + 6))
                    found[count, 3] = size
                    found[count, 4] = 6.2832 * uniform(i, j, key + 7)
                    found[count, 5] = 0.98 + 0.13 * _spread(i, j, key + 8)
                    found[count, 6] = 0.16 + 0.4 * uniform(i, j, key + 11) ** 3
                    found[count, 7] = 0.2
                    found[count, 8] = uniform(i, j, key + 12) * 1e6
                    count += 1
                continue
            loose = smoothstep(-0.1, 0.12, loose_zone(x, y, seed))
            crowd = 0.85 + 0.8 * perlin(x / 160.0, y / 160.0, seed + _PLACE + 77)
            wanted = (
                (here == STROMA and chance < (0.34 + 0.42 * loose) * crowd)
                or (here == FAT_RIM and chance < 0.16)
                or (here == VESSEL and chance < 0.75)
            )
            if not wanted:
                continue
            depth, which = inside_px(x, y, pieces, seed)
            if depth < 9.0:
                continue
            angle = fibre_angle(x, y, pieces[which, 5], seed)
            _stroma_nucleus(i, j, x, y, angle, loose, key, found[count])
            count += 1
    return count


@compiled
def find_nuclei(
    x0: int,
    y0: int,
    kind: np.ndarray,
    structures: np.ndarray,
    pieces: np.ndarray,
    seed: int,
) -> np.ndarray:
    """All nuclei (n, 9) whose centre lies in a region, or whose gland reaches into it."""
    height, width = kind.shape
    most = 200 * structures.shape[0] + int(height * width / 90) + 4000
    found = np.empty((most, _FIELDS), dtype=np.float64)
    count = _lattice_nuclei(x0, y0, kind, pieces, seed, False, found, 0)
    count = _lattice_nuclei(x0, y0, kind, pieces, seed, True, found, count)
    for n in range(structures.shape[0]):
        if int(structures[n, 0]) != GLAND:
            continue
        radius = structures[n, 3]
        key = int(structures[n, 4])
        tall = epithelium_px(radius, key)
        cells = max(int(6.2832 * radius / CELL_WIDTH_PX), 8)
        for i in range(cells):
            theta = (i + 0.5 + 0.5 * (uniform(i, 10, key) - 0.5)) / cells * 6.283185307 - 3.14159265
            depth = tall * (0.30 + 0.14 * (uniform(i, 11, key) - 0.3))
            r = outline_px(theta, radius, key) - depth
            found[count, 0] = structures[n, 1] + r * math.cos(theta)
            found[count, 1] = structures[n, 2] + r * math.sin(theta)
            found[count, 2] = 7.9 + 0.7 * _spread(i, 12, key)
            found[count, 3] = 5.1 + 0.4 * _spread(i, 15, key)
            found[count, 4] = theta + 0.15 * _spread(i, 18, key)
            found[count, 5] = 0.74 + 0.13 * _spread(i, 21, key)
            found[count, 6] = 0.16 + 0.35 * uniform(i, 24, key) ** 3
            found[count, 7] = 0.75
            found[count, 8] = uniform(i, 25, key) * 1e6
            count += 1
    return found[:count]


@compiled
def paint_nuclei(
    x0: int, y0: int, nuclei: np.ndarray, stains: np.ndarray, label: np.ndarray
) -> None:
    """Draw nuclei into `stains` (3, h, w), and 2 into `label` (h, w) where they lie."""
    height, width = label.shape
    for n in range(nuclei.shape[0]):
        cx, cy, length, breadth = nuclei[n, 0], nuclei[n, 1], nuclei[n, 2], nuclei[n, 3]
        c = math.cos(nuclei[n, 4])
        s = math.sin(nuclei[n, 4])
        density, soft, vesicular = nuclei[n, 5], nuclei[n, 6], nuclei[n, 7]
        key = int(nuclei[n, 8])
        spot_u = 0.5 * (uniform(1, 1, key) - 0.5)
        spot_v = 0.5 * (uniform(2, 1, key) - 0.5)
        for j in range(max(int(cy) - REACH_PX - y0, 0), min(int(cy) + REACH_PX - y0, height)):
            for i in range(max(int(cx) - REACH_PX - x0, 0), min(int(cx) + REACH_PX - x0, width)):
                dx = x0 + i - cx
                dy = y0 + j - cy
                u = (c * dx + s * dy) / length
                v = (c * dy - s * dx) / breadth
                d = math.sqrt(u * u + v * v)
                if d > 1.7:
                    continue
                d += 0.20 * perlin(dx / 6.0, dy / 6.5, key)
                cover = 1.0 - smoothstep(1.0 - soft, 1.0 + soft, d)
                if d < 1.6:  # the cell shrinks off its nucleus: a paler ring
                    stains[1, j, i] *= 1.0 - 0.30 * smoothstep(1.6, 1.15, d)
                if cover <= 0.0:
                    continue
                clump = perlin(dx / 2.9, dy / 2.9, key + 1) + 0.5 * perlin(
                    dx / 1.6, dy / 1.6, key + 2
                )
                rim = math.exp(-(((d - 0.86) / 0.16) ** 2))
                spot = (u - spot_u) ** 2 * length * length + (v - spot_v) ** 2 * breadth * breadth
                chromatin = 1.0 - 0.30 * vesicular + (0.28 + 0.38 * vesicular) * clump
                chromatin += 0.38 * vesicular * (rim + math.exp(-spot / 3.0))
                h = density * max(chromatin, 0.25) * cover
                stains[0, j, i] = max(stains[0, j, i], h)
                stains[1, j, i] = max(stains[1, j, i] * (1.0 - 0.45 * cover), 0.22 * cover)
                if d < 1.0:
                    label[j, i] = 2
