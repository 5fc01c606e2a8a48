"""All results of a slide, each by its writer, all from its store."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gigavim.config import OutputSettings
from gigavim.outputs.geojson import write_geojson
from gigavim.outputs.ome_tiff import write_ome_tiff
from gigavim.outputs.overlay import write_overlay
from gigavim.outputs.summary import summarize, write_summary

if TYPE_CHECKING:
    from gigavim.store.reader import EmbeddingStore

Writer = Callable[["EmbeddingStore", tuple[Path, ...], OutputSettings], Mapping[str, Any] | None]
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
        store.labels, store.frame, store.classes, **{**(counts or {}), **facts, **timings}
    )


def _geojson(
    store: "EmbeddingStore", paths: tuple[Path, ...], settings: OutputSettings
) -> dict[str, Any]:
    features = write_geojson(
        store.labels,
        store.frame,
        store.classes,
        paths[0],
        origin_xy_level0=None if settings.qupath_bounds else (0, 0),
        seed=store.info.slide.fingerprint,
        provenance=store.info.provenance,
        overwrite=True,
    )
    return {"features": features}


def _geotiff(store: "EmbeddingStore", paths: tuple[Path, ...], settings: OutputSettings) -> None:
    from gigavim.outputs.geotiff import write_geotiff

    write_geotiff(
        store.labels,
        store.frame,
        store.classes,
        paths[0],
        provenance=store.info.provenance,
        overwrite=True,
    )


def _ome_tiff(store: "EmbeddingStore", paths: tuple[Path, ...], settings: OutputSettings) -> None:
    name = store.info.slide.name
    write_ome_tiff(store.labels, store.frame, store.classes, paths[0], name=name, overwrite=True)


def _overlay(store: "EmbeddingStore", paths: tuple[Path, ...], settings: OutputSettings) -> None:
    write_overlay(store, store.labels, store.frame, store.classes, paths[0], overwrite=True)


WRITERS: dict[str, Writer] = {
    "ome-tiff": _ome_tiff,
    "geotiff": _geotiff,
    "geojson": _geojson,
    "geojson.gz": _geojson,
    "overlay": _overlay,
}
