"""Why a slide failed, whether trying again may help, and what its owner can do."""

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass

from gigavim import errors
from gigavim.names import as_text
from gigavim.outputs.atomic import FULL


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed attempt."""

    reason: str
    """A key of `ADVICE`."""
    message: str
    detail: str = ""
    """Traceback or last words, for the log."""

    @property
    def may_pass(self) -> bool:
        """Whether the same slide may succeed when tried again."""
        return self.reason in MAY_PASS

    @property
    def advice(self) -> str:
        """What to do about it."""
        return ADVICE[self.reason]


ADVICE = {
    "corrupt": "copy or export the file again",
    "unsupported": "convert it to a format that gigavim reads, or leave it out (where channels are"
    " the matter: --set input.channels=[0,1,2])",
    "no mpp": "fill in its mpp in failed.csv, or in a manifest (slide,mpp)",
    "slide": "see the message",
    "permission": "let the user that runs the workers read it (of a URL: check the credentials)",
    "model": "see the message",
    "settings": "correct the recipe, or the slide's row in the manifest",
    "memory": "raise --worker-memory, use fewer --workers, or a smaller compute.max_memory",
    "disk": "free some space or choose another output folder",
    "output": "see the message",
    "I/O": "check the storage and the network, then run it again",
    "timeout": "raise --timeout, or look at its log for where it hung",
    "crash": "look at its log for where it crashed; a decoder may not survive this file",
    "killed": "something outside killed the worker (out of memory?): see the system's log",
    "defect": "a defect of gigavim or of your task: report it with its log",
}
MAY_PASS = frozenset(("memory", "disk", "I/O", "timeout", "crash", "killed"))

# What storage and networks say when they are only unwell.
_PASSING = {
    getattr(errno, name)
    for name in (
        "EIO", "EAGAIN", "EBUSY", "EINTR", "ESTALE", "ETIMEDOUT", "ECONNRESET", "ECONNREFUSED",
        "ECONNABORTED", "ENETDOWN", "ENETUNREACH", "EHOSTUNREACH", "ENOTCONN", "EREMOTEIO",
        "ENFILE", "EMFILE", "EPIPE",
    )
    if hasattr(errno, name)
}  # fmt: skip
_DENIED = {errno.EACCES, errno.EPERM}

_KINDS: tuple[tuple[type[Exception], str], ...] = (
    (errors.MissingMppError, "no mpp"),
    (errors.UnsupportedSlideError, "unsupported"),
    (errors.CorruptSlideError, "corrupt"),
    (errors.TileReadError, "corrupt"),
    (errors.SlideError, "slide"),
    (errors.ModelError, "model"),
    (errors.SettingsError, "settings"),
    (errors.ResourceError, "memory"),
    (errors.OutputError, "output"),
    (MemoryError, "memory"),
    (errors.GigavimError, "slide"),
    (OSError, "slide"),
)


def classify(error: BaseException, *, detail: str = "") -> Failure:
    """The failure that an exception of a slide's task means."""
    # Names of files in it may be no UTF-8, which neither ledger nor log can hold.
    message, detail = as_text(_text(error)), as_text(detail)
    chain = list(_causes(error))
    numbers = {item.errno for item in chain if isinstance(item, OSError)}
    if numbers & FULL.keys():
        return Failure("disk", message, detail)
    passing = any(isinstance(item, ConnectionError | TimeoutError) for item in chain)
    if passing or numbers & _PASSING:
        return Failure("I/O", message, detail)
    if numbers & _DENIED and not isinstance(error, errors.OutputError):
        return Failure("permission", message, detail)
    for kind, reason in _KINDS:
        if isinstance(error, kind):
            return Failure(reason, message, detail)
    return Failure("defect", f"{type(error).__name__}: {message}", detail)


def _text(error: BaseException) -> str:
    """An error's message; of the system's own, the file first and no number."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error) or type(error).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__
