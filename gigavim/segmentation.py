"""From a slide's path to its maps."""

from pathlib import Path

from gigavim.config import Settings
from gigavim.engine.plan import Plan
from gigavim.names import result_stem
from gigavim.outputs.atomic import OutputSet
from gigavim.outputs.formats import needs_embeddings, result_paths
from gigavim.outputs.results import write_results
from gigavim.pipeline import Stopwatch, open_input, prepare, scratch_folder, scratch_parent, swept
from gigavim.progress import Progress, Silent
from gigavim.results import Segmentation
from gigavim.store.build import Content, build_store


def segment(
    path: str | Path,
    *,
    settings: Settings | None = None,
    stem: str | None = None,
    progress: Progress | None = None,
) -> Segmentation:
    """Segment a slide and write its maps.

    Args:
        path: a slide's file, or a folder that is one slide.
        settings: as in gigavim.toml; the defaults if absent.
        stem: first part of the results' names; the slide's own if absent.
        progress: told of each stage.

    Returns:
        The written files and the summary. Files appear whole or not at all; existing ones are
        replaced only with `output.overwrite`.

    Raises:
        SlideError: the slide cannot be used (see `gigavim.errors`).
        ModelError: the model cannot be used, or not for this slide.
        ResourceError: it does not fit the memory or disk allowed.
        OutputError: results cannot be written, or are there already.
    """
    path, settings, progress = Path(path), settings or Settings(), progress or Silent()
    watch = Stopwatch()
    with watch.stage("open"):
        slide = open_input(path, settings)
    georeferenced = slide.georeference is not None
    usual = ["geotiff" if georeferenced else "ome-tiff", "geojson", "overlay"]
    targets = result_paths(
        Path(settings.output.directory),
        stem or result_stem(path),
        [*(settings.output.formats or usual), "summary"],
        georeferenced=georeferenced,
    )
    with slide, OutputSet(overwrite=settings.output.overwrite) as outputs:
        parts = targets.reserve(outputs)
        job = prepare(
            slide,
            settings,
            scratch=scratch_parent(settings),
            watch=watch,
            keeps_tokens=needs_embeddings(targets.formats),
        )
        with scratch_folder(settings) as scratch:
            with swept(job, settings, scratch, watch, progress) as run:
                content = Content(
                    embeddings=needs_embeddings(targets.formats),
                    dtype=settings.embedding.dtype,
                )
                store = build_store(
                    scratch / "store", job, run, settings, content, watch=watch, progress=progress
                )
            with progress.stage("write", len(targets.formats), "files") as advance:
                summary = write_results(store, parts, settings.output, advance=advance)
    return Segmentation(path, targets.paths, summary)


def plan_segmentation(path: str | Path, settings: Settings | None = None) -> Plan:
    """Say what segmenting a slide would take, without doing it; errors as in `segment`."""
    settings = settings or Settings()
    with open_input(Path(path), settings) as slide:
        keeps_tokens = needs_embeddings(settings.output.formats)
        return prepare(
            slide, settings, scratch=None, watch=Stopwatch(), keeps_tokens=keeps_tokens
        ).plan
