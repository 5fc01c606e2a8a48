"""From a slide's path to its embedding store."""

from pathlib import Path

from gigavim.config import Settings
from gigavim.names import result_stem
from gigavim.outputs.atomic import OutputSet
from gigavim.outputs.formats import result_paths
from gigavim.outputs.results import summary_of, write_results
from gigavim.pipeline import Stopwatch, open_input, prepare, scratch_folder, scratch_parent, swept
from gigavim.progress import Progress, Silent
from gigavim.results import Embedding
from gigavim.store.build import Content, build_store
from gigavim.store.crew import Crew
from gigavim.store.seal import Seal


def embed(
    path: str | Path,
    *,
    settings: Settings | None = None,
    stem: str | None = None,
    progress: Progress | None = None,
) -> Embedding:
    """Embed a slide and write a store of its embeddings and its label map.

    Args:
        path: a slide's file, or a folder that is one slide.
        settings: as in gigavim.toml; the defaults if absent. `output.formats` are written beside
            the store, as `gigavim convert` would write them.
        stem: first part of the results' names; the slide's own if absent.
        progress: told of each stage.

    Returns:
        The store's path (`outputs["store"]`), other files, and the summary. All appear whole or
        not at all; existing ones are replaced only with `output.overwrite`.

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
    targets = result_paths(
        Path(settings.output.directory),
        stem or result_stem(path),
        ["store", *settings.output.formats],
        georeferenced=slide.georeference is not None,
    )
    with slide, OutputSet(overwrite=settings.output.overwrite) as outputs:
        parts = targets.reserve(outputs)
        (folder,) = parts.pop("store")
        job = prepare(slide, settings, scratch=scratch_parent(settings), watch=watch)
        content = Content(
            embeddings=True,
            dtype=settings.embedding.dtype,
            probabilities=settings.embedding.probabilities,
        )
        with (
            scratch_folder(settings) as scratch,
            swept(job, settings, scratch, watch, progress) as run,
        ):
            seal = Seal(folder, keep=bool(parts))
            store = build_store(
                folder, job, run, settings, content, watch=watch, progress=progress, seal=seal
            )
        with Crew(1) as crew:
            crew.do(seal.finish)  # while files are made
            if not parts:
                summary = summary_of(store)
            else:
                with progress.stage("write", len(targets.formats) - 1, "files") as advance:
                    summary = write_results(store, parts, settings.output, advance=advance)
        outputs.synced(folder)
    return Embedding(path, targets.paths, summary)
