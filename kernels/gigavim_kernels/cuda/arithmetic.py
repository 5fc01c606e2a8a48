"""Functions that the kernels share. Everything is computed in float32.

The N states of BE channels are a tile (N, BE) whose layout is Triton's plain one for two
dimensions: lanes along the channels, all states of a channel in one thread, so that sums over the
states need no exchange between threads. A two-dimensional load would impose its own layout on the
tile, which is why states come and go as N rows (`load_states`, `store_states`), once per chunk.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


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
    """Logistic function; the square of a root's reciprocal takes no division."""
    root = tl.rsqrt(1.0 + tl.exp2(-x * LOG2_E))
    return root * root


@triton.jit
def multiplied(left: tl.tensor, right: tl.tensor, total: tl.tensor) -> tl.tensor:
    """left @ right + total, summed in float32; of 16 bits, which the matrix units take."""
    if INTERPRETED:  # it holds bfloat16 as integers and would multiply those
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total)


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
    parts: tl.tensor = (tile,)
    for s in tl.static_range(10):
        if (N >> s) > 1:
            shorter = ()
            for i in tl.static_range(1 << s):
                pairs = tl.reshape(parts[i], (2, N >> (s + 1), tile.shape[1]))
                shorter = shorter + tl.split(tl.permute(pairs, (1, 2, 0)))
            parts = shorter
    for n in tl.static_range(N):
        row = tl.reshape(parts[n], (tile.shape[1],))
        tl.store(p + n * stride + o_e, row.to(p.dtype.element_ty))


@triton.jit
def halves(bc: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """B and C of a token, N numbers each, from the row that holds both."""
    return tl.split(tl.trans(tl.reshape(bc, (2, N))))


@triton.jit
def load_rates(
    p_a: tl.tensor, o_e: tl.tensor, N: tl.constexpr, BE: tl.constexpr, TIED: tl.constexpr
) -> tl.tensor:
    """A log2(e) of the channels o_e: a tile (N, BE), or a row (BE,) of state 0's if TIED."""
    a = tl.load(p_a + o_e) if TIED else load_states(p_a, o_e * N, 1, N, BE)
    return a * LOG2_E


@triton.jit
def _below(row: tl.tensor, DIMS: tl.constexpr) -> tl.tensor:
    """Give a row more dimensions, of one each, after its own."""
    for _ in tl.static_range(DIMS):
        row = tl.expand_dims(row, -1)
    return row


@triton.jit
def decays(
    a: tl.tensor, delta: tl.tensor, N: tl.constexpr, TIED: tl.constexpr, factor: tl.tensor = None
) -> tl.tensor:
    """exp(A delta), a tile (N, BE), times a row if given; a is what `load_rates` returned.

    If TIED, state n decays n + 1 times as fast as state 0. The decays of the states 0, 4, 8, ...
    are exponentials, the others products of them with the first one's powers: no more than four
    rounded factors each, and the special function units have a quarter of the work.
    """
    if TIED:
        step = a * delta
        power = tl.exp2(step)
        tile = step
        for s in tl.static_range(10):  # a dimension of two each time, of the largest leap first
            if (N >> s) >= 8:
                tile = tl.join(tile, tile + (N >> (s + 1)) * _below(step, s))
        tile = tl.exp2(tile)
        if factor is not None:  # here a quarter of the tile
            tile *= _below(factor, len(tile.shape) - 1)
        if N >= 4:
            tile = tl.join(tile, tile * _below(power * power, len(tile.shape) - 1))
        if N >= 2:
            tile = tl.join(tile, tile * _below(power, len(tile.shape) - 1))
        found = tl.trans(tl.reshape(tile, (delta.shape[0], N)))
    else:
        found = tl.exp2(a * delta[None, :])
        if factor is not None:
            found *= factor[None, :]
    return found


@triton.jit
def advance(
    h: tl.tensor,
    a: tl.tensor,
    delta: tl.tensor,
    x: tl.tensor,
    b: tl.tensor,
    N: tl.constexpr,
    TIED: tl.constexpr,
) -> tl.tensor:
    """One step of the recurrence: exp(A delta) h + delta x B; a is what `load_rates` returned."""
    return decays(a, delta, N, TIED) * h + (delta * x)[None, :] * b[:, None]
