"""Whether a folder still takes files: free space, quotas and limits, found out by trying."""

import os
from pathlib import Path
from tempfile import TemporaryFile

from gigavim.outputs.atomic import FULL

PROBE_BYTES = 1 << 22
"""A folder that has no room for so much is full."""
_CHUNK = bytes(1 << 20)
_MOST_WRITTEN = 1 << 26


def why_full(folder: Path, size_bytes: int = PROBE_BYTES) -> str | None:
    """Why a folder takes no file of a size (disk full, quota, limit), or None.

    It is tried: the file is made, without a name, and is gone when this returns.
    """
    try:
        with TemporaryFile(dir=folder, buffering=0) as file:
            if not _reserved(file.fileno(), size_bytes):
                for _ in range(0, min(size_bytes, _MOST_WRITTEN), len(_CHUNK)):
                    file.write(_CHUNK)
    except OSError as error:
        return FULL.get(error.errno or 0)
    return None


def _reserved(handle: int, size_bytes: int) -> bool:
    """Whether room could be had without writing; False where systems or disks do not offer that."""
    try:
        os.posix_fallocate(handle, 0, size_bytes)
    except AttributeError:
        return False
    except OSError as error:
        if error.errno in FULL:
            raise
        return False
    return True
