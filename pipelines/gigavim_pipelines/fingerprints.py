"""When is a file still the same? Cheap answers for slides, full checksums for results."""

import errno
import hashlib
import os
import stat
from pathlib import Path

from gigavim.errors import SlideError
from gigavim_pipelines import remote
from gigavim_pipelines.entries import Entry, is_remote

SAMPLES = 64
SAMPLE_BYTES = 1 << 16


UNKNOWN = "?"


def check_readable(entry: Entry) -> None:
    """Find out, before anything waits for them, whether an entry's local files can be read.

    Raises:
        SlideError: one is missing, no regular file, or not to be read; the message says which.
    """
    for what, name in (("", entry.slide), ("the slide's mask, ", entry.mask)):
        if not name or is_remote(name):
            continue
        path = Path(name)
        try:
            mode = path.stat().st_mode
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                advice = "correct the manifest's column mask" if what else "was it moved?"
                raise SlideError(f"{what}{path}: does not exist; {advice}") from error
            raise
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise SlideError(f"{what}{path}: is no regular file (a pipe? a device?)")
        if not os.access(path, os.R_OK):
            raise PermissionError(errno.EACCES, f"{what}may not be read by this user", str(path))


def stamp(entry: Entry) -> str:
    """Sizes and times of change of an entry's files, and its mpp: cheap, and equal if unchanged.

    `UNKNOWN`, which says nothing, where there is a remote file or one is missing.
    """
    parts = [f"mpp {entry.mpp}"]
    for path in filter(None, (entry.slide, entry.mask)):
        if is_remote(path):
            return UNKNOWN
        try:
            stats = [file.stat() for file in _files(Path(path))]
        except OSError:
            return UNKNOWN
        latest = max((item.st_mtime_ns for item in stats), default=0)
        parts.append(f"{sum(item.st_size for item in stats)} bytes, {latest} ns")
    return "; ".join(parts)


def input_fingerprint(entry: Entry) -> str:
    """SHA-256 of what an entry's result depends on: the slide, its mask, its mpp.

    Of files larger than 4 MB, 64 stretches evenly spread are looked at, beside the size: enough for
    any file that was scanned, exported or cut anew.

    Raises:
        OSError: something cannot be read.
    """
    digest = hashlib.sha256(repr(entry.mpp).encode())
    for path in filter(None, (entry.slide, entry.mask)):
        digest.update(b"\0")
        if is_remote(path):
            digest.update(remote.fingerprint(path).encode())
            continue
        root = Path(path)
        for file in _files(root):
            name = file.relative_to(root).as_posix() if root.is_dir() else ""
            digest.update(f"{name}\0{_sampled(file)}\n".encode())
    return digest.hexdigest()


def same_input(entry: Entry, then: str, digest: str, *, unreadable: bool) -> bool:
    """Whether an entry's files are what they were when `stamp` gave `then`, or have the
    fingerprint `digest`; `unreadable` is the answer where they cannot be read.
    """
    now = stamp(entry)
    if now != UNKNOWN and now == then:
        return True
    try:
        return input_fingerprint(entry) == digest
    except OSError:
        return unreadable


def checksum(path: Path) -> str:
    """SHA-256 of a file; of a folder, that of its files' names and SHA-256s in order of name."""
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(item for item in path.rglob("*") if item.is_file()):
            name = file.relative_to(path).as_posix()
            digest.update(f"{checksum(file)}  {name}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def modified_ns(path: Path) -> int:
    """When a file, or the last changed of a folder's, was written."""
    return max((file.stat().st_mtime_ns for file in _files(path)), default=0)


def slide_bytes(entry: Entry) -> int:
    """Size of an entry's slide."""
    return (
        remote.size_bytes(entry.slide) if is_remote(entry.slide) else total_bytes(Path(entry.slide))
    )


def total_bytes(path: Path) -> int:
    """Size of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in _files(path))


def _files(path: Path) -> list[Path]:
    """The files that are one slide or result: a folder's, or MIRAX's with its data beside it."""
    if path.is_dir():
        return sorted(item for item in path.rglob("*") if item.is_file())
    companion = path.with_suffix("")
    if path.suffix.lower() == ".mrxs" and companion.is_dir():
        return [path, *_files(companion)]
    return [path]


def _sampled(path: Path) -> str:
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    size = facts.st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= SAMPLES * SAMPLE_BYTES:
            digest.update(file.read())
        else:
            for number in range(SAMPLES):
                file.seek(number * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
