"""Whether a folder still takes files: free space, quotas and limits, found out by trying."""

import os
from pathlib import Path
from tempfile import TemporaryFile

from gigavim.outputs.atomic import FULL

PROBE_BYTES = 1 << 22
"""A folder that has no room for so much is full."""
_CHUNK = bytes(1 << 20)


def why_full(folder: Path, size_bytes: int = PROBE_BYTES) -> str | None:
    """Why a folder takes no file of a size (disk full, quota, limit), or None.

    It is tried: the file is made, without a name, and is gone when this returns.
    """
    try:
        with TemporaryFile(dir=folder, buffering=0) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size_bytes)
            else:
                for _ in range(0, size_bytes, len(_CHUNK)):
                    file.write(_CHUNK)
    except OSError as error:
        return FULL.get(error.errno or 0)
    return None
