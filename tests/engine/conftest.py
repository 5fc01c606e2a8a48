"""Random blocks of every kind, and the block on a whole sequence in float64 as the oracle."""

from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gigavim_kernels import naive
from gigavim_kernels.weights import BlockWeights, Branch, Direction

KINDS = {
    "v2": ((False, False), (True, True)),
    "v1": ((False, False), (True, False)),
    "none": ((False, False),),
}
"""(reverse, reverse_conv) of the directions of a branch."""


def random_direction(
    generator: torch.Generator, d_inner: int, d_state: int, *, reverse: bool, reverse_conv: bool
) -> Direction:
    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    rank = 2
    return Direction(
        conv_weight=normal(d_inner, 4, std=0.4),
        conv_bias=normal(d_inner, std=0.1),
        x_proj=normal(rank + 2 * d_state, d_inner, std=d_inner**-0.5),
        dt_weight=normal(d_inner, rank, std=0.7),
        dt_bias=normal(d_inner, std=1.0) - 3,
        A=-torch.exp(normal(d_inner, d_state, std=1.0)),
        D=normal(d_inner, std=1.0),
        reverse=reverse,
        reverse_conv=reverse_conv,
    )


def random_branch(
    generator: torch.Generator, d_model: int, d_state: int, senses: tuple[tuple[bool, bool], ...]
) -> Branch:
    d_inner = 2 * d_model
    return Branch(
        norm_weight=1 + 0.1 * torch.randn(d_model, generator=generator),
        norm_eps=1e-5,
        in_proj=torch.randn(2 * d_inner, d_model, generator=generator) * d_model**-0.5,
        out_proj=torch.randn(d_model, d_inner, generator=generator) * d_inner**-0.5,
        directions=tuple(
            random_direction(generator, d_inner, d_state, reverse=r, reverse_conv=c)
            for r, c in senses
        ),
        scale=0.5 if len(senses) == 2 else 1.0,
    )


def random_block(
    kind: str, *, d_model: int = 8, d_state: int = 4, seed: int = 0, device: str = "cpu"
) -> BlockWeights:
    generator = torch.Generator().manual_seed(seed)
    if kind == "layer_pairs":
        senses = (((False, False),), ((True, True),))
        branches = tuple(random_branch(generator, d_model, d_state, s) for s in senses)
        return BlockWeights(branches, stream_scale=2.0)
    return BlockWeights((random_branch(generator, d_model, d_state, KINDS[kind]),))


def reference_block(stream: Tensor, block: BlockWeights) -> Tensor:
    """The block on the whole sequence (L, D), in float64 and without chunks."""
    stream = stream.double()
    if stream.shape[0] == 0:
        return stream
    result = stream * block.stream_scale
    for branch in block.branches:
        b = _double(branch)
        x, z = (F.rms_norm(stream, b.norm_weight.shape, b.norm_weight, b.norm_eps) @ b.in_proj.T)[
            None
        ].chunk(2, -1)  # (1, L, E)
        total = torch.zeros_like(x)
        for direction in branch.directions:
            d = _double(direction)
            c = naive.causal_conv(x, d.conv_weight, d.conv_bias, reverse=d.reverse_conv)
            n, r = d.A.shape[1], d.dt_weight.shape[1]
            dt, B, C = (c @ d.x_proj.T).split((r, n, n), -1)
            total += naive.selective_scan(
                c, dt @ d.dt_weight.T, d.A, B, C, d.D, z, d.dt_bias, reverse=d.reverse
            ).y
        result = result + (total[0] * b.scale) @ b.out_proj.T
    return result


def _double(weights):
    tensors = {f.name: getattr(weights, f.name) for f in fields(weights)}
    return replace(weights, **{k: t.double() for k, t in tensors.items() if isinstance(t, Tensor)})


def relative_error(found: Tensor, expected: Tensor) -> float:
    if expected.numel() == 0:
        return 0.0
    return float((found.double() - expected).norm() / expected.norm())


@pytest.fixture(scope="session")
def make_block():
    """random_block(kind, *, d_model, d_state, seed)."""
    return random_block


@pytest.fixture(scope="session")
def reference():
    """reference_block(stream, block)."""
    return reference_block


@pytest.fixture(scope="session")
def error_of():
    """relative_error(found, expected)."""
    return relative_error
