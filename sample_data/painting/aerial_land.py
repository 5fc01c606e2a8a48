"""The ground of an aerial scene: roads, fields, villages with houses, rivers, ponds.

Everything is a function of the position in pixels of 0.3 m. Streets and parcels are straight in
warped coordinates (u, v), and gently curved on the ground.
"""

import math

import numpy as np

from painting.noise import compiled, fbm, perlin, smoothstep, uniform

BUILDING, LAND, ROAD, VEGETATION, WATER = range(1, 6)
CLASS_NAMES = {
    BUILDING: "building",
    LAND: "land",
    ROAD: "road",
    VEGETATION: "vegetation",
    WATER: "water",
}

BLOCK_PX = 1000.0
FIELD, VILLAGE, FOREST, HALLS, MEADOW = range(5)
SUN_X, SUN_Y = 0.62, 0.78  # towards the sun, on the ground: south-east
LONGEST_SHADOW_PX = 26.0

_ROAD_HALF_PX = 11.0
_RIVER_PITCH_PX = 4200.0

_SOIL = np.array([[176.0, 160.0, 132.0], [150.0, 128.0, 104.0], [196.0, 184.0, 142.0]])
_CROP = np.array(
    [[104.0, 128.0, 78.0], [82.0, 112.0, 66.0], [128.0, 142.0, 88.0], [150.0, 152.0, 92.0]]
)
_ROOF = np.array(
    [
        [158.0, 92.0, 70.0],
        [132.0, 80.0, 66.0],
        [112.0, 110.0, 112.0],
        [88.0, 84.0, 86.0],
        [176.0, 172.0, 166.0],
    ]
)


@compiled
def warp(x: float, y: float, seed: int) -> tuple[float, float]:
    """Street coordinates (u, v) of a ground position."""
    u = x + 130.0 * perlin(x / 2100.0, y / 2100.0, seed + 11) + 240.0
    v = y + 130.0 * perlin(x / 2100.0, y / 2100.0, seed + 23) + 330.0
    return u, v


@compiled
def river_px(x: float, y: float, seed: int) -> float:
    """Distance to the nearest river's bank in pixels, negative on water."""
    v = y + 330.0 * fbm(x / 1500.0, y / 5200.0, 2, seed + 31)
    middle = float(np.floor((v - 1900.0) / _RIVER_PITCH_PX + 0.5)) * _RIVER_PITCH_PX + 1900.0
    half = 62.0 + 26.0 * perlin(x / 700.0, 0.5, seed + 37)
    return abs(v - middle) - half + 5.0 * fbm(x / 40.0, y / 40.0, 2, seed + 41)


@compiled
def block_use(column: int, row: int, seed: int) -> int:
    """What a block between main roads is used for."""
    urban = perlin(0.31 * column + 0.2, 0.31 * row + 0.4, seed + 53)
    chance = uniform(column, row, seed + 59)
    if urban > 0.08:
        return HALLS if chance < 0.16 else VILLAGE
    if chance < 0.16:
        return FOREST
    if chance < 0.30:
        return MEADOW
    return VILLAGE if chance > 0.92 else FIELD


@compiled
def _lot(u: float, v: float, halls: bool) -> tuple[int, int, float, float, float, float]:
    """The building lot at (u, v): its column and row, and its centre and half sizes in (u, v)."""
    wide, deep = (230.0, 230.0) if halls else (78.0, 125.0)
    block_u = np.floor(u / BLOCK_PX) * BLOCK_PX + 20.0
    block_v = np.floor(v / BLOCK_PX) * BLOCK_PX
    i = np.floor((u - block_u) / wide)
    j = np.floor((v - block_v) / deep)
    column = int(np.floor(u / BLOCK_PX)) * 64 + int(i)
    row = int(np.floor(v / BLOCK_PX)) * 64 + int(j)
    return column, row, block_u + (i + 0.5) * wide, block_v + (j + 0.5) * deep, wide, deep


@compiled
def building(u: float, v: float, use: int, seed: int) -> tuple[bool, float, float, int, int, float]:
    """The building at street coordinates: whether there is one, the position over its half sizes
    (-1 to 1), its lot (for its colours), and its height as shadow length in pixels.
    """
    halls = use == HALLS
    column, row, cu, cv, wide, _deep = _lot(u, v, halls)
    inner = cu - np.floor(u / BLOCK_PX) * BLOCK_PX
    if uniform(column, row, seed + 61) > (0.8 if halls else 0.86) or inner > BLOCK_PX - 0.5 * wide:
        return False, 0.0, 0.0, column, row, 0.0
    a, b = uniform(column, row, seed + 67), uniform(column, row, seed + 71)
    if halls:
        half_u, half_v, tall = 62.0 + 34.0 * a, 48.0 + 40.0 * b, 24.0
        cv += 12.0
    else:
        half_u, half_v, tall = 17.0 + 10.0 * a, 14.0 + 6.0 * b, 12.0 + 8.0 * a
        front = 1.0 if row % 2 else -1.0  # towards the street between two rows of lots
        cv += front * (10.0 + 8.0 * uniform(column, row, seed + 73))
        cu += 8.0 * (b - 0.5)
    s, t = (u - cu) / half_u, (v - cv) / half_v
    inside = abs(s) < 1.0 and abs(t) < 1.0
    if inside and river_px(cu - 240.0, cv - 330.0, seed) < 150.0:  # nobody builds on the bank
        inside = False
    return inside, s, t, column, row, tall


@compiled
def _roof(s: float, t: float, column: int, row: int, use: int, seed: int, out: np.ndarray) -> None:
    """Colour of a roof at a place over its half sizes."""
    pick = uniform(column, row, seed + 79)
    if use == HALLS:
        tone = 150.0 + 60.0 * pick
        stripe = 16.0 if int(np.floor((s + 1.0) * 7.0)) % 2 else 0.0
        edge = -45.0 if max(abs(s), abs(t)) > 0.965 else 0.0
        for c in range(3):
            out[c] = tone + stripe + edge + 3.0 * c
        return
    style = int(pick * 5.0)
    lit = 1.0
    along, over = (s, t) if uniform(column, row, seed + 83) < 0.7 else (t, s)
    if style < 4:  # a gable roof: the half that faces the sun is brighter
        lit = 1.16 if over > 0.0 else 0.74
        if abs(over) < 0.06:
            lit = 1.25
        lit += 0.05 * math.sin(over * 34.0)
    lit *= 0.94 + 0.12 * uniform(column, row, seed + 89)
    if abs(along) > 0.955 or abs(over) > 0.95:
        lit *= 0.8
    chimney = style < 4 and abs(along - 0.45) < 0.07 and abs(over - 0.12) < 0.10
    for c in range(3):
        out[c] = 120.0 if chimney else _ROOF[style, c] * lit


@compiled
def _field(u: float, v: float, x: float, y: float, seed: int, out: np.ndarray) -> int:
    """Colour and class of farmland: strips of crops and bare soil with sowing rows."""
    column, row = int(np.floor(u / BLOCK_PX)), int(np.floor(v / BLOCK_PX))
    fu, fv = u - column * BLOCK_PX, v - row * BLOCK_PX
    upright = uniform(column, row, seed + 97) < 0.5
    across, along = (fu, fv) if upright else (fv, fu)
    strips = 2 + int(3.0 * uniform(column, row, seed + 101))
    strip = int(across * strips / BLOCK_PX)
    half = (
        1 if along > BLOCK_PX * (0.35 + 0.3 * uniform(column, row * 8 + strip, seed + 103)) else 0
    )
    key = strip * 2 + half
    kind = uniform(column * 16 + key, row, seed + 107)
    shade = uniform(column * 16 + key, row, seed + 109)
    side = across - strip * BLOCK_PX / strips
    if min(side, BLOCK_PX / strips - side) < 3.0:
        for c in range(3):
            out[c] = _CROP[1, c] + 12.0
        return VEGETATION
    period = 3.4 + 2.4 * shade
    lane = across if half == 0 else along
    rows = math.sin(6.2832 * lane / period)
    patch = fbm(x / 240.0, y / 240.0, 4, seed + 113)
    fine = perlin(x / 1.8, y / 1.8, seed + 127)
    tram = abs(lane - 80.0 * np.floor(lane / 80.0 + 0.5))
    track = smoothstep(1.7, 0.6, abs(tram - 3.0))
    soil = kind < 0.36
    tone = 1.0 + 0.10 * patch + 0.05 * fine + (0.05 if soil else 0.09) * rows - 0.14 * track
    for c in range(3):
        base = _SOIL[int(shade * 3.0), c] if soil else _CROP[int(shade * 4.0), c]
        out[c] = base * tone + (9.0 * track if c == 0 else 0.0)
    return LAND if soil else VEGETATION


@compiled
def _garden(u: float, v: float, x: float, y: float, use: int, seed: int, out: np.ndarray) -> int:
    """Colour and class of the ground of a village or a yard, between the buildings."""
    column, row, cu, cv, wide, deep = _lot(u, v, use == HALLS)
    du, dv = u - cu, v - cv
    fine = perlin(x / 2.2, y / 2.2, seed + 131)
    broad = fbm(x / 30.0, y / 30.0, 3, seed + 137)
    if use == HALLS:
        for c in range(3):
            out[c] = 150.0 - 4.0 * c + 8.0 * broad + 6.0 * fine
        return LAND
    front = 1.0 if row % 2 else -1.0
    paved = uniform(column, row, seed + 139) < 0.2
    if abs(du + 0.34 * wide) < 5.0 and dv * front > -10.0:
        for c in range(3):
            out[c] = 168.0 - 6.0 * c + 6.0 * fine
        return LAND
    hedge = max(abs(du) - 0.5 * wide, abs(dv) - 0.5 * deep) > -2.6
    if hedge and uniform(column, row, seed + 149) < 0.75:
        for c in range(3):
            out[c] = (62.0, 84.0, 54.0)[c] * (1.0 + 0.3 * fine)
        return VEGETATION
    tone = 1.0 + 0.13 * broad + 0.10 * fine
    if paved and dv * front > 0.0:
        for c in range(3):
            out[c] = (166.0, 152.0, 136.0)[c] * tone
        return LAND
    dry = uniform(column, row, seed + 151)
    for c in range(3):
        out[c] = ((96.0, 120.0, 70.0)[c] * (1.0 - dry) + (132.0, 136.0, 88.0)[c] * dry) * tone
    return VEGETATION


@compiled
def _asphalt(
    across: float, along: float, half: float, x: float, y: float, seed: int, out: np.ndarray
) -> None:
    """Colour of a paved road `across` pixels from its middle, with markings on wide ones."""
    tone = 118.0 + 7.0 * perlin(x / 60.0, y / 60.0, seed + 157)
    tone += 5.0 * perlin(x / 1.7, y / 1.7, seed + 163) - 5.0 * smoothstep(
        2.5, 0.0, abs(across - 0.45 * half)
    )
    if half > 9.0 and (
        (across < 0.7 and along - 24.0 * np.floor(along / 24.0) < 12.0)
        or abs(across - half + 1.8) < 0.6
    ):
        tone = 205.0
    for c in range(3):
        out[c] = tone + 1.5 * c


@compiled
def _street(u: float, v: float, use: int, seed: int) -> tuple[float, float, float]:
    """Distance in pixels to the middle of the nearest road, its half width and the way along."""
    near_u = u - np.floor(u / BLOCK_PX + 0.5) * BLOCK_PX
    near_v = v - np.floor(v / BLOCK_PX + 0.5) * BLOCK_PX
    if abs(near_u) - _ROAD_HALF_PX < abs(near_v) - _ROAD_HALF_PX:
        best, half, along = abs(near_u), _ROAD_HALF_PX, v
    else:
        best, half, along = abs(near_v), _ROAD_HALF_PX, u
    if use in (VILLAGE, HALLS) and best > half:
        pitch = 250.0 if use == VILLAGE else 500.0
        lane = abs(v - np.floor(v / pitch + 0.5) * pitch)
        if lane - 8.0 < best - half:
            return lane, 8.0, u
    return best, half, along


@compiled
def paint_land(x0: int, y0: int, seed: int, rgb: np.ndarray, label: np.ndarray) -> None:
    """Fill `rgb` (h, w, 3) and `label` (h, w) with everything but trees and cars."""
    height, width = label.shape
    colour = np.zeros(3)
    last_column, last_row, use = 0, 0, block_use(0, 0, seed)
    for j in range(height):
        for i in range(width):
            x, y = float(x0 + i), float(y0 + j)
            u, v = warp(x, y, seed)
            column, row = int(np.floor(u / BLOCK_PX)), int(np.floor(v / BLOCK_PX))
            if column != last_column or row != last_row:
                last_column, last_row, use = column, row, block_use(column, row, seed)
            across, half, along = _street(u, v, use, seed)
            water = river_px(x, y, seed)
            shade = 1.0
            if use == MEADOW:
                du, dv = u - (column + 0.5) * BLOCK_PX, v - (row + 0.45) * BLOCK_PX
                pond = (
                    math.hypot(du / 1.5, dv)
                    - 110.0
                    + 60.0 * fbm(x / 150.0, y / 150.0, 3, seed + 167)
                )
                water = min(water, pond)
            if across < half:
                _asphalt(across, along, half, x, y, seed, colour)
                kind = ROAD
                if water < 8.0 and across > half - 2.0:
                    colour[:] = 190.0
            elif water < 0.0:
                deep = smoothstep(0.0, -22.0, water)
                ripple = 3.0 * perlin(x / 5.0, y / 2.5, seed + 173) + 4.0 * perlin(
                    x / 160.0, y / 160.0, seed + 179
                )
                colour[0] = 96.0 - 50.0 * deep + ripple
                colour[1] = 100.0 - 34.0 * deep + ripple
                colour[2] = 88.0 - 20.0 * deep + ripple
                kind = WATER
            elif water < 5.0:
                for c in range(3):
                    colour[c] = _SOIL[0, c] * (0.9 + 0.1 * perlin(x / 3.0, y / 3.0, seed + 181))
                kind = LAND
            elif across < half + 5.0 or use in (FOREST, MEADOW) or water < 60.0:
                tone = (
                    1.0
                    + 0.16 * fbm(x / 45.0, y / 45.0, 4, seed + 191)
                    + 0.10 * perlin(x / 2.0, y / 2.0, seed + 193)
                )
                dark = 0.72 if use == FOREST else 1.0
                for c in range(3):
                    colour[c] = (106.0, 124.0, 76.0)[c] * tone * dark
                kind = VEGETATION
            elif use == FIELD:
                kind = _field(u, v, x, y, seed, colour)
            else:
                kind = _garden(u, v, x, y, use, seed, colour)
            if use in (VILLAGE, HALLS):
                inside, s, t, lot_u, lot_v, _ = building(u, v, use, seed)
                if inside and across > half:
                    _roof(s, t, lot_u, lot_v, use, seed, colour)
                    tone = 1.0 + 0.04 * perlin(x / 1.8, y / 1.8, seed + 197)
                    colour *= tone
                    kind = BUILDING
                else:
                    for step in range(1, 9):
                        reach = step * LONGEST_SHADOW_PX / 8.0
                        hit, _, _, _, _, tall = building(
                            u + SUN_X * reach, v + SUN_Y * reach, use, seed
                        )
                        if hit and reach <= tall:
                            shade = 0.42
                            break
            label[j, i] = kind
            for c in range(3):
                rgb[j, i, c] = colour[c] * (shade if c < 2 else min(shade * 1.12, 1.0))
