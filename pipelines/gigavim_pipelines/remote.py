"""Slides behind URLs, through fsspec: listed where they are, fetched whole for the time of use."""

import posixpath
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gigavim.errors import SettingsError


def read_bytes(url: str) -> bytes:
    """The content of a small remote file; `OSError` if it cannot be read."""
    files, path = _open(url)
    content: bytes = files.cat_file(path)
    return content


def list_slides(url: str, is_slide: Callable[[str], bool]) -> list[str]:
    """URLs of the slides a URL stands for: one file, a glob's matches, or all below a folder.

    `is_slide` judges names below folders; a file named outright is taken as it is.

    Raises:
        SettingsError: the place cannot be reached, or does not exist.
    """
    files, path = _open(url)
    try:
        if any(mark in path for mark in "*?["):
            found = [name for name in files.glob(path) if is_slide(name)]
        elif files.isfile(path):
            found = [path]
        elif files.exists(path):
            found = [name for name in files.find(path) if _counts(name, path, is_slide)]
        else:
            raise SettingsError(f"{url}: does not exist.")
    except SettingsError:
        raise
    # Each file system raises errors of its own libraries.
    except Exception as error:
        raise SettingsError(f"{url}: cannot be listed: {_first_line(error)}") from error
    return [files.unstrip_protocol(name) for name in sorted(found)]


def exists(url: str) -> bool:
    """Whether there is such a file; yes where its server cannot be asked."""
    try:
        files, path = _open(url)
        return bool(files.exists(path))
    # Each file system raises errors of its own libraries.
    except Exception:
        return True


def fingerprint(url: str) -> str:
    """What changes when the file behind a URL does: its size with ETag or time of change."""
    files, path = _open(url)
    return str(files.ukey(path))


def size_bytes(url: str) -> int:
    """Size of a remote file, 0 where its server does not say."""
    files, path = _open(url)
    return int(files.size(path) or 0)


@contextmanager
def fetched(url: str, folder: Path) -> Iterator[Path]:
    """A local copy of a remote file under its own name, in `folder`, for the length of a block."""
    files, path = _open(url)
    with TemporaryDirectory(prefix="fetched-", dir=folder) as place:
        local = Path(place) / posixpath.basename(path)
        files.get_file(path, str(local))
        yield local


def _open(url: str) -> tuple[Any, str]:
    """A file system and the path in it."""
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        protocol = url.split("://", 1)[0]
        extra = " pip install 'gigavim[s3]'." if protocol == "s3" else ""
        raise SettingsError(
            f"{url}: {protocol}:// needs another package: {error}.{extra}"
        ) from error
    except ValueError as error:
        known = ", ".join(f"{name}://" for name in ("s3", "gs", "az", "http", "https", "sftp"))
        raise SettingsError(
            f"{url}: {error}. Such are {known} and what else fsspec knows; of a local folder write"
            " the path alone."
        ) from error
    # Listings are asked for anew: an archive may have changed since the last.
    files.invalidate_cache()
    return files, path


def _counts(name: str, root: str, is_slide: Callable[[str], bool]) -> bool:
    below = name.removeprefix(root).strip("/")
    return is_slide(name) and not any(part.startswith(".") for part in below.split("/"))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
