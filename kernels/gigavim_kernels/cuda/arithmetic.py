"""Functions that the kernels share. Everything is computed in float32.

The N states of BE channels are a tile (N, BE) whose layout is Triton's plain one for two
dimensions: lanes along the channels, all states of a channel in one thread, so that sums over the
states need no exchange between threads. A two-dimensional load would impose its own layout on the
tile, which is why states come and go as N rows (`load_states`, `store_states`), once per chunk.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softplus(x: tl.tensor) -> tl.tensor:
    """max(x, 0) + log(1 + exp(-|x|)), accurate to float32's rounding for any x.

    log(1 + e) = e p(e) with the polynomial that interpolates log(1 + e) / e in the Chebyshev nodes
    of [0, 1]: within 3.4e-8 of it, and the small steps of a trained model keep their digits. One
    exponential: the special function units are what the scan waits for.
    """
    e = tl.exp2(-tl.abs(x) * LOG2_E)
    p = 0.005126102361828089 * e - 0.029074065387248993
    p = p * e + 0.0775160863995552
    p = p * e - 0.13602247834205627
    p = p * e + 0.19076880812644958
    p = p * e - 0.2483539879322052
    p = p * e + 0.3331812024116516
    p = p * e - 0.4999944567680359
    p = p * e + 0.9999999403953552
    return tl.maximum(x, 0.0) + e * p


@triton.jit
def sigmoid(x: tl.tensor) -> tl.tensor:
    """Logistic function."""
    return 1.0 / (1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def channels(i_e: tl.tensor, E: tl.constexpr, BE: tl.constexpr) -> tl.tensor:
    """Offsets of block i_e's channels; in place of those beyond the last, the last one again.

    What stands twice is computed and stored twice, the same number each time. In whole blocks they
    are plainly in order: a lane takes two neighbours of 16 bits in one load.
    """
    o_e = i_e * BE + tl.arange(0, BE)
    if E % BE != 0:
        o_e = tl.minimum(o_e, E - 1)
    return o_e


@triton.jit
def lanes(i_e: tl.tensor, E: tl.constexpr, BE: tl.constexpr) -> tl.tensor:
    """The same offsets, one channel a lane.

    The minimum hides from the compiler that they are in order: rows loaded so lie as the tile's do.
    """
    return tl.minimum(i_e * BE + tl.arange(0, BE), E - 1)


@triton.jit
def load_states(
    p: tl.tensor, o_e: tl.tensor, stride: tl.tensor, N: tl.constexpr, BE: tl.constexpr
) -> tl.tensor:
    """A tile (N, BE) of N rows that lie `stride` apart, each at the offsets o_e."""
    tile = tl.zeros([N, BE], tl.float32)
    for n in tl.static_range(N):
        row = tl.load(p + n * stride + o_e).to(tl.float32)
        tile = tl.where((tl.arange(0, N) == n)[:, None], row[None, :], tile)
    return tile


@triton.jit
def store_states(
    p: tl.tensor, o_e: tl.tensor, stride: tl.tensor, tile: tl.tensor, N: tl.constexpr
) -> tl.tensor:
    """Store what `load_states` loads."""
    for n in tl.static_range(N):
        row = tl.sum(tl.where((tl.arange(0, N) == n)[:, None], tile, 0.0), 0)
        tl.store(p + n * stride + o_e, row)


@triton.jit
def halves(bc: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """B and C of a token, N numbers each, from the row that holds both."""
    return tl.split(tl.trans(tl.reshape(bc, (2, N))))


@triton.jit
def advance(h: tl.tensor, a: tl.tensor, delta: tl.tensor, x: tl.tensor, b: tl.tensor) -> tl.tensor:
    """One step of the recurrence: exp(A delta) h + delta x B; a is A log2(e)."""
    return tl.exp2(a * delta[None, :]) * h + (delta * x)[None, :] * b[:, None]
