"""From an embedding store to other formats."""

from pathlib import Path

from gigavim.config import Settings
from gigavim.errors import SettingsError, StoreError
from gigavim.names import as_text
from gigavim.outputs.atomic import OutputSet
from gigavim.outputs.formats import FORMATS, result_paths
from gigavim.outputs.results import write_results
from gigavim.progress import Progress, Silent
from gigavim.results import Result
from gigavim.store.checksums import check_files
from gigavim.store.layout import SUFFIX
from gigavim.store.reader import EmbeddingStore


def convert(
    path: str | Path,
    *,
    settings: Settings | None = None,
    stem: str | None = None,
    progress: Progress | None = None,
) -> Result:
    """Write a store's slide in other formats, as `segment` or `embed` would have at once.

    Args:
        path: the store's folder, or a URL (see `gigavim.open_embeddings`).
        settings: their `output` section says which formats, where and how.
        stem: first part of the results' names; that of the store if absent.
        progress: told of each stage.

    Returns:
        The written files and the summary. All appear whole or not at all; existing ones are
        replaced only with `output.overwrite`.

    Raises:
        StoreError: there is no such store, or it is damaged.
        SettingsError: no format is named, or one needs a library that is not installed.
        OutputError: results cannot be written, or are there already.
    """
    settings, progress = settings or Settings(), progress or Silent()
    if not settings.output.formats:
        known = ", ".join(name for name, entry in FORMATS.items() if not entry.by_itself)
        raise SettingsError(f"say what to convert {as_text(path)} to, with --format: {known}")
    store = EmbeddingStore.open(path)
    targets = result_paths(
        Path(settings.output.directory),
        stem or store_stem(path),
        settings.output.formats,
        georeferenced=store.frame.georeference is not None,
    )
    with OutputSet(overwrite=settings.output.overwrite) as outputs:
        parts = targets.reserve(outputs)
        with progress.stage("write", len(targets.formats), "files") as advance:
            try:
                summary = write_results(store, parts, settings.output, advance=advance)
            except (ValueError, RuntimeError) as error:
                _raise_if_damaged(store.location, error)
                raise
    return Result(Path(store.info.slide.path), targets.paths, summary)


def _raise_if_damaged(location: str, error: Exception) -> None:
    """Say that a local store is damaged, if that is why it could not be read.

    Raises:
        StoreError: a file is not what it was.
    """
    if "://" in location:
        return
    problems = check_files(Path(location))
    if problems:
        raise StoreError(
            f"{location}: is damaged: {problems[0]}; `gigavim verify` lists all that is"
        ) from error


def store_stem(path: str | Path) -> str:
    """The slide's name in a store's: `a` of `a.embeddings.zarr`."""
    name = str(path).rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
    if name in ("", ".", ".."):
        name = Path(path).resolve().name
    return name.removesuffix(SUFFIX).removesuffix(".zarr") or name
