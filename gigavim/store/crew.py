"""Work done on threads beside the one that finds it: compressing and writing."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from types import TracebackType
from typing import ParamSpec, Self

import torch

P = ParamSpec("P")

WRITERS = 2


class Crew:
    """A few threads and a short queue: what waits to be written takes memory.

    An error comes out at a later call, or at the end of the `with` block. A block that ends by an
    error of its own abandons what was not begun, that of crews which work for this one included.

    Args:
        threads: on each of them torch keeps to itself: its own threads would wait for each other
            on cores that are busy elsewhere.
        within: the crew by one of whose jobs this one is led.
    """

    def __init__(self, threads: int = WRITERS, *, within: "Crew | None" = None) -> None:
        self._most, self._within = threads, within
        self._pool = ThreadPoolExecutor(threads, "gigavim-store", torch.set_num_threads, (1,))
        self._jobs: deque[Future[object]] = deque()
        self._left = False

    def do(self, work: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Have a thread call `work`; waits while as many jobs as there are threads go on."""
        while len(self._jobs) >= self._most:
            self._jobs.popleft().result()
        self.later(work, *args, **kwargs)

    def later(self, work: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Like `do` without waiting: for work that takes memory only while it goes on."""

        def job() -> None:
            if self.abandoned:
                raise CancelledError
            work(*args, **kwargs)

        self._jobs.append(self._pool.submit(job))

    def check(self) -> None:
        """Raise the error of a job that has failed, without waiting for the others."""
        while self._jobs and self._jobs[0].done():
            self._jobs.popleft().result()

    def wait(self) -> None:
        """Wait until all that was asked for is done."""
        while self._jobs:
            self._jobs.popleft().result()

    @property
    def abandoned(self) -> bool:
        """Whether nobody wants the work any more."""
        return self._left or (self._within is not None and self._within.abandoned)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._left = error is not None
        self._pool.shutdown(wait=True, cancel_futures=self._left)
        torch.set_num_threads(torch.get_num_threads())  # for threads to come, as it was
        if error is None:
            self.wait()
