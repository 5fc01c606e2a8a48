"""From what a user points at (folder, glob, manifest, URL, slide) to a list of slides."""

import difflib
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from gigavim.errors import SettingsError, SlideError
from gigavim.names import result_stem
from gigavim_pipelines import remote
from gigavim_pipelines.entries import Entry, is_remote, safe_id
from gigavim_pipelines.manifest import MANIFEST_SUFFIXES, read_manifest
from gigavim_pipelines.naming import known_names, name_slides

SLIDE_SUFFIXES = frozenset(
    (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".czi",
     ".dcm", ".qptiff", ".zarr", ".jp2")
)  # fmt: skip
PICTURE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp"))
"""Slides only where a folder holds nothing else: beside slides they are thumbnails and masks."""
RESULT_SUFFIXES = (".labels.ome.tif", ".labels.tif")


def discover(
    archives: Sequence[str], *, suffixes: Sequence[str] = (), out: Path | None = None
) -> list[Entry]:
    """List the slides of archives, each with the id that it keeps (see `naming`).

    Args:
        archives: folders (searched through and through), globs, manifests (csv, tsv, parquet),
            slides, or fsspec URLs of any of these.
        suffixes: in folders, take files of these names' endings only, such as ".svs".
        out: the folder of the results, which is not searched, and whose ids stay.

    Returns:
        The slides in the order found, each once, each with an id of its own.

    Raises:
        SettingsError: an archive does not exist, holds no slides, or is a manifest with errors.
        OutputError: a ledger in `out` cannot be read.
    """
    wanted = frozenset(f".{suffix.lstrip('.').lower()}" for suffix in suffixes)
    found: list[Entry] = []
    for archive in archives:
        entries = list(_entries(archive, wanted, out))
        if not entries:
            raise SettingsError(
                f"{archive}: no slides found there. Slides are files that end in "
                f"{', '.join(sorted(wanted or SLIDE_SUFFIXES))}, and folders of DICOM files;"
                " other endings are taken with --wsi-ext."
            )
        found += entries
    return name_slides(found, known_names(out) if out is not None else None)


def _entries(archive: str, wanted: frozenset[str], leave_out: Path | None) -> Iterator[Entry]:
    if is_remote(archive):
        yield from _remote_entries(archive, wanted)
        return
    path = Path(archive)
    if path.is_file() and path.suffix.lower() in MANIFEST_SUFFIXES:
        yield from read_manifest(path)
    elif path.is_dir() and not _is_slide_folder(path):
        yield from map(_entry, slides_below(path, wanted, leave_out))
    elif os.path.lexists(path):
        yield _entry(path)
    elif glob.has_magic(archive):
        matches = map(Path, sorted(glob.glob(archive, recursive=True)))  # noqa: PTH207
        for match in matches:
            if leave_out is None or not match.resolve().is_relative_to(leave_out.resolve()):
                yield _entry(match)
    else:
        raise SettingsError(f"{archive}: does not exist{_near(path)}.")


def slides_below(
    folder: Path, wanted: frozenset[str] = frozenset(), leave_out: Path | None = None
) -> list[Path]:
    """The slides in a folder and its subfolders, sorted; hidden ones and results are left out."""
    skipped = set() if leave_out is None else {leave_out.resolve()}
    files = list(_walk(folder, skipped))
    if wanted:
        return sorted(file for file in files if file.name.lower().endswith(tuple(wanted)))
    slides = [file for file in files if is_slide_name(file.name) or file.is_dir()]
    pictures = [file for file in files if file.suffix.lower() in PICTURE_SUFFIXES]
    return sorted(slides or pictures)


def is_slide_name(name: str) -> bool:
    """Whether a file's name is that of a slide, and not of a result of ours."""
    lower = name.lower()
    ending = PurePosixPath(lower).suffix
    return ending in SLIDE_SUFFIXES and not lower.endswith(RESULT_SUFFIXES)


def _walk(folder: Path, skipped: set[Path]) -> Iterator[Path]:
    """Files below, and folders that are one slide, which are not entered.

    `skipped` are folders not to be searched, resolved; each one searched joins them, for links may
    lead back to it.
    """
    skipped.add(folder.resolve())
    items = sorted(_items(folder))
    # The data of MIRAX slides lie in a folder of the slide's name, which holds no slides.
    companions = {item.stem for item in items if item.suffix.lower() == ".mrxs"}
    for item in items:
        if item.name.startswith("."):
            continue
        if not item.is_dir():
            yield item
        elif item.resolve() in skipped:
            continue
        elif _is_slide_folder(item):
            yield item
        elif item.name not in companions:
            yield from _walk(item, skipped)


def _is_slide_folder(folder: Path) -> bool:
    """An OME-Zarr, or a folder of DICOM files and nothing else that could be a slide."""
    items = _items(folder)
    if {item.name for item in items} & {"zarr.json", ".zattrs", ".zgroup"}:
        return True
    suffixes = {
        item.suffix.lower() for item in items if not item.name.startswith(".") and not item.is_dir()
    }
    return suffixes & SLIDE_SUFFIXES == {".dcm"}


def _items(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise SlideError(
            f"{folder}: cannot be searched: {error.strerror}. Make it readable, or name the"
            " folders beside it one by one."
        ) from error


def _entry(path: Path) -> Entry:
    return Entry(id=safe_id(result_stem(path)), slide=str(path.absolute()))


def _remote_entries(url: str, wanted: frozenset[str]) -> Iterator[Entry]:
    if Path(url).suffix.lower() in MANIFEST_SUFFIXES:
        yield from read_manifest(url)
        return
    for found in remote.list_slides(url, lambda name: _is_wanted(name, wanted)):
        yield Entry(id=safe_id(result_stem(Path(found))), slide=found)


def _is_wanted(name: str, wanted: frozenset[str]) -> bool:
    return name.lower().endswith(tuple(wanted)) if wanted else is_slide_name(name)


def _near(path: Path) -> str:
    try:
        names = [item.name for item in path.parent.iterdir()]
    except OSError:
        return f", nor does the folder {path.parent}"
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""
