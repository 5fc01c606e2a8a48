"""Regions of a label map as polygons along pixel edges, exact and independent of the tiling.

A region is a 4-connected set of pixels: pixels that touch at a corner only are two regions. The
map is gone through in tiles, row by row; what touches no seam between tiles is done at once, the
rest is kept until the sweep has passed it and then united (`gigavim.outputs.seams`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np
import shapely

from gigavim.ahead import in_order
from gigavim.errors import OutputError
from gigavim.frames import ClassSpec, MapFrame
from gigavim.outputs.labels import LabelMap
from gigavim.outputs.rings import Rings
from gigavim.outputs.seams import Seams, TilePieces
from gigavim.outputs.trace import outlines

TILE_PX = 1024


@dataclass(frozen=True, slots=True)
class Regions:
    """Some of the regions of a map."""

    labels: np.ndarray
    """(n,) int64 label value of each."""
    rings: Rings
    """(n) outlines in map pixels: counter-clockwise in x right, y up (RFC 7946), starting at the
    lowest x, then y; vertices at corners only."""

    @property
    def polygons(self) -> np.ndarray:
        """(n,) shapely polygons of `rings`, made at each call."""
        return self.rings.polygons()


@dataclass(frozen=True, slots=True)
class PolygonOptions:
    """Which regions are written, and how smooth."""

    min_area_px: float = 0.0
    """Smaller regions are left out, in map pixels squared; holes do not count."""
    simplify_px: float = 0.0
    """Tolerance of a simplification in map pixels; 0 keeps every edge."""

    @classmethod
    def in_um(cls, frame: MapFrame, *, min_area_um2: float, simplify_um: float) -> Self:
        """Options in micrometres on a map.

        Raises:
            OutputError: they are wanted, but the size of the map's pixels is not known.
        """
        pixel_um2 = frame.mpp_x * frame.mpp_y
        if (min_area_um2 or simplify_um) and not math.isfinite(pixel_um2):
            raise OutputError(
                "polygons cannot be chosen by size in micrometres: the slide's resolution is not"
                " known; give it with --slide-mpp"
            )
        return cls(
            min_area_um2 / pixel_um2 if min_area_um2 else 0.0,
            simplify_um / math.sqrt(pixel_um2) if simplify_um else 0.0,
        )

    def kept(self, batch: Regions) -> Regions:
        """The regions that are large enough."""
        if not self.min_area_px:
            return batch
        large = batch.rings.areas() >= self.min_area_px
        return Regions(batch.labels[large], batch.rings.where(large))

    def simplified(self, polygons: np.ndarray) -> np.ndarray:
        """(n,) polygons within the tolerance; topology is kept."""
        if self.simplify_px <= 0:
            return polygons
        return np.asarray(shapely.simplify(polygons, self.simplify_px, preserve_topology=True))


KEEP_ALL = PolygonOptions()


def regions(
    labels: LabelMap,
    classes: Sequence[ClassSpec],
    *,
    options: PolygonOptions = KEEP_ALL,
    tile_px: int = TILE_PX,
    workers: int = 2,
    done: Callable[[int], None] | None = None,
) -> Iterator[Regions]:
    """Yield the regions of every class that is exported, in an order that depends on the tiling.

    A class's regions include the pixels of all classes below it (`ClassSpec.parent`); classes whose
    object type is "none" have none.

    Args:
        labels: the label map.
        classes: what each label value means.
        options: which regions; smoothing is the caller's (`PolygonOptions.simplified`).
        tile_px: side of the tiles; no result depends on it.
        workers: threads that read and trace tiles.
        done: called with the map pixels finished since the last call.

    Raises:
        OutputError: classes name an unknown parent, or each other in a circle.
    """
    tables = layer_tables(classes)
    seams = [Seams(labels.width, tile_px) for _ in tables]
    # A label that is no class has no table entry, and must not vanish in silence.
    known = np.arange(256) < len(classes)
    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="polygons") as pool:
        for y in range(0, labels.height, tile_px):
            y1 = min(y + tile_px, labels.height)

            def trace(x: int, y: int = y, y1: int = y1) -> list[TilePieces]:
                window = labels.read(y, y1, x, min(x + tile_px, labels.width))
                if not known[window].all():
                    raise OutputError(f"the label map holds more than {len(classes)} classes")
                return [
                    _trace_tile(table[window], x=x, y=y, map_hw=(labels.height, labels.width))
                    for table in tables
                ]

            tiles = (partial(trace, x) for x in range(0, labels.width, tile_px))
            for tile in in_order(pool, tiles, depth=2 * workers):
                for layer, pieces in zip(seams, tile, strict=True):
                    inner = options.kept(Regions(pieces.inner_labels, pieces.inner))
                    if len(inner.labels):
                        yield inner
                    layer.add(pieces)
                if done is not None:
                    done(tile[0].height * tile[0].width)
            for layer in seams:
                for ended in layer.finish_row(last=y1 == labels.height):
                    kept = options.kept(Regions(*ended))
                    if len(kept.labels):
                        yield kept


def layer_tables(classes: Sequence[ClassSpec]) -> list[np.ndarray]:
    """(256,) uint8 look-up tables, one per depth of the class tree: label -> 1 + class to draw.

    In one layer each pixel belongs to at most one class: its ancestor (or itself) at that depth.
    """
    if len(classes) > 255:
        raise OutputError(f"{len(classes)} classes: polygons are written for at most 255")
    lineages = [lineage(classes, value) for value in range(len(classes))]
    tables = []
    for depth in range(max((len(line) for line in lineages), default=0)):
        table = np.zeros(256, np.uint8)
        for value, line in enumerate(lineages):
            if depth < len(line) and is_exported(classes[line[depth]]):
                table[value] = line[depth] + 1
        if table.any():
            tables.append(table)
    return tables or [np.zeros(256, np.uint8)]


def lineage(classes: Sequence[ClassSpec], value: int) -> list[int]:
    """Label values from the root of the class tree down to `value`."""
    by_name = {spec.name: index for index, spec in enumerate(classes)}
    line = [value]
    while (parent := classes[line[0]].parent) is not None:
        if parent not in by_name or by_name[parent] in line:
            raise OutputError(
                f"class {classes[line[0]].name!r}: its parent {parent!r} is "
                + ("no class" if parent not in by_name else "below it")
            )
        line.insert(0, by_name[parent])
    return line


def is_exported(spec: ClassSpec) -> bool:
    """Whether regions of the class are written."""
    return spec.object_type != "none" and spec.name.casefold() != "background"


def _trace_tile(values: np.ndarray, *, x: int, y: int, map_hw: tuple[int, int]) -> TilePieces:
    """Polygons of a tile of (label + 1) values whose top-left pixel is (x, y)."""
    height, width = values.shape
    values, found = outlines(values)
    found.xy[:] += np.array([x, y], np.int32)
    labels = values - 1
    left, top, right, bottom = found.bounds().T
    at_seam = (
        ((left == x) & (x > 0))
        | ((top == y) & (y > 0))
        | ((right == x + width) & (x + width < map_hw[1]))
        | ((bottom == y + height) & (y + height < map_hw[0]))
    )
    return TilePieces(
        x=x,
        y=y,
        width=width,
        height=height,
        inner_labels=labels[~at_seam],
        inner=found.where(~at_seam).normal(),
        seam_labels=labels[at_seam],
        seam=found.where(at_seam),
    )
