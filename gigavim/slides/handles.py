"""One open handle per thread and process of a library whose handles are not shared."""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, Protocol, TypeVar


class Closable(Protocol):
    """Anything with `close`."""

    def close(self) -> None:
        """Release what is held."""


Handle = TypeVar("Handle", bound=Closable)


class ThreadHandles(Generic[Handle]):
    """Opens a handle where a thread first needs it, and anew after `drop`."""

    def __init__(self, opener: Callable[[], Handle]) -> None:
        self._opener = opener
        self._local = threading.local()
        self._lock = threading.Lock()
        self._open: list[Handle] = []

    def get(self) -> Handle:
        """Return this thread's handle."""
        # A forked child must not use its parent's file position.
        if getattr(self._local, "pid", None) != os.getpid():
            handle = self._opener()
            self._local.handle, self._local.pid = handle, os.getpid()
            with self._lock:
                self._open.append(handle)
        current: Handle = self._local.handle
        return current

    def drop(self) -> None:
        """Close this thread's handle: some libraries' handles are dead after one error."""
        handle = getattr(self._local, "handle", None)
        self._local.__dict__.clear()
        if handle is None:
            return
        with self._lock:
            self._open = [other for other in self._open if other is not handle]
        with suppress(Exception):
            handle.close()

    def close(self) -> None:
        """Close every thread's handle."""
        with self._lock:
            handles, self._open = self._open, []
        self._local = threading.local()
        for handle in handles:
            with suppress(Exception):
                handle.close()
