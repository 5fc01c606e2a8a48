"""The summary of a run: areas of the classes, what was covered, and how it was made."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from gigavim.errors import OutputError
from gigavim.frames import ClassSpec, MapFrame
from gigavim.outputs.atomic import atomic_path
from gigavim.outputs.ground import GroundTransform, ring_areas_m2
from gigavim.outputs.labels import (
    CHUNK_HW,
    SHARD_COLS,
    WINDOW_PX,
    Coverage,
    LabelMap,
    LabelStore,
    windows,
)
from gigavim.outputs.polygons import lineage

FEW_CLASSES = 16
READERS = 2
ROWS_HW = (CHUNK_HW[0], SHARD_COLS)
"""Windows of rows: whole shards of a lasting label store."""


def summarize(
    labels: LabelMap,
    frame: MapFrame,
    classes: Sequence[ClassSpec],
    *,
    class_pixels: Sequence[int] | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """Areas and coverage of a label map as plain data, with the caller's facts after them.

    Each class has its own `pixels`, `fraction` of the map and area; `region_...` of it includes the
    classes below it, as its polygons do. Areas are in mm², and for rasters with a CRS in ha on the
    ellipsoid; null where the size of a pixel is not known.

    Args:
        labels: the map; of a `LabelStore` the coverage is told too.
        frame: its placement.
        classes: what its values mean.
        class_pixels: how many pixels each class has, where that is known; else they are counted.
        **facts: anything `orjson` can write: tokens, seconds by stage, provenance.

    Raises:
        OutputError: the map holds a value that is no class.
    """
    pixels, areas, unit = class_areas(labels, frame, len(classes), class_pixels)
    total = max(labels.height * labels.width, 1)
    below = np.zeros((len(classes), len(classes)), bool)
    for value in range(len(classes)):
        below[lineage(classes, value), value] = True
    table = [
        {
            "value": value,
            "name": spec.name,
            "parent": spec.parent,
            "pixels": int(pixels[value]),
            "fraction": _rounded(pixels[value] / total),
            f"area_{unit}": _rounded(areas[value]),
            f"region_area_{unit}": _rounded(areas[below[value]].sum()),
        }
        for value, spec in enumerate(classes)
    ]
    summary: dict[str, Any] = {"classes": table}
    if isinstance(labels, LabelStore):
        summary["coverage"] = coverage_fractions(labels)
    return summary | facts


def write_summary(summary: dict[str, Any], path: str | Path, *, overwrite: bool = False) -> None:
    """Write a summary as indented JSON.

    Raises:
        OutputError: the file exists or cannot be written, or the summary holds what JSON cannot.
    """
    options = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
    try:
        text = orjson.dumps(summary, option=options, default=_plain)
    except orjson.JSONEncodeError as error:
        raise OutputError(f"{path}: the summary cannot be written as JSON: {error}") from error
    with atomic_path(path, overwrite=overwrite) as partial:
        partial.write_bytes(text)


def class_areas(
    labels: LabelMap, frame: MapFrame, classes: int, known: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray, str]:
    """(classes,) int64 pixels, (classes,) float64 areas, and the areas' unit: "mm2" or "ha"."""
    georeferenced = frame.georeference is not None and bool(frame.georeference.crs_wkt)
    if georeferenced:
        pixels, areas_m2 = _ground_areas(labels, GroundTransform.of(frame))
    elif known is not None:
        pixels, areas_m2 = np.asarray(known, np.int64), np.zeros(256)
    else:
        pixels, areas_m2 = _pixels(labels, classes), np.zeros(256)
    if pixels[classes:].any():
        label = classes + int(np.flatnonzero(pixels[classes:])[0])
        raise OutputError(f"the label map holds the value {label}, but there are {classes} classes")
    if georeferenced:
        return pixels[:classes], areas_m2[:classes] / 1e4, "ha"
    return pixels[:classes], pixels[:classes] * (frame.mpp_x * frame.mpp_y / 1e6), "mm2"


def _ground_areas(labels: LabelMap, ground: GroundTransform) -> tuple[np.ndarray, np.ndarray]:
    """(256,) int64 pixels and (256,) float64 square metres of each value."""
    pixels, areas_m2 = np.zeros(256, np.int64), np.zeros(256)
    for window in windows(labels.height, labels.width, side_px=WINDOW_PX):
        values = labels.read(*window)
        place = np.arange(len(values))[:, None] * 256 + values
        by_row = np.bincount(place.ravel(), minlength=256 * len(values)).reshape(-1, 256)
        pixels += by_row.sum(0)
        areas_m2 += row_pixel_areas_m2(ground, *window) @ by_row
    return pixels, areas_m2


def _pixels(labels: LabelMap, classes: int) -> np.ndarray:
    """(256,) int64, how often each value occurs in a map."""
    rows, cols = ROWS_HW

    def count(corner: tuple[int, int]) -> np.ndarray:
        y, x = corner
        window = labels.read(y, min(y + rows, labels.height), x, min(x + cols, labels.width))
        return count_labels(window, classes)

    corners = [(y, x) for y in range(0, labels.height, rows) for x in range(0, labels.width, cols)]
    with ThreadPoolExecutor(READERS, thread_name_prefix="gigavim-summary") as pool:
        return sum(pool.map(count, corners), np.zeros(256, np.int64))


def count_labels(values: np.ndarray, classes: int) -> np.ndarray:
    """(256,) int64, how often each value occurs."""
    counts = np.zeros(256, np.int64)
    if classes <= FEW_CLASSES:  # five times as fast
        counts[:classes] = [np.count_nonzero(values == value) for value in range(classes)]
        if counts.sum() == values.size:
            return counts
    return np.bincount(values.ravel(), minlength=256)


def row_pixel_areas_m2(ground: GroundTransform, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
    """(y1 - y0,) area on the ellipsoid of a pixel of each row of a window, its mean along x."""
    # Five points an edge, so that no step goes half way round the Earth.
    across = np.linspace(x0, x1, 5)
    edges = np.stack(np.broadcast_arrays(across, np.arange(y0, y1 + 1)[:, None]), -1)  # (h+1, 5, 2)
    lonlat = ground.lonlat(edges.reshape(-1, 2)).reshape(edges.shape)
    rings = np.concatenate([lonlat[:-1], lonlat[1:, ::-1], lonlat[:-1, :1]], 1)  # (h, 11, 2)
    starts = np.arange(len(rings) + 1) * rings.shape[1]
    return np.asarray(np.abs(ring_areas_m2(rings.reshape(-1, 2), starts)) / (x1 - x0))


def coverage_fractions(labels: LabelStore) -> dict[str, float]:
    """Shares of the map's area that were predicted, skipped and unreadable."""
    cells = labels.read_coverage()
    heights = _covered(cells.shape[0], labels.cell_px, labels.height)
    widths = _covered(cells.shape[1], labels.cell_px, labels.width)
    total = max(heights.sum() * widths.sum(), 1)
    found = {}
    for kind in (Coverage.PREDICTED, Coverage.SKIPPED, Coverage.UNREADABLE):
        # Not by products: their threads would go on spinning beside those that hash and write.
        covered = (heights * ((cells == kind) * widths).sum(1)).sum()
        found[kind.name.lower()] = round(float(covered / total), 6)
    return found


def _covered(cells: int, cell_px: int, map_px: int) -> np.ndarray:
    """(cells,) pixels of the map in each cell along an axis; the last cell takes what is left."""
    edges = np.clip(np.arange(cells + 1) * cell_px, 0, map_px).astype(np.float64)
    edges[-1] = map_px
    return np.diff(edges)


def _rounded(value: float) -> float | None:
    return float(f"{value:.9g}") if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__}")
