"""Losses and gradients as CUDA graphs: recorded once for each shape of batch, then replayed.

A step of a small model is hundreds of short kernels, and telling the GPU of each costs more time
than most of them run. A recorded graph is told of once.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

log = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]
"""Canvases (B, 3, H, W) float32, normalised, and labels (B, H, W) int64."""
Objective = Callable[[Batch, int, Generator | None], Tensor]
"""The loss of a batch, of every n-th layer only, with a generator for what is random in it."""
Found = tuple[Tensor, tuple[Tensor, ...]]
"""A loss and its gradients; valid until the next call."""
Key = tuple[tuple[int, ...], int]


@dataclass(frozen=True, slots=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    batch: Batch
    """Where the graph reads its input."""
    found: Found


class Gradients:
    """Losses of an objective and their gradients by some parameters.

    On a CUDA device the second batch of a shape is recorded, and replayed from then on; results
    are those of the plain computation. Where recording fails, everything stays plain.
    """

    def __init__(self, objective: Objective, parameters: Sequence[nn.Parameter]) -> None:
        self.objective, self.parameters = objective, parameters
        device = parameters[0].device
        self._records = device.type == "cuda"
        self._seen: set[Key] = set()
        self._recorded: dict[Key, _Recorded] = {}
        if self._records:
            self._generator = Generator(device)
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(
        self, batch: Batch, every: int, generator: Generator, *, record: bool = True
    ) -> Found:
        """Return the loss and the gradients; the generator's seed decides what is random.

        Without `record` a batch is not recorded: the memory of a recorded one is not shared.
        """
        key = (tuple(batch[0].shape), every)
        if not self._records:
            return self._plain(batch, every, generator)
        self._generator.manual_seed(generator.initial_seed() + 1)
        if record and key in self._seen and key not in self._recorded:
            self._record(key, batch)
        self._seen.add(key)
        recorded = self._recorded.get(key)
        if recorded is None:
            return self._plain(batch, every, self._generator)
        for place, given in zip(recorded.batch, batch, strict=True):
            place.copy_(given)
        recorded.graph.replay()
        return recorded.found

    def _plain(self, batch: Batch, every: int, generator: Generator) -> Found:
        loss = self.objective(batch, every, generator)
        grads = torch.autograd.grad(
            loss, self.parameters, allow_unused=True, materialize_grads=True
        )
        pairs = zip(grads, self.parameters, strict=True)
        return loss.detach(), tuple(_laid_out_as(p, g) for g, p in pairs)

    def _record(self, key: Key, batch: Batch) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        kept = (batch[0].clone(), batch[1].clone())
        seed = self._generator.initial_seed()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                found = self._plain(kept, key[1], self._generator)
        except RuntimeError as error:
            self._records = False
            self._recorded.clear()
            reason = str(error).splitlines()[0]
            log.warning("steps cannot be recorded as CUDA graphs (%s): training is slower", reason)
            return
        self._generator.manual_seed(seed)
        self._recorded[key] = _Recorded(graph, kept, found)


def _laid_out_as(parameter: Tensor, grad: Tensor) -> Tensor:
    """The gradient in its parameter's layout, which fused optimizers ask for."""
    if grad.stride() == parameter.stride() and grad.dtype == parameter.dtype:
        return grad
    return torch.empty_like(parameter, requires_grad=False).copy_(grad)
