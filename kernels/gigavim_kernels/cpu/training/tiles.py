"""The training kernels of one tile: sixteen channels by up to TILE tokens, as numba intrinsics.

A tile receives the address of an int64 array: the addresses and strides named in its `FIELDS`, in
that order. Strides count float32 places from a token to the next one in scan order, so that a
reverse scan is the same code with negative strides. State n of a channel decays at n + 1 times the
rate of the first (A_n = (n + 1) A_0): one exponential per channel and token does for all.
"""

from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gigavim_kernels.cpu.simd import LANES
from gigavim_kernels.cpu.training.lanes import I64, Lanes

STATES = 16
"""States per channel (N): these kernels are written for the published value."""
TILE = 16
"""Tokens per tile: its scratch (about 100 KB) stays in the second-level cache."""

SCAN_FIELDS = ("x", "dt", "z", "y", "B", "C", "A", "D", "bias", "h", "saved", "scratch", "tokens",
               "ld_x", "ld_dt", "ld_z", "ld_y", "ld_bc", "ld_h", "ahead")  # fmt: skip
GRAD_FIELDS = (*SCAN_FIELDS, "dy", "dx", "ddt", "dz", "g", "dA", "dD", "dbias", "acc",
               "ld_dy", "ld_dx", "ld_ddt", "ld_dz")  # fmt: skip
CONV_FIELDS = ("x", "y", "w", "bias", "tokens", "ahead", "ld_x", "ld_y", "ld_w")
CONV_GRAD_FIELDS = (*CONV_FIELDS, "dy", "dx", "dw", "dbias", "ld_dy", "ld_dx")
SUM_FIELDS = ("acc", "dB", "dC", "tokens", "ld_dbc")

Emit = Callable[[Lanes, dict[str, Any]], None]


LOG2_E = 1.4426950408889634
SCRATCH = 4 * LANES * TILE + (TILE + 1) * STATES * LANES
"""Floats of scratch that a scan tile needs."""


def tile(fields: tuple[str, ...], emit: Emit) -> Any:
    """A numba intrinsic of one argument, the address of the int64 array of `fields`."""

    @intrinsic
    def function(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            table = builder.inttoptr(arguments[0], I64.as_pointer())
            values = {
                name: builder.load(builder.gep(table, [ir.Constant(I64, place)]))
                for place, name in enumerate(fields)
            }
            emit(Lanes(context, builder), values)
            return context.get_dummy_value()

        return types.void(types.int64), generate

    return function


def _prefetch(v: Lanes, p: dict[str, Any], k: Any, read: str, write: str) -> None:
    """Fetch this group's lines of row k of the tile after this one in the order of the walk."""
    row = v.builder.add(k, p["ahead"])
    for names, is_write in ((read, False), (write, True)):
        for name in names.split():
            v.prefetch(v.row(p[name], row, p[f"ld_{name}"]), write=is_write)


def _powers(v: Lanes, base: Any) -> Iterator[Any]:
    """base, base^2, ... base^STATES, in two chains of products."""
    square = v.mul(base, base)
    chains = [base, square]
    for n in range(STATES):
        yield chains[n & 1]
        chains[n & 1] = v.mul(chains[n & 1], square)


def _decay(v: Lanes, delta: Any, rate: Any) -> Any:
    """exp(delta * A) of the first state; the others decay by its powers."""
    return v.exp2(v.mul(delta, v.mul(rate, v.constant(LOG2_E))))


def _scan_forward(v: Lanes, p: dict[str, Any]) -> None:
    rows = [v.builder.mul(p["ld_h"], v.index(n)) for n in range(STATES)]
    state = [v.variable(v.load(v.at(p["h"], row))) for row in rows]
    for row, h in zip(rows, state, strict=True):
        v.store(v.at(p["saved"], row), h.get())
    rate, skip, bias, width = v.load(p["A"]), v.load(p["D"]), v.load(p["bias"]), v.index(LANES)
    steps, decays, gates = (v.at(p["scratch"], v.index(part * LANES * TILE)) for part in range(3))

    def prepare(k: Any) -> None:
        _prefetch(v, p, k, "x dt z", "y")
        v.prefetch(v.row(p["saved"], v.builder.add(k, v.index(STATES)), p["ld_h"]), write=True)
        z = v.load(v.row(p["z"], k, p["ld_z"]))
        v.store(v.row(gates, k, width), v.mul(z, v.sigmoid(z)))
        delta = v.softplus(v.add(v.load(v.row(p["dt"], k, p["ld_dt"])), bias))
        v.store(v.row(steps, k, width), delta)
        v.store(v.row(decays, k, width), _decay(v, delta, rate))

    def recur(k: Any) -> None:
        b_row, c_row = v.row(p["B"], k, p["ld_bc"]), v.row(p["C"], k, p["ld_bc"])
        x, delta = v.load(v.row(p["x"], k, p["ld_x"])), v.load(v.row(steps, k, width))
        inflow, sums = v.mul(delta, x), [v.mul(skip, x), v.constant(0.0)]
        for n, decay in enumerate(_powers(v, v.load(v.row(decays, k, width)))):
            entering = v.mul(inflow, v.splat_at(v.at(b_row, v.index(n))))
            h = v.fma(decay, state[n].get(), entering)
            state[n].set(h)
            sums[n & 1] = v.fma(h, v.splat_at(v.at(c_row, v.index(n))), sums[n & 1])
        gated = v.mul(v.add(*sums), v.load(v.row(gates, k, width)))
        v.store(v.row(p["y"], k, p["ld_y"]), gated)

    v.each(p["tokens"], prepare)
    v.each(p["tokens"], recur)
    for row, h in zip(rows, state, strict=True):
        v.store(v.at(p["h"], row), h.get())


def _scan_backward(v: Lanes, p: dict[str, Any]) -> None:
    rows = [v.builder.mul(p["ld_h"], v.index(n)) for n in range(STATES)]
    rate, skip, bias, width = v.load(p["A"]), v.load(p["D"]), v.load(p["bias"]), v.index(LANES)
    wide = v.index(LANES * STATES)
    places = [v.index(LANES * n) for n in range(STATES)]
    steps, decays, inner, slopes, states = (
        v.at(p["scratch"], v.index(part * LANES * TILE)) for part in range(5)
    )

    def prepare(k: Any) -> None:
        _prefetch(v, p, k, "x dt z dy", "dx ddt dz")
        v.prefetch(v.row(p["saved"], v.builder.sub(k, v.index(STATES)), p["ld_h"]))
        z, dy = v.load(v.row(p["z"], k, p["ld_z"])), v.load(v.row(p["dy"], k, p["ld_dy"]))
        s = v.sigmoid(z)
        gate = v.mul(z, s)
        v.store(v.row(inner, k, width), v.mul(dy, gate))
        # d silu(z) / dz = s + silu(z) (1 - s)
        v.store(v.row(slopes, k, width), v.mul(dy, v.fma(gate, v.sub(v.constant(1.0), s), s)))
        delta = v.softplus(v.add(v.load(v.row(p["dt"], k, p["ld_dt"])), bias))
        v.store(v.row(steps, k, width), delta)
        v.store(v.row(decays, k, width), _decay(v, delta, rate))

    state = [v.variable(v.load(v.at(p["saved"], row))) for row in rows]
    for place, h in zip(places, state, strict=True):
        v.store(v.at(states, place), h.get())

    def replay(k: Any) -> None:
        b_row, c_row = v.row(p["B"], k, p["ld_bc"]), v.row(p["C"], k, p["ld_bc"])
        after = v.at(v.row(states, k, wide), wide)
        x, delta = v.load(v.row(p["x"], k, p["ld_x"])), v.load(v.row(steps, k, width))
        inflow, sums = v.mul(delta, x), [v.mul(skip, x), v.constant(0.0)]
        for n, decay in enumerate(_powers(v, v.load(v.row(decays, k, width)))):
            entering = v.mul(inflow, v.splat_at(v.at(b_row, v.index(n))))
            h = v.fma(decay, state[n].get(), entering)
            state[n].set(h)
            v.store(v.at(after, places[n]), h)
            sums[n & 1] = v.fma(h, v.splat_at(v.at(c_row, v.index(n))), sums[n & 1])
        dz = v.mul(v.add(*sums), v.load(v.row(slopes, k, width)))
        v.store(v.row(p["dz"], k, p["ld_dz"]), dz)

    v.each(p["tokens"], prepare)
    v.each(p["tokens"], replay)

    grad = [v.variable(v.load(v.at(p["g"], row))) for row in rows]
    rate_grad, skip_grad = v.variable(v.load(p["dA"])), v.variable(v.load(p["dD"]))
    bias_grad = v.variable(v.load(p["dbias"]))

    def back(k: Any) -> None:
        b_row, c_row = v.row(p["B"], k, p["ld_bc"]), v.row(p["C"], k, p["ld_bc"])
        acc = v.row(p["acc"], k, v.index(2 * LANES * STATES))
        before = v.row(states, k, wide)
        after = v.at(before, wide)
        x, delta = v.load(v.row(p["x"], k, p["ld_x"])), v.load(v.row(steps, k, width))
        dy, inflow = v.load(v.row(inner, k, width)), v.mul(delta, x)
        through_b, exponent_grad = v.constant(0.0), v.constant(0.0)
        for n, decay in enumerate(_powers(v, v.load(v.row(decays, k, width)))):
            b_acc, c_acc = v.at(acc, places[n]), v.at(acc, v.index(LANES * (STATES + n)))
            g = v.fma(dy, v.splat_at(v.at(c_row, v.index(n))), grad[n].get())
            v.store(c_acc, v.fma(dy, v.load(v.at(after, places[n])), v.load(c_acc)))
            v.store(b_acc, v.fma(g, inflow, v.load(b_acc)))
            through_b = v.fma(g, v.splat_at(v.at(b_row, v.index(n))), through_b)
            carried = v.mul(g, decay)
            grad[n].set(carried)
            share = v.mul(carried, v.load(v.at(before, places[n])))
            exponent_grad = v.fma(v.constant(n + 1.0), share, exponent_grad)
        v.store(v.row(p["dx"], k, p["ld_dx"]), v.fma(through_b, delta, v.mul(dy, skip)))
        skip_grad.set(v.fma(dy, x, skip_grad.get()))
        rate_grad.set(v.fma(delta, exponent_grad, rate_grad.get()))
        # d softplus(r) / dr = 1 - exp(-softplus(r))
        slope = v.sub(v.constant(1.0), v.exp(v.sub(v.constant(0.0), delta)))
        ddt = v.mul(v.fma(through_b, x, v.mul(exponent_grad, rate)), slope)
        v.store(v.row(p["ddt"], k, p["ld_ddt"]), ddt)
        bias_grad.set(v.add(bias_grad.get(), ddt))

    v.each(p["tokens"], back, down=True)
    for row, g in zip(rows, grad, strict=True):
        v.store(v.at(p["g"], row), g.get())
    v.store(p["dA"], rate_grad.get())
    v.store(p["dD"], skip_grad.get())
    v.store(p["dbias"], bias_grad.get())


def _sum_channels(v: Lanes, p: dict[str, Any]) -> None:
    """Sum the lanes of the (tokens, 2, STATES, LANES) accumulators into rows of dB and dC."""

    def reduce(k: Any) -> None:
        acc = v.row(p["acc"], k, v.index(2 * LANES * STATES))
        for half, name in enumerate(("dB", "dC")):
            vectors = [
                v.load(v.at(acc, v.index(LANES * (STATES * half + n)))) for n in range(STATES)
            ]
            v.store(v.row(p[name], k, p["ld_dbc"]), v.lane_sums(vectors))

    v.each(p["tokens"], reduce)


def _conv_forward(v: Lanes, p: dict[str, Any]) -> None:
    taps = [v.load(v.at(p["w"], v.builder.mul(p["ld_w"], v.index(j)))) for j in range(4)]
    bias = v.load(p["bias"])
    past = [v.variable(v.constant(0.0)) for _ in range(3)]

    def step(k: Any) -> None:
        _prefetch(v, p, k, "x", "y")
        x = v.load(v.row(p["x"], k, p["ld_x"]))
        window = [*(slot.get() for slot in past), x]
        total = bias
        for tap, value in zip(taps, window, strict=True):
            total = v.fma(tap, value, total)
        v.store(v.row(p["y"], k, p["ld_y"]), v.mul(total, v.sigmoid(total)))
        for slot, value in zip(past, window[1:], strict=True):
            slot.set(value)

    v.each(p["tokens"], step)


def _conv_backward(v: Lanes, p: dict[str, Any]) -> None:
    """Row k of dx is finished three tokens later; rows -3 .. -1 of dx receive what has no token."""
    taps = [v.load(v.at(p["w"], v.builder.mul(p["ld_w"], v.index(j)))) for j in range(4)]
    bias = v.load(p["bias"])
    past = [v.variable(v.constant(0.0)) for _ in range(3)]
    slopes = [v.variable(v.constant(0.0)) for _ in range(3)]
    tap_grads = [v.variable(v.constant(0.0)) for _ in range(4)]
    bias_grad = v.variable(v.constant(0.0))

    def emit(k: Any, newest: Any) -> None:
        window = [*(slot.get() for slot in slopes), newest]
        total = v.mul(taps[3], window[0])
        for tap, value in zip(taps[2::-1], window[1:], strict=True):
            total = v.fma(tap, value, total)
        v.store(v.row(p["dx"], v.builder.sub(k, v.index(3)), p["ld_dx"]), total)
        for slot, value in zip(slopes, window[1:], strict=True):
            slot.set(value)

    def step(k: Any) -> None:
        _prefetch(v, p, k, "x dy", "dx")
        x = v.load(v.row(p["x"], k, p["ld_x"]))
        window = [*(slot.get() for slot in past), x]
        total = bias
        for tap, value in zip(taps, window, strict=True):
            total = v.fma(tap, value, total)
        s = v.sigmoid(total)
        slope = v.fma(v.mul(total, s), v.sub(v.constant(1.0), s), s)
        slope = v.mul(v.load(v.row(p["dy"], k, p["ld_dy"])), slope)
        for grad, value in zip(tap_grads, window, strict=True):
            grad.set(v.fma(slope, value, grad.get()))
        bias_grad.set(v.add(bias_grad.get(), slope))
        for slot, value in zip(past, window[1:], strict=True):
            slot.set(value)
        emit(k, slope)

    v.each(p["tokens"], step)
    v.each(v.index(3), lambda k: emit(v.builder.add(p["tokens"], k), v.constant(0.0)))
    for j, grad in enumerate(tap_grads):
        v.store(v.at(p["dw"], v.builder.mul(p["ld_w"], v.index(j))), grad.get())
    v.store(p["dbias"], bias_grad.get())


scan_forward = tile(SCAN_FIELDS, _scan_forward)
scan_backward = tile(GRAD_FIELDS, _scan_backward)
sum_channels = tile(SUM_FIELDS, _sum_channels)
conv_forward = tile(CONV_FIELDS, _conv_forward)
conv_backward = tile(CONV_GRAD_FIELDS, _conv_backward)
