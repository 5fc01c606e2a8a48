"""Files, and folders that are one result (zarr), that appear whole or not at all.

A file is written under a temporary name in its own folder, synced, and renamed at the end; several
files that belong together are renamed together. Whatever fails on the way leaves the folder as it
was, an existing good result included.
"""

import contextlib
import errno
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import uuid4

from gigavim.errors import OutputError

logger = logging.getLogger(__name__)

FULL = {
    code: text
    for name, text in (
        ("ENOSPC", "no space left on the disk"),
        ("EDQUOT", "the disk quota is used up"),
        ("EFBIG", "the file is larger than the file system or a limit allows"),
    )
    if (code := getattr(errno, name, None)) is not None
}
"""Errors of a file system that takes no more, and what they mean."""
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
SYNCS = 4
"""Files that a disk is asked to take at a time."""
_SCARCE_BYTES = 1 << 20
"""Libraries that hide the errno (GDAL does) are taken to have met a full disk below this."""

_PARTIAL = re.compile(r"^(\.partial-[0-9a-f]{8}-)+")


def output_error(path: Path, error: OSError) -> OutputError:
    """The error to show for `error`, met while writing `path`: the file, the reason, the remedy."""
    remedy = "choose another output folder"
    if error.errno in FULL:
        reason = FULL[error.errno]
        remedy = f"free some space or {remedy}"
    elif error.errno in _DENIED or isinstance(error, PermissionError):
        reason = f"writing to {path.parent} is not permitted"
        remedy = f"change its permissions or {remedy}"
    elif isinstance(error, FileExistsError | NotADirectoryError):
        reason = f"{path.parent} is not a folder"
    elif error.errno is None and _free_bytes(path.parent) < _SCARCE_BYTES:
        reason = FULL[errno.ENOSPC]
        remedy = f"free some space or {remedy}"
    else:
        reason = error.strerror or str(error) or type(error).__name__
        if error.errno == errno.EIO:
            remedy = f"check the disk, or {remedy}"
    shown = path.with_name(_PARTIAL.sub("", path.name))
    return OutputError(f"{shown}: cannot be written: {reason}; {remedy}")


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn every `OSError` of the block into an `OutputError` that names `path`."""
    try:
        yield
    except OSError as error:
        raise output_error(path, error) from error


class OutputSet:
    """Several files and folders that appear together at the end of a `with` block, or not at all.

    Args:
        overwrite: replace what exists; without it an existing result is an error, before any work
            is done. Of folders only those that are zarr hierarchies are ever replaced.

    Raises:
        OutputError: a file exists, or the disk refuses (full, no permission, no such folder).
    """

    def __init__(self, *, overwrite: bool = False) -> None:
        self._overwrite = overwrite
        self._temporary: dict[Path, Path] = {}
        self._synced: set[Path] = set()
        self._made_folders: list[Path] = []

    def path(self, path: str | Path) -> Path:
        """The temporary path to write to; it ends in the name of `path`, suffixes and all."""
        return self._reserve(Path(path).absolute(), is_folder=False)

    def folder(self, path: str | Path) -> Path:
        """A temporary, empty folder that becomes `path`, named as `path` is."""
        return self._reserve(Path(path).absolute(), is_folder=True)

    def synced(self, temporary: Path) -> None:
        """Take the caller's word that all of a temporary path is on the disk, and stays so."""
        self._synced.add(temporary)

    def _reserve(self, final: Path, *, is_folder: bool) -> Path:
        if final not in self._temporary:
            with explained(final):
                self._refuse_existing(final, is_folder=is_folder)
                self._make_folder(final.parent)
                temporary = final.with_name(f".partial-{uuid4().hex[:8]}-{final.name}")
                if is_folder:
                    temporary.mkdir()
                else:
                    temporary.touch(exist_ok=False)
            self._temporary[final] = temporary
        return self._temporary[final]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._commit()
        finally:
            self._clear()
        if isinstance(error, OSError) and self._concerns_us(error):
            raise output_error(next(iter(self._temporary)), error) from error

    def _refuse_existing(self, final: Path, *, is_folder: bool) -> None:
        if final.is_dir() and not (is_folder and _is_zarr(final)):
            raise OutputError(f"{final}: is a folder; choose another output name")
        if not self._overwrite and os.path.lexists(final):
            raise OutputError(f"{final}: exists already; use --overwrite or another output folder")

    def _make_folder(self, folder: Path) -> None:
        missing = []
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            self._made_folders.append(path)

    def _concerns_us(self, error: OSError) -> bool:
        """An input that cannot be read is no error of the output: it names another file."""
        if error.filename is None:
            return bool(self._temporary) and error.errno in FULL
        named = Path(os.fsdecode(error.filename)).absolute()
        return any(path in (named, *named.parents) for path in self._temporary.values())

    def _commit(self) -> None:
        for final, temporary in self._temporary.items():
            if temporary not in self._synced:
                with explained(final):
                    sync_tree(temporary)
        done: list[tuple[Path, Path | None]] = []
        try:
            for final, temporary in self._temporary.items():
                self._refuse_existing(final, is_folder=temporary.is_dir())
                with explained(final):
                    done.append((final, _set_aside(final)))
                    temporary.replace(final)
        except BaseException:
            for final, backup in reversed(done):
                _restore(final, backup)
            raise
        for _, backup in done:
            if backup is not None:
                _remove(backup)
        for folder in {final.parent for final in self._temporary}:
            sync(folder)
        self._made_folders.clear()

    def _clear(self) -> None:
        for temporary in self._temporary.values():
            try:
                _remove(temporary)
            except OSError as error:
                logger.warning("%s: could not be removed: %s", temporary, error)
        for folder in reversed(self._made_folders):
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def atomic_path(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """The temporary path to write one file to; renamed to `path` when the block ends well.

    Raises:
        OutputError: as `OutputSet`, and for every `OSError` of the block.
    """
    with explained(Path(path)), OutputSet(overwrite=overwrite) as outputs:
        yield outputs.path(path)


def _free_bytes(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return _SCARCE_BYTES


def _is_zarr(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("zarr.json", ".zgroup"))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        with ThreadPoolExecutor(SYNCS, "gigavim-remove") as pool:  # likewise
            files = (item for item in _tree(path, ()) if not item.is_dir() or item.is_symlink())
            for _ in pool.map(Path.unlink, files):
                pass
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_tree(path: Path, *, but: Collection[Path] = ()) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk.

    What is in `but`, folders with all that is in them, is on it already.
    """
    with ThreadPoolExecutor(SYNCS, "gigavim-sync") as pool:  # a disk takes many at a time
        for _ in pool.map(sync, _tree(path, but)):
            pass


def _tree(path: Path, but: Collection[Path]) -> Iterator[Path]:
    if path.is_dir() and not path.is_symlink():
        for item in path.iterdir():
            if item not in but:
                yield from _tree(item, but)
    yield path


def sync(path: Path, *, drop: bool = False) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk.

    Args:
        drop: give the memory back in which the system keeps a file's content for those who read
            it. What is written next then takes no new memory, which has to be fetched and cleared.
    """
    if os.name == "nt" and path.is_dir():
        return
    # Windows syncs only what is open for writing.
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
        if drop and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        # Some network file systems cannot sync a folder; a file must be.
        if not path.is_dir():
            raise
        logger.debug("%s: not synced: %s", path, error)
    finally:
        os.close(handle)


def _set_aside(final: Path) -> Path | None:
    """A second name for the existing file, under which it survives until all is renamed."""
    if not os.path.lexists(final):
        return None
    backup = final.with_name(f".previous-{uuid4().hex[:8]}-{final.name}")
    try:
        os.link(final, backup, follow_symlinks=False)
    except (OSError, NotImplementedError):  # folders, and file systems without hard links
        final.rename(backup)
    return backup


def _restore(final: Path, backup: Path | None) -> None:
    try:
        if backup is None or final.is_dir():
            _remove(final)
        if backup is not None:
            backup.replace(final)
    except OSError as error:
        logger.warning("%s: could not be restored from %s: %s", final, backup, error)
