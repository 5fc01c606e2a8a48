"""Areas of the classes as CSV."""

import csv
from collections.abc import Sequence
from pathlib import Path

from gigavim.frames import ClassSpec, MapFrame
from gigavim.outputs.atomic import atomic_path
from gigavim.outputs.labels import LabelMap
from gigavim.outputs.summary import summarize


def write_areas(
    labels: LabelMap,
    frame: MapFrame,
    classes: Sequence[ClassSpec],
    path: str | Path,
    *,
    slide: str,
    class_pixels: Sequence[int] | None = None,
    overwrite: bool = False,
) -> None:
    """Write one row per class: slide, class, pixels, share of the map, area, area of its regions.

    Areas are in mm², of rasters with a CRS in ha; empty where a pixel's size is not known.

    Raises:
        OutputError: the file exists or cannot be written.
    """
    table = summarize(labels, frame, classes, class_pixels=class_pixels)["classes"]
    rows = [{"slide": slide, **entry} for entry in table]
    with (
        atomic_path(path, overwrite=overwrite) as partial,
        partial.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
