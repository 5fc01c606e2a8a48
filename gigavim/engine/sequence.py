"""Where the residual stream lives: device memory, RAM, or a memory-mapped file."""

import errno
import functools
import mmap
import os
import tempfile
import weakref
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from gigavim.engine.memory import format_bytes
from gigavim.errors import OutputError, ResourceError

Location = Literal["device", "ram", "disk"]

RELEASE_BYTES = 32 << 20
"""What may be touched of a mapped file before its pages are handed back."""
_PIECE = 16 << 20


class TokenSequence:
    """The residual stream, (length, width) float32, uninitialised at first.

    Rows are addressed by int64 positions in the sequence. Close it, or use it as a context manager:
    the scratch file has no name from the start, so nothing is left behind even if the process dies.

    Args:
        location: "device" is the memory of `device`; "ram" is host memory (page-locked where
            `device` is a GPU, so that it can fetch rows by itself); "disk" a file in `scratch_dir`.
        device: the device that computes.
        scratch_dir: an existing folder; the system's temporary folder if absent.

    Raises:
        ResourceError: the memory or the disk space is not there.
        OutputError: no file can be made in `scratch_dir`.
    """

    def __init__(
        self,
        length: int,
        width: int,
        *,
        location: Location = "ram",
        device: torch.device | str = "cpu",
        scratch_dir: Path | None = None,
    ) -> None:
        self.location: Location = location
        self._map: mmap.mmap | None = None
        self._touched = 0
        device = torch.device(device)
        if location == "disk" and length * width > 0:
            self._map = _map_scratch(length * width * 4, scratch_dir)
            self._data = torch.frombuffer(self._map, dtype=torch.float32).view(length, width)
        else:
            self._data = _allocate(length, width, device if location == "device" else None)
        pinned = location == "ram" and device.type == "cuda"
        self._unpin = weakref.finalize(self, _pin(self._data)) if pinned else None

    @property
    def length(self) -> int:
        """Tokens."""
        return self._data.shape[0]

    @property
    def width(self) -> int:
        """D, the numbers per token."""
        return self._data.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the rows lie (the CPU for "ram" and "disk")."""
        return self._data.device

    def __len__(self) -> int:
        return self.length

    def rows(self, start: int, stop: int) -> Tensor:
        """A writable, contiguous view of rows start..stop-1, (T, D), where they lie.

        Raises:
            IndexError: the range is not within the sequence.
        """
        if not 0 <= start <= stop <= self.length:
            raise IndexError(f"rows {start}:{stop} of a sequence of {self.length} tokens")
        return self._data[start:stop]

    def load(self, start: int, stop: int, device: torch.device) -> Tensor:
        """Rows start..stop-1 on `device`: the view itself if they lie there, else a copy."""
        return self.rows(start, stop).to(device, non_blocking=True)

    def store(self, start: int, rows: Tensor) -> None:
        """Write back what `load` gave: nothing to do where that was the view itself.

        A copy from a GPU is queued on its current stream: synchronize before the CPU reads.
        """
        target = self.rows(start, start + rows.shape[0])
        if target.data_ptr() != rows.data_ptr():
            target.copy_(rows, non_blocking=True)

    def scatter(self, index: Tensor, rows: Tensor) -> None:
        """Row index[i] becomes rows[i]: index (n,) int64 without repeats, rows (n, D)."""
        index, rows = index.to(self.device), rows.to(self.device, torch.float32)
        self._data.index_copy_(0, index, rows)
        self._touch(len(rows) * max(self.width * 4, mmap.PAGESIZE))  # at worst a page each

    def gather(self, index: Tensor) -> Tensor:
        """Rows at index (n,) int64, (n, D), a copy that lies where the sequence does."""
        rows = self._data.index_select(0, index.to(self.device))
        self._touch(len(rows) * max(self.width * 4, mmap.PAGESIZE))  # at worst a page each
        return rows

    def means(self, index: Tensor, starts: Tensor) -> Tensor:
        """Means of groups of rows, (groups, D); zero of an empty group.

        Args:
            index: (n,) int64 rows, group after group.
            starts: (groups,) int64, where in `index` each group begins.
        """
        index, starts = index.to(self.device), starts.to(self.device)
        means = F.embedding_bag(index, self._data, starts, mode="mean")
        self._touch(len(index) * max(self.width * 4, mmap.PAGESIZE))  # at worst a page each
        return means

    def prefetch(self, start: int, stop: int) -> None:
        """Ask the system to begin reading mapped rows that are needed soon."""
        start, stop = max(0, start), min(stop, self.length)
        if self._map is None or start >= stop or not hasattr(mmap, "MADV_WILLNEED"):
            return
        row_bytes = self.width * 4
        first = start * row_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_WILLNEED, first, stop * row_bytes - first)

    def release(self, start: int, stop: int) -> None:
        """Count mapped rows as used; the memory of all is given back whenever 32 MB have been.

        Values stay: the mapping is shared, so changed pages are in the system's page cache on their
        way to disk. All pages go at once because a touch may map more than was touched.
        """
        self._touch((stop - start) * self.width * 4)

    def close(self) -> None:
        """Free the memory or the disk space; the sequence is then empty."""
        if self._unpin is not None:
            self._unpin()
        self._data = self._data.new_empty(0, self.width)
        self._map = None  # unmapped as soon as no view of it is left

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _touch(self, size: int) -> None:
        self._touched += size
        if self._map is not None and self._touched >= RELEASE_BYTES:
            self._touched = 0
            if hasattr(mmap, "MADV_DONTNEED"):  # Windows trims by itself
                self._map.madvise(mmap.MADV_DONTNEED)


def _allocate(length: int, width: int, device: torch.device | None) -> Tensor:
    try:
        return torch.empty(length, width, dtype=torch.float32, device=device)
    except RuntimeError as error:  # torch's out-of-memory errors, of every device
        where = "RAM" if device is None else f"the memory of {device}"
        raise ResourceError(
            f"no {format_bytes(length * width * 4)} left in {where} for {length:,} tokens: use a "
            "larger mpp or a tissue mask, or give less memory so that the tokens go to disk"
        ) from error


def _map_scratch(size: int, scratch_dir: Path | None) -> mmap.mmap:
    """A mapping of a nameless file whose disk space is reserved, so that no write can fail."""
    folder = scratch_dir if scratch_dir is not None else Path(tempfile.gettempdir())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            _reserve(file, size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(
                f"{folder}: no room for a scratch file of {format_bytes(size)}: free some space, "
                "or choose another scratch folder or a larger memory limit"
            ) from error
        if error.errno == errno.ENOMEM:
            raise ResourceError(f"cannot map {format_bytes(size)}: {error.strerror}") from error
        raise OutputError(
            f"{folder}: cannot make a scratch file: {error.strerror}: choose another scratch folder"
        ) from error


def _reserve(file: IO[bytes], size: int) -> None:
    """Give the file `size` bytes that the file system has set aside, or raise OSError."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    zeros = bytes(min(size, _PIECE))
    for offset in range(0, size, _PIECE):
        file.write(zeros[: size - offset])
    file.flush()


def _pin(data: Tensor) -> Any:
    """Page-lock host memory in place; return what undoes it.

    torch's own pinned allocator rounds up to a power of two: up to twice the memory.
    """
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if data.numel() == 0:
        return lambda: None
    status = int(runtime.cudaHostRegister(data.data_ptr(), data.nbytes, 0))
    if status != 0:
        raise ResourceError(
            f"the GPU driver cannot page-lock {format_bytes(data.nbytes)} of RAM (CUDA error "
            f"{status}): give less memory so that the tokens go to disk"
        )
    return functools.partial(runtime.cudaHostUnregister, data.data_ptr())
