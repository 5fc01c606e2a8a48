"""The selective scan of a share of the channels: 16 channels by 32 tokens at a time.

A tile takes three loops, because the recurrence is bound by latency and must stay alone: the steps
(dt projection, softplus, skip), the recurrence, and the gate. Hidden states stay in registers
through a tile. The states n are taken in blocks, whose size the kernel learns from the length of
a tuple; decays are powers of two, with A scaled by log2(e) beforehand (`A2`).

Where the states of a channel decay at 1, 2, 3, ... times the rate of the first, as they are
initialised and as a training may keep them, two exponentials make the decays of all by products.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from gigavim_kernels.cpu.simd import LANES, Simd, Value, intrinsic, jit, matrices

TILE = 32
_UNROLL = 4  # tokens that share a load of the dt weights


@intrinsic
def _steps(
    typing: Any,
    steps: Any,
    drive: Any,
    skip: Any,
    x: Any,
    dt: Any,
    dt_weight: Any,
    dt_bias: Any,
    D: Any,
    y: Any,
    first: Any,
    count: Any,
    stride: Any,
    rank: Any,
    column: Any,
) -> Any:
    """Fill a tile: steps = softplus(dt), drive = steps * x, skip = D * x; return the largest step.

    dt holds (rows, rank) to be multiplied by dt_weight (rank, channels), or the product itself
    where dt_weight is None. Where y is None no outputs are wanted, and `skip` stays as it is.
    """
    kinds = (
        steps, drive, skip, x, dt, dt_weight, dt_bias, D, y, first, count, stride, rank, column
    )  # fmt: skip

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Value:
        simd = Simd(context, builder)
        arrays = matrices(simd, kinds[:9], values[:9])
        steps, drive, skip, x, dt, dt_weight, dt_bias, D, y = arrays
        first, count, stride, rank, column = values[9:]
        zero = simd.index(0)
        bias = dt_bias.load(zero, column)
        D_row = D.load(zero, column) if D else None
        largest = simd.variable(simd.constant(0.0))
        last = builder.sub(count, simd.index(1))
        with simd.loop(count, _UNROLL) as i:
            places = [builder.add(i, simd.index(j)) for j in range(_UNROLL)]
            tokens = []  # a tile that ends early repeats its last token
            for place in places:
                inside = builder.icmp_signed("<", place, last)
                token = builder.mul(builder.select(inside, place, last), stride)
                tokens.append(builder.add(first, token))
            sums = [simd.variable(bias) for _ in tokens]
            if dt_weight is None:
                for total, token in zip(sums, tokens):
                    total.set(simd.add(bias, dt.load(token, column)))
            else:
                with simd.loop(rank) as r:
                    weight = dt_weight.load(r, column)
                    for total, token in zip(sums, tokens):
                        total.set(simd.fma(dt.splat(token, r), weight, total.get()))
            ahead = builder.mul(simd.index(TILE), stride)
            for place, token, total in zip(places, tokens, sums):
                x.prefetch(builder.add(token, ahead), column)
                step, row = simd.softplus(total.get()), x.load(token, column)
                largest.set(simd.max(step, largest.get()))
                steps.store(place, zero, step)
                drive.store(place, zero, simd.mul(step, row))
                if y:
                    skipped = simd.mul(D_row, row) if D_row else simd.constant(0.0)
                    skip.store(place, zero, skipped)
        return simd.largest_lane(largest.get())

    return types.float32(*kinds), generate


@intrinsic
def _recur(
    typing: Any,
    state: Any,
    steps: Any,
    drive: Any,
    out: Any,
    A2: Any,
    B: Any,
    C: Any,
    y: Any,
    first: Any,
    count: Any,
    stride: Any,
    column: Any,
    start: Any,
    block: Any,
    bounded: Any,
    tied: Any,
) -> Any:
    """Carry a block of states over a tile and add C . h to `out`, unless y is None.

    bounded: every |step * A2| is below 126, so that the exponent needs no clamp.
    tied: A2[n] = (n + 1) A2[0] besides.
    """
    kinds = (
        state, steps, drive, out, A2, B, C, y,
        first, count, stride, column, start, block, bounded, tied,
    )  # fmt: skip

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Value:
        simd = Simd(context, builder)
        arrays = matrices(simd, kinds[:8], values[:8])
        state, steps, drive, out, A2, B, C, y = arrays
        first, count, stride, column, start, _, bounded, tied = values[8:]
        rows = [builder.add(start, simd.index(n)) for n in range(block.count)]
        zero = simd.index(0)

        def powers(step: Value) -> Iterator[Value]:
            """Decays of the block's states from those of its first two and of every second."""
            rate = A2.load(zero, column)
            even, odd = (simd.exp2_product(step, A2.load(row, column)) for row in rows[:2])
            twice = simd.exp2_product(step, simd.add(rate, rate))
            for _ in rows:
                yield even
                even, odd = odd, simd.mul(even, twice)

        def exponentials(step: Value, *, clamp: bool) -> Iterator[Value]:
            for row in rows:
                rate = A2.load(row, column)
                yield simd.exp2(simd.mul(step, rate)) if clamp else simd.exp2_product(step, rate)

        def carry(decays: Callable[[Value], Iterator[Value]]) -> None:
            hidden = [simd.variable(state.load(row, column)) for row in rows]
            with simd.loop(count) as i:
                token = builder.add(first, builder.mul(i, stride))
                step, du = steps.load(i, zero), drive.load(i, zero)
                sums = [out.load(i, zero), simd.constant(0.0)] if y else []
                for n, (row, decay) in enumerate(zip(rows, decays(step))):
                    gain = simd.mul(du, B.splat(token, row))
                    h = simd.fma(decay, hidden[n].get(), gain)
                    hidden[n].set(h)
                    if y:
                        sums[n % 2] = simd.fma(h, C.splat(token, row), sums[n % 2])
                if y:
                    out.store(i, zero, simd.add(*sums))
            for row, h in zip(rows, hidden):
                state.store(row, column, h.get())

        with builder.if_else(tied) as (then, otherwise):
            with then:
                carry(powers)
            with otherwise, builder.if_else(bounded) as (inside, outside):
                with inside:
                    carry(partial(exponentials, clamp=False))
                with outside:
                    carry(partial(exponentials, clamp=True))
        return context.get_dummy_value()

    return types.void(*kinds), generate


@intrinsic
def _finish(
    typing: Any,
    y: Any,
    out: Any,
    others: Any,
    z: Any,
    first: Any,
    count: Any,
    stride: Any,
    column: Any,
) -> Any:
    """Write a tile to y: the outputs, plus those of other directions, times silu(z)."""
    kinds = (y, out, others, z, first, count, stride, column)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Value:
        simd = Simd(context, builder)
        y, out, others, z = matrices(simd, kinds[:4], values[:4])
        first, count, stride, column = values[4:]
        with simd.loop(count) as i:
            token = builder.add(first, builder.mul(i, stride))
            row = out.load(i, simd.index(0))
            ahead = builder.add(token, builder.mul(simd.index(TILE), stride))
            if others:
                others.prefetch(ahead, column)
                row = simd.add(others.load(token, column), row)
            if z:
                z.prefetch(ahead, column)
                row = simd.mul(row, simd.silu(z.load(token, column)))
            y.store(token, column, row)
        return context.get_dummy_value()

    return types.void(*kinds), generate


@jit
def _rates_are_tied(A2: Any) -> bool:
    """Whether A2[n] = (n + 1) A2[0] for every channel, to float32's last digits."""
    for n in range(1, A2.shape[0]):
        for e in range(A2.shape[1]):
            expected = (n + 1) * A2[0, e]
            if abs(A2[n, e] - expected) > 1e-6 * abs(expected):
                return False
    return True


@jit
def scan_channels(
    x: Any,
    dt: Any,
    dt_weight: Any,
    dt_bias: Any,
    A2: Any,
    B: Any,
    C: Any,
    D: Any,
    z: Any,
    others: Any,
    y: Any,
    state: Any,
    reverse: Any,
    block: Any,
    start: Any,
    stop: Any,
) -> None:
    """Scan the channels start..stop (multiples of 16) of one sequence.

    Args:
        x: (L, E) float32 or bfloat16 bits; z, y alike; E a multiple of 16.
        dt: (L, R) float32 with dt_weight (R, E), or (L, E) without; dt_bias, D: (1, E).
        A2: (N, E), A * log2(e). B, C: (L, N) float32.
        others: (L, E), added to the output before the gate, or None; may be y itself.
        y: the output, or None where only the states are wanted.
        state: (N, E) float32, carried in place.
        block: a tuple as long as the block of states that stays in registers; it divides N.
    """
    length, states = x.shape[0], A2.shape[0]
    rank = np.int64(0) if dt_weight is None else dt_weight.shape[0]
    steps = np.empty((TILE, LANES), np.float32)
    drive = np.empty((TILE, LANES), np.float32)
    out = np.empty((TILE, LANES), np.float32)
    limits = np.empty((stop - start) // LANES, np.float32)
    tied = _rates_are_tied(A2)
    for g in range(len(limits)):
        column = start + g * LANES
        fastest = np.abs(A2[:, column : column + LANES]).max()
        limits[g] = np.float32(126) / max(fastest, np.float32(1e-30))
    stride = np.int64(-1 if reverse else 1)
    for done in range(0, length, TILE):
        count = min(np.int64(TILE), length - done)
        first = length - 1 - done if reverse else np.int64(done)
        for g in range(len(limits)):
            column = start + g * LANES
            largest = _steps(
                steps, drive, out, x, dt, dt_weight, dt_bias, D, y,
                first, count, stride, rank, column,
            )  # fmt: skip
            bounded = largest < limits[g]
            for n in range(0, states, len(block)):
                _recur(
                    state, steps, drive, out, A2, B, C, y,
                    first, count, stride, column, n, block, bounded, tied and bounded,
                )  # fmt: skip
            if y is not None:
                _finish(y, out, others, z, first, count, stride, column)


def state_block(A2: NDArray[np.float32]) -> tuple[int, ...]:
    """Return the tuple that tells `scan_channels` how many of N states to block.

    A2: (N, E), N a multiple of 8. Registers hold 8 states with all that their exponentials need, a
    quarter faster than 16; of tied rates the exponentials are few, and 16 states share them.
    """
    return tuple(range(16 if len(A2) % 16 == 0 and _rates_are_tied(A2) else 8))
