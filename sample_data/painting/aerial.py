"""An orthophoto-like aerial scene at 0.3 m per pixel, rendered region by region."""

import math

import numpy as np
from scipy.ndimage import gaussian_filter

from painting.aerial_land import (
    BLOCK_PX,
    FIELD,
    FOREST,
    ROAD,
    SUN_X,
    SUN_Y,
    VEGETATION,
    VILLAGE,
    block_use,
    paint_land,
    river_px,
    warp,
)
from painting.noise import compiled, hash_cell, perlin, smoothstep, uniform

METRES_PER_PX = 0.3
MIN_SIZE_PX = 256
REGION_PX = 1024
CRS = "EPSG:32633"
ORIGIN_EASTING_NORTHING = (412_000.0, 5_868_000.0)

_MARGIN_PX = 48  # a crown with its shadow that reaches in from outside
_TREE_PITCH_PX = 21.0
_CAR_PITCH_PX = 46.0
_CAR_RGB = np.array(
    [
        [225.0, 225.0, 225.0],
        [60.0, 62.0, 66.0],
        [150.0, 152.0, 155.0],
        [140.0, 48.0, 44.0],
        [60.0, 84.0, 130.0],
    ]
)


@compiled
def _find_trees(x0: int, y0: int, label: np.ndarray, seed: int) -> np.ndarray:
    """Trees (n, 4): x, y, crown radius in pixels, key."""
    height, width = label.shape
    found = np.empty((int((height / _TREE_PITCH_PX + 3) * (width / _TREE_PITCH_PX + 3)), 4))
    count = 0
    key = seed + 5000
    for j in range(int(y0 // _TREE_PITCH_PX), int((y0 + height) // _TREE_PITCH_PX) + 1):
        for i in range(int(x0 // _TREE_PITCH_PX), int((x0 + width) // _TREE_PITCH_PX) + 1):
            x = (i + 0.1 + 0.8 * uniform(i, j, key)) * _TREE_PITCH_PX
            y = (j + 0.1 + 0.8 * uniform(i, j, key + 1)) * _TREE_PITCH_PX
            row, column = int(y) - y0, int(x) - x0
            if row < 0 or column < 0 or row >= height or column >= width:
                continue
            if label[row, column] != VEGETATION:
                continue
            u, v = warp(x, y, seed)
            use = block_use(int(np.floor(u / BLOCK_PX)), int(np.floor(v / BLOCK_PX)), seed)
            edge = abs(v - np.floor(v / BLOCK_PX + 0.5) * BLOCK_PX)
            edge = min(edge, abs(u - np.floor(u / BLOCK_PX + 0.5) * BLOCK_PX))
            grove = perlin(x / 260.0, y / 260.0, key + 2)
            likely = 0.002 if use == FIELD else 0.02
            if use == FOREST:
                likely = 0.96 if grove > -0.45 else 0.25
            elif use == VILLAGE:
                likely = 0.20 + 0.2 * grove
            elif use != FIELD and grove > 0.42:
                likely = 0.5
            if edge < 34.0 and grove > 0.05:
                likely = max(likely, 0.55)
            if river_px(x, y, seed) < 55.0:
                likely = max(likely, 0.5 + 0.5 * grove)
            if uniform(i, j, key + 3) < likely:
                found[count, 0], found[count, 1] = x, y
                found[count, 2] = 7.0 + 9.0 * uniform(i, j, key + 4) * (
                    0.6 if use == VILLAGE else 1.0
                )
                found[count, 3] = uniform(i, j, key + 5) * 1e6
                count += 1
    return found[:count]


@compiled
def _paint_trees(x0: int, y0: int, trees: np.ndarray, rgb: np.ndarray, label: np.ndarray) -> None:
    """Shadows of all trees, then their crowns, in `rgb` (h, w, 3) and `label` (h, w)."""
    height, width = label.shape
    for layer in range(2):
        for n in range(trees.shape[0]):
            x, y, radius, key = trees[n, 0], trees[n, 1], trees[n, 2], int(trees[n, 3])
            if layer == 0:
                x -= SUN_X * 0.95 * radius
                y -= SUN_Y * 0.95 * radius
            reach = int(1.3 * radius) + 1
            hue = uniform(3, 0, key)
            for j in range(max(int(y) - reach - y0, 0), min(int(y) + reach + 1 - y0, height)):
                for i in range(max(int(x) - reach - x0, 0), min(int(x) + reach + 1 - x0, width)):
                    dx, dy = (x0 + i - x) / radius, (y0 + j - y) / radius
                    d = math.hypot(dx, dy) + 0.20 * perlin(2.3 * dx, 2.3 * dy, key)
                    cover = smoothstep(1.02, 0.92, d)
                    if cover <= 0.0:
                        continue
                    if layer == 0:
                        for c in range(3):
                            rgb[j, i, c] *= 1.0 - cover * (0.52, 0.50, 0.40)[c]
                        continue
                    leaf = perlin((x0 + i) / 3.6, (y0 + j) / 3.6, key) + 0.7 * perlin(
                        (x0 + i) / 1.7, (y0 + j) / 1.7, key + 1
                    )
                    lit = 0.88 + 0.42 * (dx * SUN_X + dy * SUN_Y) + 0.30 * leaf - 0.18 * d * d
                    for c in range(3):
                        green = (84.0 + 36.0 * hue, 110.0 + 20.0 * hue, 68.0 + 10.0 * hue)[c]
                        rgb[j, i, c] += cover * (green * max(lit, 0.3) - rgb[j, i, c])
                    if d < 0.97:
                        label[j, i] = VEGETATION


@compiled
def _paint_cars(x0: int, y0: int, seed: int, rgb: np.ndarray, label: np.ndarray) -> None:
    """Cars on both lanes of the main roads, drawn where the road is not covered by trees."""
    height, width = label.shape
    for j in range(height):
        for i in range(width):
            if label[j, i] != ROAD:
                continue
            u, v = warp(float(x0 + i), float(y0 + j), seed)
            near_u = u - np.floor(u / BLOCK_PX + 0.5) * BLOCK_PX
            near_v = v - np.floor(v / BLOCK_PX + 0.5) * BLOCK_PX
            across, along = (near_u, v) if abs(near_u) < abs(near_v) else (near_v, u)
            lane = 1 if across > 0.0 else 0
            road = int(np.floor((u if abs(near_u) < abs(near_v) else v) / BLOCK_PX + 0.5))
            place = int(np.floor(along / _CAR_PITCH_PX))
            key = seed + 7000 + 10 * road + lane + (500 if abs(near_u) < abs(near_v) else 0)
            if uniform(place, 0, key) > 0.13:
                continue
            s = along - (place + 0.3 + 0.4 * uniform(place, 1, key)) * _CAR_PITCH_PX
            t = abs(across) - 5.2
            if abs(s) < 7.4 and abs(t) < 3.1:
                paint = int(uniform(place, 2, key) * 5.0)
                glass = 0.45 if 2.0 < abs(s) < 4.4 and abs(t) < 2.5 else 1.0
                for c in range(3):
                    rgb[j, i, c] = _CAR_RGB[paint, c] * glass
            elif abs(s + 2.0) < 7.4 and abs(t + 1.6) < 3.2:
                for c in range(3):
                    rgb[j, i, c] *= 0.55


@compiled
def _expose(x0: int, y0: int, rgb: np.ndarray, seed: int, out: np.ndarray) -> None:
    """Haze, sensor noise and rounding: `out` (h, w, 3) uint8."""
    height, width = out.shape[:2]
    for j in range(height):
        for i in range(width):
            bits = hash_cell(x0 + i, y0 + j, seed + 9000)
            cloud = 1.0 + 0.04 * perlin((x0 + i) / 3000.0, (y0 + j) / 3000.0, seed + 9001)
            for c in range(3):
                low = float((bits >> np.uint64(16 * c)) & np.uint64(255))
                high = float((bits >> np.uint64(16 * c + 8)) & np.uint64(255))
                value = 9.0 + c + 0.96 * cloud * rgb[j, i, c] + (low + high - 255.0) / 60.0
                out[j, i, c] = np.uint8(min(max(value + 0.5, 0.0), 255.0))


def render_region(
    seed: int, x: int, y: int, width: int, height: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (height, width, 3) uint8 and true labels (height, width) uint8 of a region."""
    m = _MARGIN_PX
    x0, y0, w, h = x - m, y - m, width + 2 * m, height + 2 * m
    rgb = np.empty((h, w, 3), dtype=np.float32)
    label = np.empty((h, w), dtype=np.uint8)
    paint_land(x0, y0, seed, rgb, label)
    _paint_cars(x0, y0, seed, rgb, label)
    trees = _find_trees(x0, y0, label, seed)
    _paint_trees(x0, y0, trees, rgb, label)
    sharp = gaussian_filter(rgb, (0.6, 0.6, 0), truncate=3.0)[m : h - m, m : w - m]
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    _expose(x, y, np.ascontiguousarray(sharp), seed, pixels)
    return pixels, np.ascontiguousarray(label[m : h - m, m : w - m])
