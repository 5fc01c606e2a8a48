"""SHA-256 of every file of a store, in the form that `sha256sum --check` reads."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gigavim.errors import StoreError
from gigavim.outputs.atomic import explained
from gigavim.store.layout import CHECKSUMS

log = logging.getLogger(__name__)

READERS = 2


def write_checksums(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Write the checksums of a finished store into it; those that are known are not made again.

    Raises:
        OutputError: the disk refuses.
    """
    digests = dict(known or {})
    with explained(folder / CHECKSUMS):
        names = list(_files(folder))
        missing = [name for name in names if name not in digests]
        with ThreadPoolExecutor(READERS, thread_name_prefix="gigavim-checksums") as pool:
            made = pool.map(file_checksum, [folder / name for name in missing])
            digests |= dict(zip(missing, made, strict=True))
        lines = [f"{digests[name]}  {name}\n" for name in names]
        (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def read_checksums(folder: Path) -> dict[str, str]:
    """SHA-256 by file name, relative to the store.

    Raises:
        StoreError: they are missing or damaged.
    """
    path = folder / CHECKSUMS
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{path}: the store's checksums cannot be read") from error
    return _parsed(text, str(path))


def _parsed(text: str, source: str) -> dict[str, str]:
    found = {}
    for line in text.splitlines():
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise StoreError(f"{source}: is damaged: {line[:80]!r} is no checksum")
        found[name] = digest
    return found


def missing_files(location: str, storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """Which of the files that a store's checksums name are not there.

    None of them, too, where there are no checksums yet, or where what is there cannot be listed:
    some web servers and buckets do not tell. zarr reads a chunk without a file as zeros.

    Args:
        location: a folder, or a URL that fsspec takes with `storage_options`.

    Raises:
        StoreError: the checksums are damaged, or the storage fails.
    """
    if "://" not in location:
        folder = Path(location)
        if not (folder / CHECKSUMS).is_file():
            return []
        return [name for name in read_checksums(folder) if not (folder / name).is_file()]
    import fsspec

    system, root = fsspec.url_to_fs(location, **(storage_options or {}))
    system.invalidate_cache(root)  # what was not there before may be by now
    try:
        text = system.cat_file(f"{root}/{CHECKSUMS}").decode()
        there = {
            str(name).strip("/").removeprefix(f"{root.strip('/')}/") for name in system.find(root)
        }
    except (FileNotFoundError, PermissionError, NotImplementedError) as error:
        log.debug("%s: not looked whether all files are there (%s)", location, error)
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{location}: its {CHECKSUMS} cannot be read ({error})") from error
    if CHECKSUMS not in there:  # it is: so the listing is not one of files
        log.debug("%s: not looked whether all files are there (no listing)", location)
        return []
    return [name for name in _parsed(text, location) if name not in there]


def check_files(
    folder: Path, *, advance: Callable[[float], object] = lambda files: None
) -> list[str]:
    """What is wrong with a store's files: one line each; nothing where all is well.

    Raises:
        StoreError: there are no checksums.
    """
    recorded = read_checksums(folder)
    problems = [
        f"{name}: is not part of the store" for name in _files(folder) if name not in recorded
    ]
    for name, digest in recorded.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: is missing")
        else:
            try:
                if file_checksum(path) != digest:
                    problems.append(f"{name}: has changed")
            except OSError as error:
                problems.append(f"{name}: cannot be read ({error.strerror})")
        advance(1)
    return problems


def _files(folder: Path) -> Iterator[str]:
    """Files of a store in a fixed order, relative to it."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != CHECKSUMS:
            yield name


def file_checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
