"""All results of a slide, each by its writer."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gigavim.errors import OutputError
from gigavim.frames import ClassSpec, MapFrame
from gigavim.names import as_text
from gigavim.outputs.geojson import write_geojson
from gigavim.outputs.labels import LabelStore
from gigavim.outputs.ome_tiff import write_ome_tiff
from gigavim.outputs.overlay import write_overlay
from gigavim.outputs.summary import summarize, write_summary

if TYPE_CHECKING:
    from gigavim.slides.base import Slide


def write_results(
    paths: Mapping[str, Path],
    slide: "Slide",
    labels: LabelStore,
    frame: MapFrame,
    classes: Sequence[ClassSpec],
    *,
    qupath_bounds: bool = True,
    facts: Mapping[str, Any],
    advance: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Write the wanted formats to the paths given for them; files there are replaced.

    Args:
        paths: files by format: "ome-tiff", "geotiff", "geojson", "geojson.gz", "overlay",
            "summary".
        slide: the open slide.
        labels: its finished label map.
        frame: the map's placement on the slide.
        classes: what the map's values mean.
        qupath_bounds: polygons count from the slide's bounds, as QuPath does, not from level 0.
        facts: what the summary says beyond the map; "provenance" goes into the other files too, and
            "seconds" is completed by the time of each writer.
        advance: called with 1 after each file.

    Returns:
        The summary.

    Raises:
        OutputError: a format is unknown, or a file cannot be written.
    """
    provenance = facts.get("provenance")
    counts: dict[str, int] = {}

    def geojson(path: Path) -> None:
        counts["features"] = write_geojson(
            labels,
            frame,
            classes,
            path,
            origin_xy_level0=None if qupath_bounds else (0, 0),
            seed=slide.fingerprint(),
            provenance=provenance,
            overwrite=True,
        )

    def geotiff(path: Path) -> None:
        from gigavim.outputs.geotiff import write_geotiff

        write_geotiff(labels, frame, classes, path, provenance=provenance, overwrite=True)

    writers: dict[str, Callable[[Path], None]] = {
        "ome-tiff": lambda path: write_ome_tiff(
            labels, frame, classes, path, name=as_text(slide.path.name), overwrite=True
        ),
        "geotiff": geotiff,
        "geojson": geojson,
        "geojson.gz": geojson,
        "overlay": lambda path: write_overlay(slide, labels, frame, classes, path, overwrite=True),
    }
    unknown = set(paths) - set(writers) - {"summary"}
    if unknown:
        raise OutputError(f"unknown format {min(unknown)!r}: choose from {', '.join(writers)}")
    seconds: dict[str, float] = {}
    for kind, path in paths.items():
        if kind == "summary":
            continue
        started = time.perf_counter()
        writers[kind](path)
        seconds[f"write {kind}"] = round(time.perf_counter() - started, 3)
        if advance is not None:
            advance(1)
    timings = {"seconds": {**facts.get("seconds", {}), **seconds}}
    summary = summarize(labels, frame, classes, **{**counts, **facts, **timings})
    if "summary" in paths:
        write_summary(summary, paths["summary"], overwrite=True)
        if advance is not None:
            advance(1)
    return summary
