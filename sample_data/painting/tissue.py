"""Where tissue lies on the glass, and its ground: stroma and fat.

Planes are in stain density (optical density along a unit stain vector, base 10). Coordinates are
level-0 pixels of 0.5 micrometres.
"""

import math

import numpy as np

from painting.noise import compiled, fbm, perlin, smoothstep, uniform

GLASS, STROMA, FAT_RIM, VACUOLE, GLAND, LUMEN, FOLLICLE, VESSEL, BLOOD = range(9)
FAT_PITCH_PX = 92.0

# Offsets that keep the noise fields of one slide apart.
EDGE, STREAM, FAT, FIBRE, THICKNESS, ZONE, FOCUS, TINT = (1000 * i for i in range(1, 9))


@compiled
def inside_px(x: float, y: float, pieces: np.ndarray, seed: int) -> tuple[float, int]:
    """Depth of a point inside its piece of tissue in pixels (negative: on glass), and the piece.

    `pieces` holds one row (x, y, semi_x, semi_y, angle, fibre_angle) per piece.
    """
    best = -1e9
    which = 0
    for i in range(pieces.shape[0]):
        radius = min(pieces[i, 2], pieces[i, 3])
        reach = 1.5 * max(pieces[i, 2], pieces[i, 3]) + 80.0
        dx = x - pieces[i, 0]
        dy = y - pieces[i, 1]
        if abs(dx) > reach or abs(dy) > reach:
            continue
        scale = 0.9 * radius
        dx += 0.42 * radius * fbm(x / scale, y / scale, 2, seed + EDGE + i)
        dy += 0.42 * radius * fbm(x / scale, y / scale, 2, seed + EDGE + 100 + i)
        c = math.cos(pieces[i, 4])
        s = math.sin(pieces[i, 4])
        u = (c * dx + s * dy) / pieces[i, 2]
        v = (c * dy - s * dx) / pieces[i, 3]
        depth = (1.0 - math.sqrt(u * u + v * v)) * radius
        if depth > best:
            best = depth
            which = i
    if best > -120.0:
        best += 34.0 * fbm(x / 150.0, y / 150.0, 6, seed + EDGE + 200)
    return best, which


@compiled
def stream(x: float, y: float, angle: float, seed: int) -> tuple[float, float]:
    """Coordinates across and along the fibres, in pixels; fibres follow lines of equal `across`."""
    c = math.cos(angle)
    s = math.sin(angle)
    bend = 150.0 * fbm(x / 520.0, y / 520.0, 2, seed + STREAM)
    wave = 15.0 * perlin(x / 85.0, y / 85.0, seed + STREAM + 50)
    return c * y - s * x + bend + wave, c * x + s * y + bend


@compiled
def fibre_angle(x: float, y: float, angle: float, seed: int) -> float:
    """Direction of the fibres at a point in radians."""
    right = stream(x + 2.0, y, angle, seed)[0] - stream(x - 2.0, y, angle, seed)[0]
    down = stream(x, y + 2.0, angle, seed)[0] - stream(x, y - 2.0, angle, seed)[0]
    return math.atan2(-right, down)


@compiled
def _fibres(x: float, y: float, angle: float, loose: float, seed: int) -> tuple[float, float]:
    """Eosin and haematoxylin of fibrous stroma; `loose` in [0, 1] opens it."""
    across, along = stream(x, y, angle, seed)
    key = seed + FIBRE
    across += 5.0 * perlin(x / 31.0, y / 31.0, key + 5) + 2.2 * perlin(x / 12.0, y / 12.0, key + 6)
    bundle = perlin(across / 19.0, along / 105.0, key)
    strand = perlin(across / 8.0, along / 52.0, key + 1)
    fibril = perlin(across / 3.4, along / 24.0, key + 2)
    grain = perlin(x / 1.9, y / 1.9, key + 3) + 0.6 * perlin(x / 4.7, y / 4.7, key + 7)
    dense = 0.41 + 0.22 * bundle + 0.14 * strand + 0.13 * fibril + 0.15 * grain
    # Bundles part along thin cracks, where the wide noise crosses zero, and in open clefts.
    width = 0.035 + 0.10 * loose + 0.16 * max(perlin(x / 110.0, y / 110.0, key + 4), 0.0)
    crack = abs(bundle + 0.35 * strand - 0.12) + 0.10 * fibril
    gap = 1.0 - smoothstep(0.5 * width, 1.3 * width, crack)
    eosin = max(dense * (1.0 - 0.36 * loose), 0.07)
    rim = math.exp(-(((crack - 1.6 * width) / 0.05) ** 2))
    eosin = (eosin + 0.07 * rim) * (1.0 - gap) + (0.04 + 0.05 * loose + 0.04 * grain) * gap
    return max(eosin, 0.02), 0.10 * eosin + loose * (0.045 + 0.03 * fibril) * (1.0 - gap)


@compiled
def fat_zone(x: float, y: float, seed: int) -> float:
    """Above zero where the tissue is fat."""
    return fbm(x / 760.0, y / 760.0, 2, seed + ZONE) - 0.33


@compiled
def _fat(x: float, y: float, seed: int) -> float:
    """Distance in pixels from the rim of a fat vacuole (positive inside), or -1e9 off fat."""
    px = x + 7.0 * perlin(x / 60.0, y / 60.0, seed + FAT + 5)
    py = y + 7.0 * perlin(x / 60.0, y / 60.0, seed + FAT + 6)
    column = int(np.floor(px / FAT_PITCH_PX))
    row = int(np.floor(py / FAT_PITCH_PX))
    nearest = 1e18
    near_x = 0.0
    near_y = 0.0
    for j in range(row - 1, row + 2):
        for i in range(column - 1, column + 2):
            cx = (i + 0.1 + 0.8 * uniform(i, j, seed + FAT)) * FAT_PITCH_PX
            cy = (j + 0.1 + 0.8 * uniform(i, j, seed + FAT + 1)) * FAT_PITCH_PX
            d = (px - cx) ** 2 + (py - cy) ** 2
            if d < nearest:
                nearest = d
                near_x = cx
                near_y = cy
    if fat_zone(near_x, near_y, seed) < 0.0:
        return -1e9
    nearest = math.sqrt(nearest)
    others = 0.0  # a soft minimum over the neighbours rounds the corners
    for j in range(row - 1, row + 2):
        for i in range(column - 1, column + 2):
            cx = (i + 0.1 + 0.8 * uniform(i, j, seed + FAT)) * FAT_PITCH_PX
            cy = (j + 0.1 + 0.8 * uniform(i, j, seed + FAT + 1)) * FAT_PITCH_PX
            if cx != near_x or cy != near_y:
                others += math.exp((nearest - math.sqrt((px - cx) ** 2 + (py - cy) ** 2)) / 7.0)
    return -3.5 * math.log(others + 1e-12) - 1.7


@compiled
def loose_zone(x: float, y: float, seed: int) -> float:
    """Above zero where the tissue is mucosa: glands in loose stroma."""
    return fbm(x / 900.0, y / 900.0, 2, seed + ZONE + 300) + 0.13


@compiled
def paint_ground(
    x0: int,
    y0: int,
    pieces: np.ndarray,
    seed: int,
    stains: np.ndarray,
    kind: np.ndarray,
) -> None:
    """Fill `stains` (3, h, w: haematoxylin, eosin, blood) and `kind` (h, w) with glass, stroma
    and fat.
    """
    height, width = kind.shape
    for j in range(height):
        for i in range(width):
            x = float(x0 + i)
            y = float(y0 + j)
            depth, which = inside_px(x, y, pieces, seed)
            if depth <= 0.0:
                continue
            rim = _fat(x, y, seed) if fat_zone(x, y, seed) > -0.45 else -1e9
            if rim > 0.0 and depth > 5.0:
                kind[j, i] = VACUOLE
                edge = math.exp(-rim / 1.5)
                stains[1, j, i] = 0.01 + 0.22 * edge
                stains[0, j, i] = 0.05 * edge
                continue
            kind[j, i] = FAT_RIM if rim > -1e8 else STROMA
            loose = smoothstep(-0.1, 0.12, loose_zone(x, y, seed))
            eosin, haematoxylin = _fibres(x, y, pieces[which, 5], loose, seed)
            if rim > -1e8:
                eosin = 0.20 + 0.25 * eosin
            thickness = 1.0 + 0.16 * fbm(x / 130.0, y / 130.0, 2, seed + THICKNESS)
            ragged = smoothstep(0.0, 3.0, depth)
            stains[0, j, i] = haematoxylin * thickness * ragged
            stains[1, j, i] = eosin * thickness * ragged
