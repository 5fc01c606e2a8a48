"""Random blocks and scans, and the block computed in float64 by the specification."""

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gigavim_kernels import naive
from gigavim_kernels.block import BlockKernel
from gigavim_kernels.weights import BlockWeights, Branch, Direction


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from torch's threads, and busy machines make them costly."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def make_direction(
    width: int, states: int, rank: int, taps: int, *, reverse: bool, reverse_conv: bool
) -> Direction:
    dt = torch.empty(width).uniform_(-6.9, -2.3).exp()  # softplus(dt_bias), as Mamba draws it
    return Direction(
        conv_weight=torch.randn(width, taps) / taps**0.5,
        conv_bias=torch.randn(width) * 0.1,
        x_proj=torch.randn(rank + 2 * states, width) / width**0.5,
        dt_weight=torch.randn(width, rank) / rank**0.5,
        dt_bias=dt + torch.log(-torch.expm1(-dt)),
        A=-torch.arange(1, states + 1.0).repeat(width, 1) * torch.empty(width, 1).uniform_(0.5, 2),
        D=torch.randn(width),
        reverse=reverse,
        reverse_conv=reverse_conv,
    )


SENSES: dict[str, tuple[tuple[tuple[bool, bool], ...], ...]] = {
    "v2": (((False, False), (True, True)),),
    "v1": (((False, False), (True, False)),),
    "none": (((False, False),),),
    "layer_pairs": (((False, False),), ((True, True),)),
}
"""Per branch, per direction: (reverse, reverse_conv)."""


def random_block(
    kind: str = "v2", d_model: int = 32, states: int = 16, taps: int = 4, seed: int = 0
) -> BlockWeights:
    torch.manual_seed(seed)
    width, rank = 2 * d_model, max(1, d_model // 16)
    branches = tuple(
        Branch(
            norm_weight=torch.rand(d_model) + 0.5,
            norm_eps=1e-5,
            in_proj=torch.randn(2 * width, d_model) / d_model**0.5,
            out_proj=torch.randn(d_model, width) / width**0.5,
            directions=tuple(
                make_direction(width, states, rank, taps, reverse=r, reverse_conv=c)
                for r, c in senses
            ),
            scale=0.5 if kind == "v2" else 1.0,
        )
        for senses in SENSES[kind]
    )
    return BlockWeights(branches, stream_scale=2.0 if kind == "layer_pairs" else 1.0)


def specified_block(block: BlockWeights, stream: Tensor) -> Tensor:
    """Return the stream (L, D) after the block, in float64, one token a step."""
    stream = stream.double()
    result = block.stream_scale * stream
    for branch in block.branches:
        normed = F.rms_norm(stream, stream.shape[-1:], branch.norm_weight.double(), branch.norm_eps)
        x, z = (normed @ branch.in_proj.double().T)[None].chunk(2, 2)  # (1, L, E)
        total = torch.zeros_like(x)
        for d in branch.directions:
            c = naive.causal_conv(
                x, d.conv_weight.double(), d.conv_bias.double(), reverse=d.reverse_conv
            )
            states = d.A.shape[1]
            projected = c @ d.x_proj.double().T
            dt, B, C = projected.split((d.dt_weight.shape[1], states, states), 2)
            total += naive.selective_scan(
                c,
                dt @ d.dt_weight.double().T,
                d.A.double(),
                B,
                C,
                d.D.double(),
                z,
                d.dt_bias.double(),
                reverse=d.reverse,
            ).y
        result = result + (branch.scale * total[0]) @ branch.out_proj.double().T
    return result


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
    return random_block


@pytest.fixture(scope="session", name="specified_block")
def _specified_block() -> Callable[..., Tensor]:
    return specified_block


@pytest.fixture(scope="session", name="swept")
def _swept() -> Callable[..., Tensor]:
    return swept


@pytest.fixture(scope="session", name="random_scan")
def _random_scan() -> Callable[..., dict[str, Tensor]]:
    return random_scan


@pytest.fixture(scope="session", name="relative_error")
def _relative_error() -> Callable[..., float]:
    return relative_error
