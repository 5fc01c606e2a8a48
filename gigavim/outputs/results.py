"""All results of a slide, each by its writer, all from its store."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gigavim.config import OutputSettings
from gigavim.outputs.areas import write_areas
from gigavim.outputs.atomic import explained
from gigavim.outputs.geojson import write_geojson
from gigavim.outputs.ome_tiff import write_ome_tiff
from gigavim.outputs.overlay import write_overlay
from gigavim.outputs.polygons import PolygonOptions
from gigavim.outputs.summary import summarize, write_summary

if TYPE_CHECKING:
    from gigavim.store.reader import EmbeddingStore

Paths = tuple[Path, ...]
Writer = Callable[["EmbeddingStore", Paths, OutputSettings], Mapping[str, Any] | None]
"""Writes a format's files; may return what the summary shall say of them."""


def write_results(
    store: "EmbeddingStore",
    files: Mapping[str, tuple[Path, ...]],
    settings: OutputSettings,
    *,
    advance: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Write the wanted formats; files there are replaced.

    Nothing but the store is looked at, so that a later conversion gives the same bytes.

    Args:
        store: the finished store of a slide.
        files: where to write, by format (see `formats.FORMATS`).
        settings: options of the formats.
        advance: called with 1 after each format.

    Returns:
        The summary.

    Raises:
        OutputError: a file cannot be written.
    """
    counts: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for kind, paths in files.items():
        if kind == "summary":
            continue
        started = time.perf_counter()
        counts |= WRITERS[kind](store, paths, settings) or {}
        seconds[f"write {kind}"] = round(time.perf_counter() - started, 3)
        if advance is not None:
            advance(1)
    summary = summary_of(store, counts=counts, seconds=seconds)
    if "summary" in files:
        write_summary(summary, files["summary"][0], overwrite=True)
        if advance is not None:
            advance(1)
    return summary


def summary_of(
    store: "EmbeddingStore",
    *,
    counts: Mapping[str, Any] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The summary of a store's slide, with what writers add to it."""
    facts = store.info.facts
    timings = {"seconds": {**facts.get("seconds", {}), **(seconds or {})}}
    return summarize(
        store.labels,
        store.frame,
        store.classes,
        class_pixels=store.info.class_pixels,
        **{**(counts or {}), **facts, **timings},
    )


def _geojson(store: "EmbeddingStore", paths: Paths, settings: OutputSettings) -> dict[str, Any]:
    asked = {key: getattr(settings, key) for key in ("min_area_um2", "simplify_um")}
    changed = {key: value for key, value in asked.items() if value}
    features = write_geojson(
        store.labels,
        store.frame,
        store.classes,
        paths[0],
        origin_xy_level0=None if settings.qupath_bounds else (0, 0),
        seed=store.info.slide.fingerprint,
        provenance=store.info.provenance | changed,
        options=PolygonOptions.in_um(store.frame, **asked),
        overwrite=True,
    )
    return {"features": features}


def _vector(store: "EmbeddingStore", paths: Paths, settings: OutputSettings, kind: str) -> None:
    from gigavim.outputs.vector import write_geopackage, write_geoparquet

    common: dict[str, Any] = {
        "options": PolygonOptions.in_um(
            store.frame, min_area_um2=settings.min_area_um2, simplify_um=settings.simplify_um
        ),
        "seed": store.info.slide.fingerprint,
        "overwrite": True,
    }
    if kind == "gpkg":
        common["made"] = str(store.info.provenance.get("made", ""))
    write = write_geopackage if kind == "gpkg" else write_geoparquet
    write(store.labels, store.frame, store.classes, paths[0], **common)


def _geotiff(store: "EmbeddingStore", paths: Paths, settings: OutputSettings) -> None:
    from gigavim.outputs.geotiff import write_geotiff

    write_geotiff(
        store.labels,
        store.frame,
        store.classes,
        paths[0],
        provenance=store.info.provenance,
        overwrite=True,
    )


def _ome_tiff(store: "EmbeddingStore", paths: Paths, settings: OutputSettings) -> None:
    name = store.info.slide.name
    write_ome_tiff(store.labels, store.frame, store.classes, paths[0], name=name, overwrite=True)


def _ome_zarr(store: "EmbeddingStore", paths: Paths, settings: OutputSettings) -> None:
    from gigavim.outputs.ome_zarr import write_ome_zarr
    from gigavim.store.slide import open_slide_of

    with open_slide_of(store, settings.slide) as slide:
        write_ome_zarr(
            slide,
            store.labels,
            store.frame,
            store.classes,
            paths[0],
            name=store.info.slide.name,
            version=settings.ngff,
        )


def _overlay(store: "EmbeddingStore", paths: Paths, settings: OutputSettings) -> None:
    write_overlay(store, store.labels, store.frame, store.classes, paths[0], overwrite=True)


def _areas(store: "EmbeddingStore", paths: Paths, settings: OutputSettings) -> None:
    write_areas(
        store.labels,
        store.frame,
        store.classes,
        paths[0],
        slide=store.info.slide.name,
        class_pixels=store.info.class_pixels,
        overwrite=True,
    )


def _h5(store: "EmbeddingStore", paths: Paths, settings: OutputSettings, style: str) -> None:
    from gigavim.outputs import h5

    writers = {"trident": h5.write_trident, "clam": h5.write_clam, "stamp": h5.write_stamp}
    writers[style](store, paths, pool=settings.pool)


def _anndata(store: "EmbeddingStore", paths: Paths, settings: OutputSettings) -> None:
    table = store.to_anndata(pool=settings.pool, lazy=True)
    with explained(paths[0]):
        table.write_h5ad(paths[0])


def _spatialdata(store: "EmbeddingStore", paths: Paths, settings: OutputSettings) -> None:
    from gigavim.outputs.spatial import write_spatialdata

    write_spatialdata(store, paths[0], pool=settings.pool)


WRITERS: dict[str, Writer] = {
    "ome-tiff": _ome_tiff,
    "ome-zarr": _ome_zarr,
    "geotiff": _geotiff,
    "geojson": _geojson,
    "geojson.gz": _geojson,
    "gpkg": partial(_vector, kind="gpkg"),
    "geoparquet": partial(_vector, kind="geoparquet"),
    "overlay": _overlay,
    "csv": _areas,
    "h5-trident": partial(_h5, style="trident"),
    "h5-clam": partial(_h5, style="clam"),
    "h5-stamp": partial(_h5, style="stamp"),
    "anndata": _anndata,
    "spatialdata": _spatialdata,
}
