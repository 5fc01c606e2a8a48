"""Slides through dask's workers: a few handed out at a time, deaths judged, failures tried again.

Only as many slides are with the scheduler as its workers can begin, so that its memory and the
client's do not grow with the archive, and a worker's death concerns the slide it was working on.
"""

import heapq
import logging
import math
import queue
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from distributed import CancelledError, KilledWorker

from gigavim.engine.memory import format_bytes
from gigavim.errors import ResourceError
from gigavim_pipelines import cluster
from gigavim_pipelines.failures import Failure, classify
from gigavim_pipelines.lastwords import read_last_words
from gigavim_pipelines.record import Record
from gigavim_pipelines.worker import Job, Outcome, finished, run_slide

if TYPE_CHECKING:
    from distributed import Client, Future

log = logging.getLogger(f"gigavim.{__name__}")

_TICK_S = 1.0
_EVENT_S = 0.5
"""How long news of a worker's memory may come after those of its death."""
_LONGEST_WAIT_S = 600.0
_MOST_UNBEGUN = 20
"""So often may a slide be given to workers that die before they begin it."""
_MAYBE_FULL = frozenset(("disk", "output", "I/O", "crash", "defect"))
"""Reasons that a full disk gives: libraries hide the error, and memory on a file crashes."""
_MEMORY_TOPIC = "worker-restart-memory"
"""Under which dask's nannies tell of workers that they ended for their memory."""


class Listener(Protocol):
    """Told of everything that happens to a slide."""

    def begun(self, job: Job) -> None:
        """It was handed to the workers."""

    def done(self, job: Job, record: Record) -> None:
        """It is finished."""

    def tried(self, job: Job, failure: Failure, worker: str, *, last: bool) -> None:
        """An attempt failed; if it was not the last, there will be another."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How failures are met."""

    tries: int = 3
    retry_wait_s: float = 10.0
    lookahead: int = 0
    """Slides waiting at the scheduler per worker: some let a cluster grow with its load."""
    patience_s: float = math.inf
    """How long to go on without a single worker."""
    full: Callable[[Job], Exception | None] = lambda job: None
    """Asked after failures that a full disk may be behind: what to end the run with, if it is."""
    memory_bytes: int = 0
    """What a worker may hold, where that is known."""


class Engine:
    """Runs jobs on a client's workers until each is done or has failed.

    Raises:
        ResourceError: the scheduler is gone for good, or no worker is left; and what the policy's
            `full` returns.
    """

    def __init__(self, client: "Client", listener: Listener, policy: Policy) -> None:
        self._client = client
        self._listener = listener
        self._policy = policy
        self._waiting: deque[Job] = deque()
        self._later: list[tuple[float, int, Job]] = []
        self._active: dict[Future[Any], Job] = {}
        self._finished: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        self._failures: Counter[str] = Counter()
        self._unbegun: Counter[str] = Counter()
        self._memory_deaths: dict[int, int] = {}
        self._capacity = 0
        self._looked = 0.0
        self._last_seen = time.monotonic()
        self._resources: dict[str, float] | None = None

    def run(self, jobs: Iterable[Job]) -> None:
        """Process all jobs; those that come first are begun first."""
        self._waiting.extend(jobs)
        self._client.subscribe_topic(_MEMORY_TOPIC, self._note_memory)
        try:
            while self._waiting or self._later or self._active:
                self._look_at_cluster()
                self._hand_out()
                self._take_in()
        finally:
            self._client.unsubscribe_topic(_MEMORY_TOPIC)
            for future in self._active:
                future.cancel()

    def _look_at_cluster(self) -> None:
        if self._client.status in ("closing", "closed"):
            raise ResourceError(
                "the connection to the dask scheduler is lost. Finished slides are safe: start the"
                " scheduler again and run the same command to go on."
            )
        now = time.monotonic()
        if self._client.status != "running" or (self._capacity and now < self._looked + _TICK_S):
            return
        # Meanwhile the scheduler may have gone.
        try:
            slots = cluster.slots(self._client)
            self._resources = cluster.resources(self._client)
        except (OSError, TimeoutError) as error:
            log.debug("the scheduler does not answer: %s", error)
            return
        if slots:
            self._last_seen = now
        elif now > self._last_seen + self._policy.patience_s:
            raise ResourceError("no worker starts any more; the same command with -v may say why.")
        self._capacity, self._looked = max(1, slots * (1 + self._policy.lookahead)), now

    def _hand_out(self) -> None:
        now = time.monotonic()
        while self._later and self._later[0][0] <= now:
            self._waiting.append(heapq.heappop(self._later)[2])
        while self._waiting and len(self._active) < self._capacity:
            if self._client.status != "running":
                return
            job = self._waiting.popleft()
            self._listener.begun(job)
            future = self._client.submit(
                run_slide,
                job,
                key=f"slide-{job.entry.id}-{job.attempt}-{time.monotonic_ns()}",
                pure=False,
                resources=self._resources,
            )
            self._active[future] = job
            future.add_done_callback(self._finished.put)

    def _take_in(self) -> None:
        due = self._later[0][0] - time.monotonic() if self._later else _TICK_S
        try:
            future = self._finished.get(timeout=min(max(due, 0.0), _TICK_S))
        except queue.Empty:
            return
        job = self._active.pop(future)
        # A result may be lost with its worker at any moment until it is here.
        try:
            outcome: Outcome = future.result()
        except KilledWorker:
            self._died(job)
        except CancelledError:
            self._again(job)  # the scheduler was lost, with all it knew
        except Exception as error:
            self._tried(job, classify(error), "")
        else:
            self._judge(job, outcome)

    def _judge(self, job: Job, outcome: Outcome) -> None:
        if outcome.record is not None:
            self._listener.done(job, outcome.record)
        elif outcome.failure is not None:
            self._tried(job, outcome.failure, outcome.worker)
        else:
            self._died(job)

    def _died(self, job: Job) -> None:
        """A worker was lost with this job: had it ended it, was it at it, and what ended both?"""
        record = finished(job)
        if record is not None:
            self._listener.done(job, record)
            return
        words = read_last_words(job.attempt_file)
        if words is None:
            self._unbegun[job.entry.id] += 1
            if self._unbegun[job.entry.id] < _MOST_UNBEGUN:
                self._again(job)
            else:
                self._tried(job, Failure("killed", "workers die before they begin it"), "")
            return
        failure = words.failure(timeout_s=job.timeout_s)
        if failure.reason == "killed" and (held := self._memory_of(words.pid)):
            limit = self._policy.memory_bytes
            most = f", and may hold {format_bytes(limit)}" if limit else ""
            failure = Failure("memory", f"its worker was ended: it held {format_bytes(held)}{most}")
        job.attempt_file.unlink(missing_ok=True)
        self._tried(job, failure, f"{words.host}:{words.pid}")

    def _tried(self, job: Job, failure: Failure, worker: str) -> None:
        self._failures[job.entry.id] += 1
        times = self._failures[job.entry.id]
        if failure.reason in _MAYBE_FULL and (full := self._policy.full(job)) is not None:
            raise full
        last = not failure.may_pass or times >= self._policy.tries
        self._listener.tried(job, failure, worker, last=last)
        if not last:
            wait = min(self._policy.retry_wait_s * 2 ** (times - 1), _LONGEST_WAIT_S)
            following = job.again(attempt=job.attempt + 1)
            heapq.heappush(self._later, (time.monotonic() + wait, id(following), following))

    def _again(self, job: Job) -> None:
        """Another attempt for a slide that was not to blame."""
        self._waiting.appendleft(job.again(attempt=job.attempt + 1))

    def _note_memory(self, event: tuple[float, dict[str, Any]]) -> None:
        self._memory_deaths[int(event[1]["pid"])] = int(event[1]["rss"])

    def _memory_of(self, pid: int) -> int | None:
        deadline = time.monotonic() + _EVENT_S
        while pid not in self._memory_deaths and time.monotonic() < deadline:
            time.sleep(_EVENT_S / 10)
        return self._memory_deaths.pop(pid, None)
