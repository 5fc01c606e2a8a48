"""Random blocks and scans, and the block computed in float64 by the specification."""

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gigavim_kernels import naive, selftest
from gigavim_kernels.block import BlockKernel
from gigavim_kernels.weights import BlockWeights


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from torch's threads, and busy machines make them costly."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def swept(kernel: BlockKernel, stream: Tensor, cuts: list[int]) -> Tensor:
    """Apply a kernel to a copy of the stream (L, D), cut into chunks at the given places."""
    before, result = stream.clone(), stream.clone()
    bounds = [0, *cuts, len(stream)]
    chunks = list(itertools.pairwise(bounds))
    padded = F.pad(before, (0, 0, kernel.halo, kernel.halo))

    def halos(start: int, stop: int) -> Iterator[Tensor]:
        yield padded[start : start + kernel.halo]
        yield padded[stop + kernel.halo : stop + 2 * kernel.halo]

    reverse = [kernel.zero_states(reverse=True)]
    for start, stop in reversed(chunks[1:]):
        states = kernel.edge_states(before[start:stop], *halos(start, stop), reverse[-1])
        reverse.append(tuple(s.clone() for s in states))
    forward = kernel.zero_states(reverse=False)
    for (start, stop), state in zip(chunks, reversed(reverse)):
        forward = kernel.update(result[start:stop], *halos(start, stop), forward, state)
        forward = tuple(s.clone() for s in forward)
    return result


def random_scan(
    batch: int, length: int, channels: int, states: int, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    return {
        "x": draw(batch, length, channels),
        "dt": draw(batch, length, channels),
        "A": -torch.rand(channels, states, dtype=dtype, generator=generator) * 8 - 0.1,
        "B": draw(batch, length, states),
        "C": draw(batch, length, states),
        "D": draw(channels),
        "z": draw(batch, length, channels),
        # Smaller steps in long sequences: else the decay over all of it is nothing but rounding.
        "dt_bias": draw(channels) - 1 - math.log(max(1, length / 64)),
        "state": draw(batch, channels, states),
    }


def relative_error(found: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    scale = expected.norm().item()
    return (found.double() - expected).norm().item() / (scale or 1.0)


@pytest.fixture(scope="session", name="random_block")
def _random_block() -> Callable[..., BlockWeights]:
    return selftest.random_block


@pytest.fixture(scope="session", name="specified_block")
def _specified_block() -> Callable[..., Tensor]:
    return naive.vim_block


@pytest.fixture(scope="session", name="swept")
def _swept() -> Callable[..., Tensor]:
    return swept


@pytest.fixture(scope="session", name="random_scan")
def _random_scan() -> Callable[..., dict[str, Tensor]]:
    return random_scan


@pytest.fixture(scope="session", name="relative_error")
def _relative_error() -> Callable[..., float]:
    return relative_error
