"""Short work on a GPU as CUDA graphs: recorded once for each shape, then replayed.

Telling a GPU of one kernel costs tens of microseconds, longer than a kernel runs over a few
thousand tokens; a recorded graph of hundreds is told of once.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Work = Callable[[Tensor], Tensor]
SHAPES = 4
"""Graphs at most: each holds on to its input and output; all share the memory in between."""


@dataclass(frozen=True, slots=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    given: Tensor
    """Where the graph reads its input."""
    found: Tensor


class Replayed:
    """Some work on one tensor, with the same results.

    The second input of a shape on a CUDA device is recorded, and replayed from then on, for the
    first few shapes. Where recording fails, everything stays plain.

    Args:
        work: without a look at numbers from the host, and without effects but on its input, which
            may hold anything afterwards.
        largest: elements of inputs that are worth it; larger ones are never recorded.
    """

    def __init__(self, work: Work, *, largest: int) -> None:
        self._work, self._largest = work, largest
        self._seen: set[tuple[int, ...]] = set()
        self._recorded: dict[tuple[int, ...], _Recorded] = {}
        self._pool: Any = None

    def __call__(self, given: Tensor) -> Tensor:
        """What the work returns."""
        shape = tuple(given.shape)
        if given.device.type != "cuda" or not 0 < given.numel() <= self._largest:
            return self._work(given)
        # The first call compiles the kernels.
        if shape in self._seen and shape not in self._recorded and len(self._recorded) < SHAPES:
            self._record(given)
        self._seen.add(shape)
        recorded = self._recorded.get(shape)
        if recorded is None:
            return self._work(given)
        recorded.given.copy_(given)
        recorded.graph.replay()
        return recorded.found.clone()

    def _record(self, given: Tensor) -> None:
        with torch.inference_mode(False):  # such a tensor may be written to in any mode
            graph, kept = torch.cuda.CUDAGraph(), given.clone()
        torch.cuda.synchronize(given.device)
        try:
            with torch.cuda.device(given.device), torch.cuda.graph(graph, pool=self._pool):
                found = self._work(kept)
        except RuntimeError as error:
            self._largest = 0
            self._recorded.clear()
            reason = str(error).splitlines()[0]
            log.warning("short work cannot be recorded as CUDA graphs (%s): it is slower", reason)
            return
        self._pool = graph.pool()
        self._recorded[tuple(given.shape)] = _Recorded(graph, kept, found)
