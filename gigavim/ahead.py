"""Work done on threads, handed out in order, and only so far ahead of who takes it."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

T = TypeVar("T")


def in_order(pool: Executor, tasks: Iterable[Callable[[], T]], *, depth: int) -> Iterator[T]:
    """Results of tasks in order, at most `depth` of them computed ahead.

    An error of a task comes out at its place. What was not begun by then, or when nobody takes
    more, is cancelled.
    """
    waiting: deque[Future[T]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
