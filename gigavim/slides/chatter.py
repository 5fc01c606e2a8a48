"""C libraries that write to standard error what they also report as errors."""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

STANDARD_ERROR = 2

_ONE = threading.Lock()


@contextmanager
def silenced() -> Iterator[None]:
    """Drop what is written to the process's standard error meanwhile, unless details are wanted.

    For libraries that offer no other way (libtiff inside Pillow), and short: what other threads
    write there is dropped as well.
    """
    if log.isEnabledFor(logging.INFO):
        yield
        return
    with _ONE:
        try:
            kept = os.dup(STANDARD_ERROR)
        except OSError:  # there is none
            yield
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, STANDARD_ERROR)
        os.close(nowhere)
        try:
            yield
        finally:
            os.dup2(kept, STANDARD_ERROR)
            os.close(kept)
