"""Work done on threads beside the one that finds it: compressing and writing."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import ParamSpec, Self

P = ParamSpec("P")

WRITERS = 2


class Crew:
    """A few threads and a short queue: what waits to be written takes memory.

    An error comes out at a later call, or at the end of the `with` block.
    """

    def __init__(self, threads: int = WRITERS) -> None:
        self._most = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="gigavim-store")
        self._jobs: deque[Future[object]] = deque()

    def do(self, work: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Have a thread call `work`; waits while as many jobs as there are threads go on."""
        while len(self._jobs) >= self._most:
            self._jobs.popleft().result()
        self.later(work, *args, **kwargs)

    def later(self, work: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Like `do` without waiting: for work that takes memory only while it goes on."""
        self._jobs.append(self._pool.submit(work, *args, **kwargs))

    def wait(self) -> None:
        """Wait until all that was asked for is done."""
        while self._jobs:
            self._jobs.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=error is not None)
        if error is None:
            self.wait()
