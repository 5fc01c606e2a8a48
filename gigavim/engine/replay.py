"""Short work on a GPU as CUDA graphs: recorded once for each shape, then replayed.

Telling a GPU of one kernel costs tens of microseconds, longer than a kernel runs over a few
thousand tokens; a recorded graph of hundreds is told of once.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Work = Callable[[Tensor], Tensor]
SHAPES = 4
"""Graphs kept at most, those used last: each holds on to the memory of its work."""


@dataclass(frozen=True, slots=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    given: Tensor
    """Where the graph reads its input."""
    found: Tensor


class Replayed:
    """Some work on one tensor, with the same results.

    The second input of a shape on a CUDA device is recorded, and replayed from then on. Where
    recording fails, everything stays plain.

    Args:
        work: without side effects, and without a look at numbers from the host.
        largest: elements of inputs that are worth it; larger ones are never recorded.
    """

    def __init__(self, work: Work, *, largest: int) -> None:
        self._work, self._largest = work, largest
        self._seen: set[tuple[int, ...]] = set()
        self._recorded: OrderedDict[tuple[int, ...], _Recorded] = OrderedDict()

    def __call__(self, given: Tensor) -> Tensor:
        """What the work returns."""
        shape = tuple(given.shape)
        if given.device.type != "cuda" or not 0 < given.numel() <= self._largest:
            return self._work(given)
        if shape not in self._recorded:
            if shape not in self._seen:  # the first call compiles the kernels
                self._seen.add(shape)
                return self._work(given)
            if not self._record(given):
                return self._work(given)
        recorded = self._recorded[shape]
        self._recorded.move_to_end(shape)
        recorded.given.copy_(given)
        recorded.graph.replay()
        return recorded.found.clone()

    def _record(self, given: Tensor) -> bool:
        graph, kept = torch.cuda.CUDAGraph(), given.clone()
        torch.cuda.synchronize(given.device)
        try:
            with torch.cuda.device(given.device), torch.cuda.graph(graph):
                found = self._work(kept)
        except RuntimeError as error:
            self._largest = 0
            self._recorded.clear()
            reason = str(error).splitlines()[0]
            log.warning("short work cannot be recorded as CUDA graphs (%s): it is slower", reason)
            return False
        self._recorded[tuple(given.shape)] = _Recorded(graph, kept, found)
        while len(self._recorded) > SHAPES:
            self._recorded.popitem(last=False)
        return True
