"""An H&E-like slide at 0.5 micrometres per pixel, rendered region by region."""

from dataclasses import dataclass

import numpy as np

from painting.nuclei import find_nuclei, paint_nuclei
from painting.optics import absorb, photograph
from painting.structures import find_structures, paint_structures
from painting.tissue import GLASS, inside_px, paint_ground

MPP = 0.5
MIN_SIZE_PX = 256
REGION_PX = 1024

_MARGIN_PX = 24  # nuclei that reach in from outside, and the blur
_PIECE_PITCH_PX = 1500.0


@dataclass(frozen=True, slots=True)
class SlidePlan:
    """Where the large things lie on a slide of (width, height) level-0 pixels.

    `pieces` (n, 6) are rows (x, y, semi_x, semi_y, angle, fibre_angle); `folds` (n, 5) and `pen`
    (5,) hold (x, y, angle, half_length, half_width); angles in radians, the rest in pixels.
    `specks` (n, 4) are rows (x, y, radius, density) of dust.
    """

    width: int
    height: int
    seed: int
    pieces: np.ndarray
    folds: np.ndarray
    pen: np.ndarray
    specks: np.ndarray


def plan_slide(width: int, height: int, seed: int) -> SlidePlan:
    """Lay out tissue pieces, folds, the pen mark and dust."""
    rng = np.random.default_rng([seed, 1])
    pitch = float(np.clip(min(width, height) / 2.2, _PIECE_PITCH_PX, 6000.0))
    columns, rows = max(round(width / pitch), 1), max(round(height / pitch), 1)
    cell_w, cell_h = width / columns, height / rows
    cells = [(i, j) for j in range(rows) for i in range(columns)]
    if len(cells) > 3:  # some glass without tissue
        keep = rng.permutation(len(cells))[: len(cells) - max(len(cells) // 6, 1)]
        cells = [cells[k] for k in sorted(keep)]
    pieces = np.array(
        [
            (
                (i + 0.5 + rng.uniform(-0.05, 0.05)) * cell_w,
                (j + 0.5 + rng.uniform(-0.05, 0.05)) * cell_h,
                0.46 * cell_w * rng.uniform(0.9, 1.1),
                0.43 * cell_h * rng.uniform(0.9, 1.1),
                rng.uniform(-0.35, 0.35),
                rng.uniform(0.0, np.pi),
            )
            for i, j in cells
        ]
    )
    folded = pieces[rng.integers(len(pieces), size=max(len(pieces) // 5, 1))]
    folds = np.array(
        [
            (
                x + 0.2 * semi_x,
                y,
                rng.uniform(0.9, 1.9),
                0.8 * semi_y,
                min(0.05 * semi_y, 34.0),
            )
            for x, y, semi_x, semi_y, _, _ in folded
        ]
    )
    marked = pieces[rng.integers(len(pieces))]
    side = min(marked[2], marked[3])
    pen = np.array(
        [
            marked[0] - 0.95 * marked[2],
            marked[1] + 0.75 * marked[3],
            rng.uniform(-0.9, -0.6),
            0.55 * side,
            min(0.11 * side, 700.0),
        ]
    )
    count = max(width * height // 700_000, 1)
    specks = np.column_stack(
        [
            rng.uniform(0, width, count),
            rng.uniform(0, height, count),
            rng.uniform(2.0, 9.0, count),
            rng.uniform(0.08, 0.4, count),
        ]
    )
    return SlidePlan(width, height, seed, pieces, folds, pen, specks)


def _add_specks(light: np.ndarray, x0: int, y0: int, specks: np.ndarray) -> None:
    """Dark, out-of-focus dust on `light` (h, w, 3), in place."""
    height, width = light.shape[:2]
    for x, y, radius, density in specks:
        reach = int(3 * radius) + 1
        top, left = int(y) - y0 - reach, int(x) - x0 - reach
        rows = slice(max(top, 0), min(top + 2 * reach, height))
        columns = slice(max(left, 0), min(left + 2 * reach, width))
        if rows.start >= rows.stop or columns.start >= columns.stop:
            continue
        yy, xx = np.mgrid[rows, columns]
        square = (xx + x0 - x) ** 2 + (yy + y0 - y) ** 2
        shade = 10.0 ** (-density * np.exp(-((square / radius**2) ** 2)))
        light[rows, columns] *= shade[..., None].astype(np.float32)


def _touches_tissue(plan: SlidePlan, x0: int, y0: int, width: int, height: int) -> bool:
    """Whether any of a coarse net of points in the region lies on or near tissue."""
    xs = np.linspace(x0, x0 + width, max(width // 24, 2))
    ys = np.linspace(y0, y0 + height, max(height // 24, 2))
    return any(inside_px(x, y, plan.pieces, plan.seed)[0] > -60.0 for y in ys for x in xs)


def render_region(
    plan: SlidePlan, x: int, y: int, width: int, height: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (height, width, 3) uint8 and true labels (height, width) uint8 of a region.

    Labels are 0 glass, 1 tissue (with lumina and fat vacuoles), 2 nuclei.
    """
    m = _MARGIN_PX
    x0, y0, w, h = x - m, y - m, width + 2 * m, height + 2 * m
    stains = np.zeros((3, h, w), dtype=np.float32)
    label = np.zeros((h, w), dtype=np.uint8)
    if _touches_tissue(plan, x0, y0, w, h):
        kind = np.zeros((h, w), dtype=np.uint8)
        paint_ground(x0, y0, plan.pieces, plan.seed, stains, kind)
        label = (kind != GLASS).astype(np.uint8)
        structures = find_structures(x0, y0, h, w, plan.pieces, plan.seed)
        paint_structures(x0, y0, structures, stains, kind)
        nuclei = find_nuclei(x0, y0, kind, structures, plan.pieces, plan.seed)
        paint_nuclei(x0, y0, nuclei, stains, label)
    light = np.empty((h, w, 3), dtype=np.float32)
    absorb(x0, y0, stains, plan.folds, plan.pen, plan.seed, light)
    _add_specks(light, x0, y0, plan.specks)
    rgb = photograph(x0, y0, light, plan.seed, margin_px=m)
    return rgb, np.ascontiguousarray(label[m : h - m, m : w - m])
