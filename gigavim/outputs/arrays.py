"""Numbers into zarr arrays on the local disk, by TensorStore.

Arrays are made and read by zarr. To write them with it takes several times as long as to compress
them: it hands every chunk from thread to thread, each time waiting for Python's lock, which the
code that makes the numbers holds. TensorStore compresses and writes on threads of its own.
"""

import errno
import functools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

if TYPE_CHECKING:
    import tensorstore
    import zarr

THREADS = 2
OS_ERROR = re.compile(r"os_error_code='(\d+)'")
STATUS = re.compile(r"[A-Z_]+: ")
"""How TensorStore's errors of storage begin; others are errors of the caller."""
NAMED_FILE = re.compile(r'.* local file "([^"]+)":? *(.*)')
DETAILS = re.compile(r" *\[[a-z ]+[a-z_]*='.*")
ERRORS = (ValueError, RuntimeError, KeyError, PermissionError)


class ArrayWriter:
    """Writes regions of one array; safe on several threads, each region best on whole shards.

    Chunks that hold nothing but the fill value are left out, as zarr does.

    Args:
        array: on the local disk.
    """

    def __init__(self, array: "zarr.Array[Any]") -> None:
        from zarr.storage import LocalStore

        if not isinstance(array.store, LocalStore):
            raise ValueError(f"{array} is not on a local disk")
        self.path = Path(array.store.root) / array.path
        self._key = array.metadata.encode_chunk_key
        try:
            self._target = _opened(self.path)
        except ERRORS as error:
            raise _os_error(error, self.path) from error

    def write(self, where: Any, values: npt.NDArray[Any]) -> None:
        """Write a region, given as an index by slices or `...`; done when this returns.

        Raises:
            OSError: the disk refuses.
            ValueError: the values do not fit the region.
        """
        try:
            self._target[where].write(values, can_reference_source_data_indefinitely=True).result()
        except ERRORS as error:
            raise _os_error(error, self.path) from error

    def file(self, *place: int) -> Path:
        """The file of a shard (a chunk, where there are no shards), by its place among them.

        There is none where it holds nothing but the fill value.
        """
        return self.path / self._key(place)


def write_array(array: "zarr.Array[Any]", values: npt.NDArray[Any]) -> None:
    """Write all of an array.

    Raises:
        OSError: the disk refuses.
    """
    ArrayWriter(array).write(..., values)


def _opened(path: Path) -> "tensorstore.TensorStore":
    import tensorstore

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": os.fspath(path)}}
    return tensorstore.open(spec, open=True, context=_context()).result()


@functools.cache
def _context() -> "tensorstore.Context":
    """The threads that all arrays share: more of them would only take each other's cores."""
    import tensorstore

    threads = {"limit": THREADS}
    return tensorstore.Context(
        {
            "file_io_sync": False,  # results are synced as a whole before they are renamed
            "file_io_concurrency": threads,
            "data_copy_concurrency": threads,
        }
    )


def _os_error(error: Exception, path: Path) -> OSError:
    """The system's own error, whose number TensorStore tells in its message, or what it tells.

    Raises:
        Exception: `error` itself, where it is none of storage.
    """
    text = str(error)
    if found := OS_ERROR.search(text):
        number = int(found.group(1))
        return OSError(number, os.strerror(number), str(path))
    if not STATUS.match(text):
        raise error
    # The folder has a temporary name, which nobody knows.
    told = DETAILS.sub("", " ".join(text.split())).replace(str(path), path.name)
    reason = NAMED_FILE.sub(r"\1: \2", told) if NAMED_FILE.match(told) else STATUS.sub("", told, 1)
    return OSError(errno.EIO, reason, str(path))
