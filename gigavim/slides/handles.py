"""One open handle per thread and process of a library whose handles are not shared."""

import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Generic, Protocol, TypeVar


class Closable(Protocol):
    """Anything with `close`."""

    def close(self) -> None:
        """Release what is held."""


Handle = TypeVar("Handle", bound=Closable)


class FileBytes:
    """A file opened for reading at any place."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def read(self, offset: int, count: int) -> bytes:
        """Return exactly `count` bytes.

        Raises:
            EOFError: if the file ends before.
        """
        if hasattr(os, "pread"):
            data = os.pread(self._descriptor, count, offset)
        else:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            data = os.read(self._descriptor, count)
        if len(data) < count:
            raise EOFError("it lies beyond the end of the file")
        return data

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            self.close()


class ThreadHandles(Generic[Handle]):
    """Opens a handle where a thread first needs it, and anew after `drop`."""

    def __init__(self, opener: Callable[[], Handle]) -> None:
        self._opener = opener
        self._local = threading.local()
        self._lock = threading.Lock()
        # Weak, so that a handle goes when its thread does.
        self._open: weakref.WeakSet[Handle] = weakref.WeakSet()

    def get(self) -> Handle:
        """Return this thread's handle."""
        # A forked child must not use its parent's file position.
        if getattr(self._local, "pid", None) != os.getpid():
            handle = self._opener()
            self._local.handle, self._local.pid = handle, os.getpid()
            with self._lock:
                self._open.add(handle)
        current: Handle = self._local.handle
        return current

    def drop(self) -> None:
        """Close this thread's handle: some libraries' handles are dead after one error."""
        handle = getattr(self._local, "handle", None)
        self._local.__dict__.clear()
        if handle is None:
            return
        with self._lock:
            self._open.discard(handle)
        with suppress(Exception):
            handle.close()

    def close(self) -> None:
        """Close every thread's handle."""
        with self._lock:
            handles, self._open = list(self._open), weakref.WeakSet()
        self._local = threading.local()
        for handle in handles:
            with suppress(Exception):
                handle.close()
