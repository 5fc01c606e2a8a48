"""Glands, lymphoid follicles and vessels: where they are and what they look like.

A structure is a row (kind, x, y, radius, key): centre and radius in level-0 pixels, and the seed
of its own details.
"""

import math

import numpy as np

from painting.noise import compiled, fbm, perlin, smoothstep, uniform
from painting.tissue import (
    BLOOD,
    FOLLICLE,
    GLAND,
    LUMEN,
    VESSEL,
    fat_zone,
    inside_px,
    loose_zone,
)

MARGIN_PX = 330  # farthest a structure reaches from its centre
GLAND_PITCH_PX = 134.0
FOLLICLE_PITCH_PX = 800.0
VESSEL_PITCH_PX = 380.0
RED_CELL_PITCH_PX = 13.0
CELL_WIDTH_PX = 11.5  # of a gland's epithelial cell, along the basement membrane

_PLACE = 20_000


@compiled
def _candidate(
    kind: int, i: int, j: int, pieces: np.ndarray, seed: int
) -> tuple[bool, float, float, float]:
    """Whether a cell of this kind's own lattice holds a structure, its centre and radius."""
    key = seed + _PLACE + 100 * kind
    chance = uniform(i, j, key)
    size = uniform(i, j, key + 1)
    u = uniform(i, j, key + 2) - 0.5
    v = uniform(i, j, key + 3) - 0.5
    if kind == FOLLICLE:
        x = (i + 0.5 + 0.5 * u) * FOLLICLE_PITCH_PX
        y = (j + 0.5 + 0.5 * v) * FOLLICLE_PITCH_PX
        radius = 110.0 + 110.0 * size
        wanted = chance < 0.6 and fat_zone(x, y, seed) < -0.1
    elif kind == VESSEL:
        x = (i + 0.5 + 0.6 * u) * VESSEL_PITCH_PX
        y = (j + 0.5 + 0.6 * v) * VESSEL_PITCH_PX
        radius = 13.0 + 55.0 * size**3
        wanted = chance < 0.6 and fat_zone(x, y, seed) < -0.12
    else:
        x = (i + 0.5 + 0.6 * u) * GLAND_PITCH_PX
        y = (j + 0.5 + 0.6 * v) * GLAND_PITCH_PX
        radius = 36.0 + 32.0 * size
        wanted = loose_zone(x, y, seed) > 0.0
        wanted = wanted and fat_zone(x, y, seed) < -0.14
    if not wanted or inside_px(x, y, pieces, seed)[0] < radius + 14.0:
        return False, x, y, radius
    return True, x, y, radius


@compiled
def _free(
    x: float, y: float, radius: float, kind: int, pitch: float, pieces: np.ndarray, seed: int
) -> bool:
    """Whether no structure of a kind with this lattice pitch touches a disc."""
    column = int(np.floor(x / pitch))
    row = int(np.floor(y / pitch))
    for j in range(row - 1, row + 2):
        for i in range(column - 1, column + 2):
            there, ox, oy, other = _candidate(kind, i, j, pieces, seed)
            if there and math.hypot(x - ox, y - oy) < radius + other + 18.0:
                return False
    return True


@compiled
def _wins(i: int, j: int, x: float, y: float, r: float, pieces: np.ndarray, seed: int) -> bool:
    """Whether a gland touches no gland of a higher rank; the rank is a hash."""
    rank = uniform(i, j, seed + _PLACE + 100 * GLAND)
    for row in range(j - 2, j + 3):
        for column in range(i - 2, i + 3):
            if uniform(column, row, seed + _PLACE + 100 * GLAND) <= rank:
                continue
            there, ox, oy, other = _candidate(GLAND, column, row, pieces, seed)
            if there and math.hypot(x - ox, y - oy) < 1.1 * (r + other):
                return False
    return True


@compiled
def find_structures(
    x0: int, y0: int, height: int, width: int, pieces: np.ndarray, seed: int
) -> np.ndarray:
    """All structures (n, 5) that may reach into a region; follicles win over vessels over
    glands.
    """
    found = np.empty((20_000, 5), dtype=np.float64)
    count = 0
    left, right = x0 - MARGIN_PX, x0 + width + MARGIN_PX
    top, bottom = y0 - MARGIN_PX, y0 + height + MARGIN_PX
    for kind, pitch_x, pitch_y in (
        (FOLLICLE, FOLLICLE_PITCH_PX, FOLLICLE_PITCH_PX),
        (VESSEL, VESSEL_PITCH_PX, VESSEL_PITCH_PX),
        (GLAND, GLAND_PITCH_PX, GLAND_PITCH_PX),
    ):
        for j in range(int(top // pitch_y) - 1, int(bottom // pitch_y) + 2):
            for i in range(int(left // pitch_x) - 1, int(right // pitch_x) + 2):
                there, x, y, radius = _candidate(kind, i, j, pieces, seed)
                if not there or count == found.shape[0]:
                    continue
                if kind != FOLLICLE and not _free(
                    x, y, radius, FOLLICLE, FOLLICLE_PITCH_PX, pieces, seed
                ):
                    continue
                if kind == GLAND and not (
                    _free(x, y, radius, VESSEL, VESSEL_PITCH_PX, pieces, seed)
                    and _wins(i, j, x, y, radius, pieces, seed)
                ):
                    continue
                found[count, 0] = kind
                found[count, 1] = x
                found[count, 2] = y
                found[count, 3] = radius
                found[count, 4] = seed + 31 * (i % 4099) + 17_011 * (j % 4093)
                count += 1
    return found[:count]


@compiled
def outline_px(theta: float, radius: float, key: int) -> float:
    """Radius of a structure's outline in a direction."""
    a = 0.14 * uniform(1, 0, key)
    b = 0.07 * uniform(2, 0, key)
    p = 6.2832 * uniform(3, 0, key)
    q = 6.2832 * uniform(4, 0, key)
    return radius * (1.0 + a * math.cos(2.0 * theta + p) + b * math.cos(3.0 * theta + q))


@compiled
def epithelium_px(radius: float, key: int) -> float:
    """Height of a gland's epithelium."""
    return min(26.0 + 9.0 * uniform(5, 0, key), 0.68 * radius)


@compiled
def _gland_pixel(
    depth: float, theta: float, r: float, radius: float, key: int
) -> tuple[float, float, bool]:
    """Haematoxylin and eosin of a gland at a depth from its outline; whether it is lumen."""
    tall = epithelium_px(radius, key)
    cells = max(int(6.2832 * radius / CELL_WIDTH_PX), 8)
    turn = (theta / 6.283185307 + 0.5) * cells
    cell = int(turn)
    across = abs(turn - cell - 0.5)  # 0 in the middle of a cell, 0.5 at its border
    ragged = 2.5 * perlin(turn * 0.7, 0.5, key + 3)
    if depth > tall + ragged:
        mucus = max(perlin(r / 9.0, theta * 3.0, key + 4), 0.0)
        edge = math.exp(-(depth - tall - ragged) / 1.6)
        return 0.02 + 0.10 * mucus + 0.05 * edge, 0.02 + 0.05 * mucus + 0.15 * edge, True
    if depth < 2.2:
        return 0.10, 0.46, False
    border = smoothstep(0.34, 0.5, across)
    eosin = 0.30 + 0.08 * border
    haematoxylin = 0.22 + 0.05 * border
    if uniform(cell, 7, key) < 0.5:  # a goblet cell: a pale drop of mucin towards the lumen
        middle = 0.66 * tall
        drop = ((depth - middle) / (0.27 * tall)) ** 2 + (across / 0.52) ** 2
        pale = 1.0 - smoothstep(0.65, 1.1, drop)
        eosin = eosin * (1.0 - pale) + 0.055 * pale
        haematoxylin = haematoxylin * (1.0 - pale) + 0.075 * pale
    apex = math.exp(-(((depth - tall) / 2.2) ** 2))
    return haematoxylin + 0.04 * apex, eosin + 0.14 * apex, False


@compiled
def _vessel_pixel(
    depth: float, x: float, y: float, theta: float, radius: float, key: int
) -> tuple[float, float, float, bool]:
    """Haematoxylin, eosin and blood of a vessel, and whether the point lies in its lumen."""
    wall = 3.5 + 0.18 * radius
    if depth < wall:
        layers = perlin(depth / 3.5, theta * 3.0, key + 3)
        return 0.09, 0.42 + 0.14 * layers, 0.0, False
    edge = 0.3 * math.exp(-(depth - wall) / 1.5)
    if uniform(8, 0, key) < 0.35:
        return 0.01 + 0.2 * edge, 0.02 + edge, 0.0, True
    column = int(np.floor(x / RED_CELL_PITCH_PX))
    row = int(np.floor(y / RED_CELL_PITCH_PX))
    blood = 0.0
    for j in range(row - 1, row + 2):
        for i in range(column - 1, column + 2):
            if uniform(i, j, key + 5) < 0.72:
                cx = (i + 0.15 + 0.7 * uniform(i, j, key + 6)) * RED_CELL_PITCH_PX
                cy = (j + 0.15 + 0.7 * uniform(i, j, key + 7)) * RED_CELL_PITCH_PX
                d = math.hypot(x - cx, (y - cy) * (0.8 + 0.4 * uniform(i, j, key + 8)))
                disc = 1.0 - smoothstep(5.2, 7.0, d)
                blood = max(blood, disc * (0.34 + 0.10 * smoothstep(1.0, 4.5, d)))
    return 0.01, 0.03 + edge, blood, True


@compiled
def paint_structures(
    x0: int, y0: int, structures: np.ndarray, stains: np.ndarray, kind: np.ndarray
) -> None:
    """Draw structures over the ground in `stains` (3, h, w) and `kind` (h, w)."""
    height, width = kind.shape
    for n in range(structures.shape[0]):
        what = int(structures[n, 0])
        cx, cy, radius = structures[n, 1], structures[n, 2], structures[n, 3]
        key = int(structures[n, 4])
        reach = int(1.35 * radius) + 2
        for j in range(max(int(cy) - reach - y0, 0), min(int(cy) + reach - y0, height)):
            for i in range(max(int(cx) - reach - x0, 0), min(int(cx) + reach - x0, width)):
                x = float(x0 + i)
                y = float(y0 + j)
                dx = x - cx
                dy = y - cy
                r = math.hypot(dx, dy)
                if r > 1.35 * radius:
                    continue
                theta = math.atan2(dy, dx)
                depth = outline_px(theta, radius, key) - r
                if what == FOLLICLE:
                    depth += 20.0 * fbm(x / 45.0, y / 45.0, 2, key)
                    share = smoothstep(-12.0, 14.0, depth)
                    if share > 0.0:
                        cloud = 0.17 + 0.07 * fbm(x / 7.0, y / 7.0, 3, key + 1)
                        stains[0, j, i] += share * (0.9 * cloud - stains[0, j, i])
                        stains[1, j, i] += share * (cloud - stains[1, j, i])
                        if uniform(int(x), int(y), key + 9) < share:
                            kind[j, i] = FOLLICLE
                elif depth > 0.0 and what == GLAND:
                    h, e, open_ = _gland_pixel(depth, theta, r, radius, key)
                    cloud = 1.0 + 0.25 * perlin(x / 5.0, y / 5.0, key + 11)
                    cloud += 0.22 * perlin(x / 2.2, y / 2.2, key + 12)
                    stains[0, j, i] = h * cloud
                    stains[1, j, i] = e * cloud
                    kind[j, i] = LUMEN if open_ else GLAND
                elif depth > 0.0:
                    h, e, b, open_ = _vessel_pixel(depth, x, y, theta, radius, key)
                    stains[0, j, i] = h
                    stains[1, j, i] = e
                    stains[2, j, i] = b
                    kind[j, i] = BLOOD if open_ else VESSEL
