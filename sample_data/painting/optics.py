"""From stain densities to the RGB picture that a scanner's camera takes."""

import math

import numpy as np
from scipy.ndimage import gaussian_filter

from painting.noise import compiled, fbm, hash_cell, perlin, smoothstep
from painting.tissue import FOCUS, TINT

# Optical density (base 10) of haematoxylin, eosin and red blood cells in R, G, B per unit of
# density; the first two between Ruifrok & Johnston (2001) and Macenko et al. (2009).
STAIN_OD = np.array([[0.60, 0.72, 0.35], [0.16, 0.82, 0.54], [0.20, 0.78, 0.60]])
PEN_OD = np.array([0.95, 0.42, 0.22])
GLASS_RGB = np.array([243.0, 242.0, 243.0])


@compiled
def _bytes_near(key: int) -> float:
    """A cheap bell-shaped number of standard deviation 1 from the bits of one hash."""
    bits = hash_cell(key, 3, 5)
    total = 0.0
    for i in range(4):
        total += float((bits >> np.uint64(8 * i)) & np.uint64(255))
    return (total - 510.0) / 147.8


@compiled
def absorb(
    x0: int,
    y0: int,
    stains: np.ndarray,
    folds: np.ndarray,
    pen: np.ndarray,
    seed: int,
    light: np.ndarray,
) -> None:
    """Beer-Lambert law: `light` (h, w, 3) that passes `stains` (3, h, w).

    `folds` has a row (x, y, angle, half_length, half_width) per fold, `pen` one
    (x, y, angle, half_length, half_width). Stain strength drifts over the slide.
    """
    height, width = stains.shape[1:]
    for j in range(height):
        for i in range(width):
            x = float(x0 + i)
            y = float(y0 + j)
            drift = perlin(x / 2600.0, y / 2600.0, seed + TINT)
            h = stains[0, j, i] * (1.0 + 0.22 * drift)
            e = stains[1, j, i] * (
                1.0 - 0.10 * drift + 0.2 * perlin(x / 1900.0, y / 1900.0, seed + TINT + 1)
            )
            b = stains[2, j, i]
            if e > 0.0:
                for n in range(folds.shape[0]):
                    dx = x - folds[n, 0]
                    dy = y - folds[n, 1]
                    u = math.cos(folds[n, 2]) * dx + math.sin(folds[n, 2]) * dy
                    v = math.cos(folds[n, 2]) * dy - math.sin(folds[n, 2]) * dx
                    v += 0.5 * folds[n, 3] * perlin(1.1 * u / folds[n, 3], n + 0.5, seed + TINT + 2)
                    end = 1.0 - abs(u) / folds[n, 3]
                    if end <= 0.0:
                        continue
                    half = folds[n, 4] * min(1.0, 2.5 * end)
                    inside = smoothstep(half + 2.0, half - 4.0, abs(v)) if half > 4.0 else 0.0
                    layers = 1.0 + 0.95 * inside * (0.8 + 0.2 * (v / (half + 1.0)) ** 2)
                    h *= layers
                    e *= layers
            ink = _ink(x, y, pen, seed)
            for c in range(3):
                od = h * STAIN_OD[0, c] + e * STAIN_OD[1, c] + b * STAIN_OD[2, c]
                light[j, i, c] = 10.0 ** -(od + ink * PEN_OD[c])


@compiled
def _ink(x: float, y: float, pen: np.ndarray, seed: int) -> float:
    """Density of the pen mark's ink at a point."""
    dx = x - pen[0]
    dy = y - pen[1]
    u = math.cos(pen[2]) * dx + math.sin(pen[2]) * dy
    v = math.cos(pen[2]) * dy - math.sin(pen[2]) * dx
    if abs(u) > 1.3 * pen[3] or abs(v) > 2.0 * pen[4]:
        return 0.0
    v += 0.35 * pen[4] * perlin(u / (1.3 * pen[3]), 0.5, seed + TINT + 3)
    over = max(abs(u) - pen[3] + pen[4], 0.0)
    distance = math.hypot(over, v) / pen[4]
    distance += 0.05 * fbm(x / 60.0, y / 60.0, 3, seed + TINT + 4)
    body = smoothstep(1.0, 0.90, distance)
    streak = 0.75 + 0.25 * perlin(v / 14.0, u / 300.0, seed + TINT + 5)
    return 0.55 * body * streak * (0.75 + 0.45 * smoothstep(0.6, 0.98, distance))


@compiled
def _expose(
    x0: int, y0: int, light: np.ndarray, seed: int, glass: np.ndarray, rgb: np.ndarray
) -> None:
    """Lamp unevenness, sensor noise and rounding: `rgb` (h, w, 3) uint8 from `light`."""
    height, width = rgb.shape[:2]
    for j in range(height):
        for i in range(width):
            lamp = 1.0 + 0.006 * perlin((x0 + i) / 1500.0, (y0 + j) / 1500.0, seed + TINT + 7)
            for c in range(3):
                key = ((y0 + j) * 2_000_003 + x0 + i) * 3 + c + seed * 977
                value = light[j, i, c]
                noise = (0.4 + 1.3 * math.sqrt(max(1.0 - value, 0.0))) * _bytes_near(key)
                level = glass[c] * lamp * value + noise
                rgb[j, i, c] = np.uint8(min(max(level + 0.5, 0.0), 255.0))


def photograph(x0: int, y0: int, light: np.ndarray, seed: int, *, margin_px: int) -> np.ndarray:
    """Blur, focus drift and noise: (h, w, 3) uint8 without the margin."""
    height, width = light.shape[:2]
    sharp = gaussian_filter(light, (0.55, 0.55, 0), truncate=3.0)
    cells = 33
    xs = np.linspace(x0, x0 + width, cells)
    ys = np.linspace(y0, y0 + height, cells)
    wave = [[fbm(x / 1700.0, y / 1700.0, 2, seed + FOCUS) for x in xs] for y in ys]
    weight = np.clip((np.asarray(wave) - 0.42) / 0.25, 0.0, 1.0)
    if weight.any():
        soft = gaussian_filter(light, (2.2, 2.2, 0), truncate=3.0)
        rows = np.linspace(0, cells - 1, height)
        columns = np.linspace(0, cells - 1, width)
        across = np.array([np.interp(columns, np.arange(cells), line) for line in weight])
        low = np.minimum(rows.astype(int), cells - 2)
        part = (rows - low)[:, None]
        blend = (across[low] * (1.0 - part) + across[low + 1] * part)[..., None]
        sharp += blend.astype(np.float32) * (soft - sharp)
    inner = np.ascontiguousarray(
        sharp[margin_px : height - margin_px, margin_px : width - margin_px]
    )
    rgb = np.empty(inner.shape, dtype=np.uint8)
    _expose(x0 + margin_px, y0 + margin_px, inner, seed, GLASS_RGB, rgb)
    return rgb
