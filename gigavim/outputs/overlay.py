"""A picture to look at: the slide with its classes in colour, a legend and a scale bar."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from gigavim.errors import OutputError
from gigavim.frames import Bounds, ClassSpec, MapFrame
from gigavim.outputs.atomic import atomic_path
from gigavim.outputs.labels import WINDOW_PX, Coverage, LabelMap, LabelStore
from gigavim.outputs.legend import add_legend
from gigavim.outputs.polygons import is_exported, lineage

MAX_PX = 2048
SAMPLES = 4
"""Labels looked at along each side of an overlay pixel: enough for its mixture of classes."""
REGION_ALPHA, OBJECT_ALPHA, OUTLINE_ALPHA = 0.22, 0.6, 0.9
"""How much of a class's colour covers the slide: classes that contain others, those that do not,
and the outlines of the former."""
UNREADABLE_RGB = (255, 0, 255)


class Pictured(Protocol):
    """A slide, or a store that holds its picture."""

    @property
    def bounds(self) -> Bounds:
        """The scanned part, in level-0 pixels."""

    def thumbnail(self, max_px: int) -> np.ndarray:
        """(h, w, 3) uint8 of the bounds, the longer side at most `max_px`."""


def write_overlay(
    slide: Pictured,
    labels: LabelMap,
    frame: MapFrame,
    classes: Sequence[ClassSpec],
    path: str | Path,
    *,
    max_px: int = MAX_PX,
    overwrite: bool = False,
) -> None:
    """Write a PNG of the slide's bounds with the label map over it.

    The slide is drawn from the picture's top-left corner, its longer side at most `max_px`; the
    legend and the scale bar are below. Colours are mixed by the share of each class in a pixel's
    area. What could not be read is hatched in magenta.

    Args:
        slide: the open slide, or its store.
        labels: its (height, width) label map; of a `LabelStore` the coverage is used too.
        frame: the map's placement on the slide.
        classes: name and colour of each label value.
        path: the file to write.
        max_px: longer side of the slide's picture.
        overwrite: replace the file if it exists.

    Raises:
        OutputError: the file exists or cannot be written.
        SlideError: the slide cannot be read.
    """
    picture = slide.thumbnail(max_px)
    blended = blend(picture, slide.bounds, labels, frame, classes)
    um_per_px = frame.mpp_x / frame.scale_x * slide.bounds.width_level0 / picture.shape[1]
    shown = [spec for spec in classes if is_exported(spec)]
    entries = [(spec.name, spec.color_rgb) for spec in shown]
    if isinstance(labels, LabelStore) and (labels.read_coverage() == Coverage.UNREADABLE).any():
        entries.append(("unreadable", UNREADABLE_RGB))
    sheet = add_legend(
        Image.fromarray(blended),
        entries,
        um_per_px=um_per_px,
        metric=frame.georeference is not None,
    )
    with atomic_path(path, overwrite=overwrite) as partial:
        sheet.save(partial, format="PNG", compress_level=6)


def blend(
    picture: np.ndarray,
    bounds: Bounds,
    labels: LabelMap,
    frame: MapFrame,
    classes: Sequence[ClassSpec],
) -> np.ndarray:
    """(h, w, 3) uint8 `picture` of the bounds with the classes' colours over it."""
    height, width = picture.shape[:2]
    rows = _axis(bounds.y_level0, bounds.height_level0, height, frame.y_level0, frame.scale_y,
                 labels.height)  # fmt: skip
    cols = _axis(bounds.x_level0, bounds.width_level0, width, frame.x_level0, frame.scale_x,
                 labels.width)  # fmt: skip
    tint, cover = _tints(classes)
    out = np.empty_like(picture)
    regions = np.zeros((height, width), np.uint8)
    to_root = _root_matrix(classes)
    for top, shares in _class_shares(labels, rows, cols, (height, width), len(classes)):
        band = slice(top, top + len(shares))
        colored = shares @ (tint * cover[:, None])  # (h, w, 3)
        clear = 1.0 - shares @ cover
        out[band] = np.clip(picture[band] * clear[..., None] + colored + 0.5, 0, 255)
        regions[band] = np.argmax(shares @ to_root, -1)
    _draw_outlines(out, regions, classes)
    if isinstance(labels, LabelStore):
        _hatch_unreadable(out, labels, rows, cols)
    return out


@dataclass(frozen=True, slots=True)
class _Axis:
    """Along one axis, which places of the map are looked at and where they go in the picture."""

    source: np.ndarray
    """(n,) map pixels, ascending."""
    target: np.ndarray
    """(n,) picture pixels, ascending."""


def _axis(
    start_level0: float,
    length_level0: float,
    picture_px: int,
    map_level0: float,
    map_scale: float,
    map_px: int,
) -> _Axis:
    """Pairs by centre: map pixels where they are the smaller, picture pixels where those are."""
    scale = length_level0 / picture_px  # level-0 pixels per picture pixel
    if map_scale < scale:
        step = max(1, int(scale / map_scale / SAMPLES))
        source = np.arange(step // 2, map_px, step, dtype=np.int64)
        centre = map_level0 + (source + 0.5) * map_scale
        target = np.floor((centre - start_level0) / scale).astype(np.int64)
    else:
        target = np.arange(picture_px, dtype=np.int64)
        centre = start_level0 + (target + 0.5) * scale
        source = np.floor((centre - map_level0) / map_scale).astype(np.int64)
    inside = (target >= 0) & (target < picture_px) & (source >= 0) & (source < map_px)
    return _Axis(source[inside], target[inside])


def _class_shares(
    labels: LabelMap, rows: _Axis, cols: _Axis, picture_hw: tuple[int, int], classes: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield bands of the picture: top row, (h, w, classes) float32 share of each class."""
    height, width = picture_hw
    per_row = max(1, len(rows.source) // height)
    span = rows.source[-1] - rows.source[0] + 1 if len(rows.source) else 1
    deep = max(1, round(512 * height / max(span, 1)), 256 // per_row)
    for top in range(0, height, deep):
        bottom = min(top + deep, height)
        first, last = np.searchsorted(rows.target, [top, bottom])
        shares = np.zeros((bottom - top, width, classes), np.float32)
        if last > first:
            _count(labels, rows, cols, (int(first), int(last)), top, shares)
            shares /= np.maximum(shares.sum(-1, keepdims=True), 1)
        yield top, shares


def _count(
    labels: LabelMap, rows: _Axis, cols: _Axis, span: tuple[int, int], top: int, out: np.ndarray
) -> None:
    """Add the labels of samples `span` along y to `out` (h, w, classes)."""
    y = rows.source[span[0] : span[1]]
    row = rows.target[span[0] : span[1]] - top
    classes = out.shape[-1]
    edges = np.searchsorted(cols.source, np.arange(0, labels.width + 4 * WINDOW_PX, 4 * WINDOW_PX))
    for left, right in pairwise(edges.tolist()):
        if right == left:
            continue
        x, col = cols.source[left:right], cols.target[left:right]
        window = labels.read(int(y[0]), int(y[-1]) + 1, int(x[0]), int(x[-1]) + 1)
        values = window[np.ix_(y - y[0], x - x[0])]
        if values.max() >= classes:
            raise OutputError(f"the label map holds more than {classes} classes")
        wide = int(col[-1] - col[0]) + 1
        place = (row[:, None] * wide + (col - col[0])) * classes + values
        counts = np.bincount(place.ravel(), minlength=len(out) * wide * classes)
        out[:, col[0] : col[0] + wide] += counts.reshape(len(out), wide, classes)


def _tints(classes: Sequence[ClassSpec]) -> tuple[np.ndarray, np.ndarray]:
    """(classes, 3) float32 colours and (classes,) how much they cover."""
    parents = {spec.parent for spec in classes}
    cover = [
        0.0 if not is_exported(spec) else REGION_ALPHA if spec.name in parents else OBJECT_ALPHA
        for spec in classes
    ]
    tint = np.array([spec.color_rgb for spec in classes], np.float32).reshape(-1, 3)
    return tint, np.array(cover, np.float32)


def _root_matrix(classes: Sequence[ClassSpec]) -> np.ndarray:
    """(classes, classes) float32 that adds the shares of classes to those of their outermost."""
    matrix = np.zeros((len(classes), len(classes)), np.float32)
    for value in range(len(classes)):
        matrix[value, lineage(classes, value)[0]] = 1
    return matrix


def _draw_outlines(out: np.ndarray, regions: np.ndarray, classes: Sequence[ClassSpec]) -> None:
    """Draw the inner border, one pixel wide, of each region of a class that contains others."""
    padded = np.pad(regions, 1, mode="edge")
    border = np.zeros(regions.shape, bool)
    for y, x in ((0, 1), (2, 1), (1, 0), (1, 2)):
        border |= padded[y : y + regions.shape[0], x : x + regions.shape[1]] != regions
    parents = {spec.parent for spec in classes}
    for value, spec in enumerate(classes):
        if spec.name in parents and is_exported(spec):
            line = border & (regions == value)
            color = np.array(spec.color_rgb, np.float32)
            out[line] = out[line] * (1 - OUTLINE_ALPHA) + color * OUTLINE_ALPHA


def _hatch_unreadable(out: np.ndarray, labels: LabelStore, rows: _Axis, cols: _Axis) -> None:
    cells = labels.read_coverage() == Coverage.UNREADABLE
    if not cells.any() or not len(rows.source) or not len(cols.source):
        return
    row = np.minimum(rows.source // labels.cell_px, cells.shape[0] - 1)
    col = np.minimum(cols.source // labels.cell_px, cells.shape[1] - 1)
    height, width = out.shape[:2]
    hit = np.zeros((height, width), bool)
    found = np.argwhere(cells[np.ix_(row, col)])
    hit[rows.target[found[:, 0]], cols.target[found[:, 1]]] = True
    diagonal = np.add.outer(np.arange(height), np.arange(width))
    out[hit & (diagonal % 8 < 4)] = UNREADABLE_RGB
