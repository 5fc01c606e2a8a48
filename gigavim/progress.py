"""How long-running work reports itself without knowing who listens."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[float], None]
"""Called with the amount of work done since the last call, in the stage's unit."""


class Progress(Protocol):
    """A listener, told of each stage as it begins."""

    def stage(self, name: str, total: float, unit: str) -> AbstractContextManager[Advance]:
        """Open a stage of `total` units of work, such as "Mpx" or "tokens"."""
        ...


class Silent:
    """Nobody listens."""

    @contextmanager
    def stage(self, name: str, total: float, unit: str) -> Iterator[Advance]:
        """Ignore the stage."""
        yield lambda amount: None
