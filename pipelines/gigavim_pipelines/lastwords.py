"""What a worker leaves behind when a slide takes it down: who it was, and where it stood.

Before a slide is begun a file is made for the attempt; it goes when the attempt ends, however it
ends. So a file that is left tells of a worker that died at it: hung beyond its time (`faulthandler`
writes where and ends the process, even inside a decoder that holds the interpreter's lock), crashed
(`faulthandler` writes the signal and where), or killed from outside (only the first line is there).
"""

import faulthandler
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import orjson

from gigavim_pipelines.failures import Failure

MOST_BYTES = 1 << 16


class BegunBeforeError(Exception):
    """The same attempt was begun already, by a worker that did not end it."""


@dataclass(frozen=True, slots=True)
class LastWords:
    """An attempt's file, of a worker that died."""

    host: str
    pid: int
    started: float
    text: str
    """What faulthandler wrote."""

    def failure(self, *, timeout_s: float) -> Failure:
        """What ended the worker."""
        if self.text.startswith("Timeout ("):
            return Failure("timeout", f"not done within {timeout_s:g} s", self.text)
        if self.text:
            return Failure("crash", f"the worker crashed: {self.text.splitlines()[0]}", self.text)
        return Failure("killed", "the worker was killed")


@contextmanager
def watched(path: Path, *, timeout_s: float) -> Iterator[None]:
    """Keep an attempt's file for the length of a block, which must end within `timeout_s` (0: any).

    Raises:
        BegunBeforeError: the file is there.
    """
    try:
        file = path.open("xb")
    except FileExistsError:
        raise BegunBeforeError(str(path)) from None
    try:
        with file:
            _begin(file, timeout_s)
            try:
                yield
            finally:
                faulthandler.cancel_dump_traceback_later()
                faulthandler.disable()
    finally:
        path.unlink(missing_ok=True)


def _begin(file: BinaryIO, timeout_s: float) -> None:
    facts = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.time()}
    file.write(orjson.dumps(facts) + b"\n")
    file.flush()
    faulthandler.enable(file)
    if timeout_s:
        faulthandler.dump_traceback_later(timeout_s, exit=True, file=file)


def read_last_words(path: Path) -> LastWords | None:
    """The file of an attempt whose worker died; None if it was never begun."""
    try:
        with path.open("rb") as file:
            head, _, text = file.read(MOST_BYTES).partition(b"\n")
        facts = orjson.loads(head)
        words = text.decode("utf-8", "replace").strip()
        return LastWords(str(facts["host"]), int(facts["pid"]), float(facts["started"]), words)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return LastWords("unknown", 0, 0.0, "")
