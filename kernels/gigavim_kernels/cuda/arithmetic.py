"""Functions that the kernels share. Everything is computed in float32.

The states of a channel are a tuple of N tensors, each with one element per channel: so a thread
holds whole channels, the sum over the states needs no exchange between threads, and every layout is
the plain one of a row of channels.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softplus(x: tl.tensor) -> tl.tensor:
    """max(x, 0) + log(1 + exp(-|x|)), accurate to float32's rounding for any x.

    log(1 + e) = 2 atanh(s) with s = e / (2 + e) <= 1/3: six terms of the series suffice. A plain
    log(1 + e) loses all digits of the small steps that a trained model takes.
    """
    e = tl.exp2(-tl.abs(x) * LOG2_E)
    s = e / (2.0 + e)
    q = s * s
    series = 2.0 / 9 + q * (2.0 / 11 + q * (2.0 / 13))
    series = 2.0 + q * (2.0 / 3 + q * (2.0 / 5 + q * (2.0 / 7 + q * series)))
    return tl.maximum(x, 0.0) + s * series


@triton.jit
def sigmoid(x: tl.tensor) -> tl.tensor:
    """Logistic function."""
    return 1.0 / (1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def row(p_row: tl.tensor, o_e: tl.tensor, m_e: tl.tensor) -> tl.tensor:
    """Load the channels o_e of a token."""
    return tl.load(p_row + o_e, mask=m_e, other=0.0).to(tl.float32)


@triton.jit
def step_size(p_dt: tl.tensor, bias: tl.tensor, o_e: tl.tensor, m_e: tl.tensor) -> tl.tensor:
    """softplus(dt + bias) of a token's channels."""
    return softplus(row(p_dt, o_e, m_e) + bias)


@triton.jit
def zeros(like: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """States of zero."""
    states = ()
    for _ in tl.static_range(N):
        states = states + (tl.zeros_like(like),)  # noqa: RUF005
    return states


@triton.jit
def load_states(
    p: tl.tensor, o_e: tl.tensor, m_e: tl.tensor, stride: tl.tensor, N: tl.constexpr
) -> tl.tensor:
    """Load N tensors that lie `stride` apart, each at offsets o_e."""
    states = ()
    for n in tl.static_range(N):
        loaded = tl.load(p + n * stride + o_e, mask=m_e, other=0.0).to(tl.float32)
        states = states + (loaded,)  # noqa: RUF005
    return states


@triton.jit
def store_states(
    p: tl.tensor,
    o_e: tl.tensor,
    m_e: tl.tensor,
    stride: tl.tensor,
    states: tl.tensor,
    N: tl.constexpr,
) -> tl.tensor:
    """Store what `load_states` loads."""
    for n in tl.static_range(N):
        tl.store(p + n * stride + o_e, states[n], mask=m_e)


@triton.jit
def exponents(p_a: tl.tensor, o_e: tl.tensor, m_e: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """A times log2(e), from (E, N): exp(A dt) is exp2 of it times dt."""
    scaled = ()
    for n in tl.static_range(N):
        a = tl.load(p_a + o_e * N + n, mask=m_e, other=0.0)
        scaled = scaled + (a * LOG2_E,)  # noqa: RUF005
    return scaled


@triton.jit
def advance(
    states: tl.tensor,
    a: tl.tensor,
    delta: tl.tensor,
    drive: tl.tensor,
    p_b: tl.tensor,
    N: tl.constexpr,
) -> tl.tensor:
    """One step of the recurrence: exp(A delta) h + drive B, with the token's N numbers at p_b."""
    new = ()
    for n in tl.static_range(N):
        b = tl.load(p_b + n).to(tl.float32)
        new = new + (tl.exp2(a[n] * delta) * states[n] + drive * b,)  # noqa: RUF005
    return new


@triton.jit
def project(states: tl.tensor, p_c: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """C . h of every channel, with the token's N numbers of C at p_c."""
    y = states[0] * tl.load(p_c).to(tl.float32)
    for n in tl.static_range(1, N):
        y += states[n] * tl.load(p_c + n).to(tl.float32)
    return y
