"""Are the kernels right on this machine? Checks against the specification in float64."""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from gigavim_kernels import backends, naive
from gigavim_kernels.block import apply_each
from gigavim_kernels.weights import BlockWeights, Branch, Direction

LIMITS: dict[backends.Precision, float] = {"fp32": 1e-5, "bf16": 2.5e-2}
"""Relative errors of what a block adds to the stream; bf16 rounds each product to 8 bits."""
HUGE_TOKENS, HUGE_CHANNELS = 12_000_000, 384
"""Their product passes 2^32, where the offsets of others' kernels wrap around."""
HUGE_BYTES = 60e9


@dataclass(frozen=True, slots=True)
class Check:
    """What a check found."""

    name: str
    error: float
    """Relative, in the L2 norm; NaN where something was not a number."""
    limit: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the limit."""
        return self.error <= self.limit


def run(device: torch.device, *, full: bool = False) -> Iterator[Check]:
    """Check every backend of a device, the gradients of its scan, and with `full` long offsets."""
    names = [n for n in backends.choices(device) if backends.unusable(n) is None]
    for name in names:
        for precision in backends.supported_precisions(device):
            yield check_block(name, device, precision)
    if "triton" in names:
        yield from check_gradients(device)
        for tied in (False, True):
            yield check_branch(device, tied=tied)
        if full:
            yield from check_offsets(device)


def check_block(name: str, device: torch.device, precision: backends.Precision) -> Check:
    """One bidirectional block over 150 tokens."""
    block = random_block(d_model=64)
    stream = torch.randn(150, 64)
    found = stream.to(device, copy=True)
    apply_each(backends.MAKERS[name](block, device, precision, None), found[None])
    added = naive.vim_block(block, stream) - stream
    error = relative_error(found.cpu() - stream, added)
    return Check(f"block, {name}, {precision}", error, LIMITS[precision])


def check_gradients(device: torch.device) -> Iterator[Check]:
    """Every gradient of the Triton scan, in both directions; the worst counts."""
    from gigavim_kernels.cuda import ops

    length, channels, states = 150, 64, 16
    spread = scan_arguments(1, length, channels, states, device)
    weights = torch.randn(1, length, channels).to(device)
    tied = spread | {"A": spread["A"][:, :1]}
    for given, reverse in itertools.product((spread, tied), (False, True)):
        found = {n: t.clone().requires_grad_() for n, t in given.items()}
        expected = {n: t.double().requires_grad_() for n, t in given.items()}
        ops_loss = (ops.selective_scan(**found, reverse=reverse).y * weights).sum()
        naive_loss = (naive.selective_scan(**expected, reverse=reverse).y * weights).sum()
        torch.autograd.backward(ops_loss)
        torch.autograd.backward(naive_loss)
        worst = 0.0
        for name, leaf in found.items():
            one, other = leaf.grad, expected[name].grad
            assert one is not None
            assert other is not None
            worst = max(worst, relative_error(one, other))
        sense = "reverse" if reverse else "forward"
        rates = "tied rates, " if given is tied else ""
        yield Check(f"gradients, triton, {rates}{sense}", worst, LIMITS["fp32"])


def check_branch(
    device: torch.device,
    d_model: int = 64,
    states: int = 16,
    length: int = 150,
    *,
    tied: bool = False,
) -> Check:
    """Every gradient of a whole block that recomputes, over a sequence in three chunks.

    Args:
        tied: one rate per channel, see `naive.spread_rates`.
    """
    from gigavim_kernels.cuda.branch import vim_branch
    from gigavim_kernels.cuda.directions import stack

    block = random_block(d_model=d_model, states=states)
    if tied:
        block = with_one_rate(block)
    stream, weights = torch.randn(2, length, d_model)
    found, mine = leaves(block.branches[0], stream, device, torch.float32)
    expected, theirs = leaves(block.branches[0], stream, torch.device("cpu"), torch.float64)
    with exact_products(), torch.enable_grad():
        sums = vim_branch(
            mine["stream"][None], found.norm_weight, found.norm_eps, found.in_proj,
            found.out_proj * found.scale, stack(found.directions), chunk=length * 2 // 5,
        )  # fmt: skip
        torch.autograd.backward((sums * weights.to(device)).sum())
    with torch.enable_grad():
        plain = naive.vim_block(replace(block, branches=(expected,)), theirs["stream"])
        torch.autograd.backward((plain * weights).sum())
    worst = 0.0
    for name, leaf in mine.items():
        one, other = leaf.grad, theirs[name].grad
        assert one is not None
        assert other is not None
        worst = max(worst, relative_error(one.cpu(), other))
    rates = ", tied rates" if tied else ""
    return Check(f"gradients of a block, triton{rates}", worst, LIMITS["fp32"])


def with_one_rate(block: BlockWeights) -> BlockWeights:
    """The block with the first of every channel's rates alone."""
    branches = tuple(
        replace(b, directions=tuple(replace(d, A=d.A[:, :1].contiguous()) for d in b.directions))
        for b in block.branches
    )
    return replace(block, branches=branches)


def leaves(
    branch: Branch, stream: Tensor, device: torch.device, dtype: torch.dtype
) -> tuple[Branch, dict[str, Tensor]]:
    """A branch whose tensors take gradients, and these tensors, the stream too, by name."""
    found = {"stream": stream.to(device, dtype, copy=True).requires_grad_()}

    def leafed(owner: Any, suffix: str) -> Any:
        for name in (f.name for f in fields(owner)):
            tensor = getattr(owner, name)
            if isinstance(tensor, Tensor):
                leaf = tensor.to(device, dtype, copy=True).requires_grad_()
                found[name + suffix] = leaf
                owner = replace(owner, **{name: leaf})
        return owner

    directions = tuple(leafed(d, f" {place}") for place, d in enumerate(branch.directions))
    return replace(leafed(branch, ""), directions=directions), found


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Keep float32 products and convolutions from being rounded to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def check_offsets(
    device: torch.device, tokens: int = HUGE_TOKENS, warm: int = 600, window: int = 100
) -> Iterator[Check]:
    """Windows of a scan whose offsets pass 2^31 and 2^32.

    Args:
        warm: tokens recomputed before a window; what came before them has decayed to nothing.
    """
    from gigavim_kernels.cuda import ops

    given = scan_arguments(1, tokens, HUGE_CHANNELS, 16, device, torch.bfloat16)
    given["A"] -= 1
    del given["state"]
    for reverse in (False, True):
        y = ops.selective_scan(**given, reverse=reverse).y
        edges = {(1 << bits) // HUGE_CHANNELS for bits in (31, 32)}
        for end in sorted(e for e in {window, tokens // 3, tokens} | edges if e <= tokens):
            start = end - window
            first = start if reverse else max(0, start - warm)
            last = min(tokens, end + warm) if reverse else end
            part = {n: (t[:, first:last] if t.dim() == 3 else t).double() for n, t in given.items()}
            expected = naive.selective_scan(**part, reverse=reverse).y
            sense = "reverse" if reverse else "forward"
            yield Check(
                f"{tokens:,} tokens, {sense}, to token {end:,}",
                relative_error(y[:, start:end], expected[:, start - first : end - first]),
                5e-3,
            )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in the L2 norm."""
    expected = expected.detach().double()
    difference = (found.detach().to(expected) - expected).norm()
    return float(difference / expected.norm().clamp(min=1e-300))


def scan_arguments(
    batch: int,
    length: int,
    channels: int,
    states: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Random arguments of a scan by their names; steps of about 0.3."""

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    rows = {n: draw(batch, length, channels, dtype=dtype) for n in ("x", "dt", "z")}
    return rows | {
        "A": -torch.arange(1.0, states + 1, device=device).repeat(channels, 1),
        "B": draw(batch, length, states, dtype=dtype),
        "C": draw(batch, length, states, dtype=dtype),
        "D": draw(channels),
        "dt_bias": draw(channels) * 0.1 - 1,
        "state": draw(batch, channels, states),
    }


SENSES: dict[str, tuple[tuple[tuple[bool, bool], ...], ...]] = {
    "v2": (((False, False), (True, True)),),
    "v1": (((False, False), (True, False)),),
    "none": (((False, False),),),
    "layer_pairs": (((False, False),), ((True, True),)),
}
"""Of the kinds of block, per branch and direction: (reverse, reverse_conv)."""


def random_block(
    kind: str = "v2",
    d_model: int = 32,
    states: int = 16,
    taps: int = 4,
    seed: int = 0,
    tied: bool = False,
) -> BlockWeights:
    """Random weights of a block, the same for the same arguments.

    Args:
        kind: a key of `SENSES`.
        tied: the decay rates of a channel's states are in the ratio of `naive.spread_rates`.
    """
    generator = torch.Generator().manual_seed(seed)
    width, rank = 2 * d_model, max(1, d_model // 16)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return BlockWeights(
        branches=tuple(
            Branch(
                norm_weight=torch.rand(d_model, generator=generator) + 0.5,
                norm_eps=1e-5,
                in_proj=normal(2 * width, d_model) / d_model**0.5,
                out_proj=normal(d_model, width) / width**0.5,
                directions=tuple(
                    _direction(generator, width, states, rank, taps, tied, *sense)
                    for sense in senses
                ),
                scale=0.5 if kind == "v2" else 1.0,
            )
            for senses in SENSES[kind]
        ),
        stream_scale=2.0 if kind == "layer_pairs" else 1.0,
    )


def _direction(
    generator: torch.Generator,
    width: int,
    states: int,
    rank: int,
    taps: int,
    tied: bool,
    reverse: bool,
    reverse_conv: bool,
) -> Direction:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    step = (uniform(width) * 4.6 - 6.9).exp()  # 1e-3 to 1e-1, as Mamba draws them
    return Direction(
        conv_weight=normal(width, taps) / taps**0.5,
        conv_bias=normal(width) * 0.1,
        x_proj=normal(rank + 2 * states, width) / width**0.5,
        dt_weight=normal(width, rank) / rank**0.5,
        dt_bias=step + torch.log(-torch.expm1(-step)),  # the inverse of softplus
        A=-torch.arange(1, states + 1.0) * (uniform(width, 1 if tied else states) * 1.5 + 0.5),
        D=normal(width),
        reverse=reverse,
        reverse_conv=reverse_conv,
    )
