"""The gradients of the scan, from its inputs and the states that it marked every MARK tokens.

With l_t = dL/dh_t and g_t = dL/d(C_t . h_t) the adjoint recurrence runs against the scan:

    l_t = g_t C_t + exp(delta_{t+1} A) l_{t+1}

1. `chunk_adjoints`: every chunk from zero: what it adds to dL/dh at its entry.
2. `scan_kernels.combine`, against the scan: dL/dh at the exit of every chunk.
3. `chunk_gradients`: from the last mark of a chunk to the first: all states between two marks go to
   a scratch tensor, small enough to stay in the second-level cache; then all gradients, token by
   token from the last to the first. The scratch of rows of 16 bits is bfloat16 where its rows fill
   four bytes a lane, the least that is copied ahead.

Sums over tokens are kept per chunk and sums over channels per block of channels; the caller adds
them up in a fixed order, so that two runs give the same bits. Names as in `scan_kernels`.
"""

import triton
import triton.language as tl

from gigavim_kernels.cuda.arithmetic import (
    advance,
    channels,
    decays,
    halves,
    lanes,
    load_rates,
    load_states,
    sigmoid,
    softplus,
    store_states,
)
from gigavim_kernels.cuda.launch import SIZES

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _exchange(rows: tl.tensor, STEP: tl.constexpr, HALF: tl.constexpr) -> tl.tensor:
    """Lanes STEP apart share 2 HALF rows of 32 numbers: each keeps HALF of them, summed."""
    lane = tl.arange(0, 32)
    upper = ((lane & STEP) != 0)[None, :]
    low, high = tl.split(tl.permute(tl.reshape(rows, (2, HALF, 32)), (1, 2, 0)))
    partner = tl.broadcast_to((lane ^ STEP)[None, :], (HALF, 32))
    given = tl.gather(tl.where(upper, low, high), partner, 1)
    return tl.where(upper, high, low) + given


@triton.jit
def sum_lanes(rows: tl.tensor, N: tl.constexpr, BE: tl.constexpr) -> tl.tensor:
    """Sum each of N rows of BE numbers over its lanes: lane i returns the sum of row i N // 32.

    Lanes pair up and each keeps half of the rows: as many exchanges as rows, in place of five each.
    """
    if BE > 32:
        rows = tl.sum(tl.reshape(rows, (N, 32, BE // 32)), 2)  # neighbours of one lane
    for s in tl.static_range(5):
        if (N >> s) > 1:
            rows = _exchange(rows, 16 >> s, N >> (s + 1))
    row = tl.reshape(rows, (32,))
    for s in tl.static_range(5):
        if (N >> s) <= 1:
            row += tl.gather(row, tl.arange(0, 32) ^ (16 >> s), 0)
    return row


@triton.jit(do_not_specialize=SIZES)
def chunk_adjoints(
    p_dy: tl.tensor,  # (B, L, E)
    p_z: tl.tensor,
    p_dt: tl.tensor,
    p_bc: tl.tensor,
    p_a: tl.tensor,  # (E, N)
    p_bias: tl.tensor,
    p_ends: tl.tensor,  # (B, K, N, E)
    p_sums: tl.tensor,  # (B, K, E)
    length: tl.tensor,
    chunk: tl.tensor,
    chunks: tl.tensor,
    s_zb: tl.tensor,
    s_zt: tl.tensor,
    s_dtb: tl.tensor,
    s_dtt: tl.tensor,
    reverse: tl.tensor,
    E: tl.constexpr,
    N: tl.constexpr,
    TIED: tl.constexpr,
    BE: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
) -> None:
    """dL/dh at the entry of one chunk if nothing came from behind its exit; its sum of steps.

    In scan order, as a sum: what a token gives has decayed by the steps up to it.
    """
    i_e = tl.program_id(0) % tl.cdiv(E, BE)
    i_chunk = (tl.program_id(0) // tl.cdiv(E, BE)).to(tl.int64)  # over (B, K)
    i_k = i_chunk % chunks
    i_b = i_chunk // chunks
    o_e = channels(i_e, E, BE)
    o_lane = o_e if TIED else lanes(i_e, E, BE)  # a tile of tied rates lies as its rows do
    a = load_rates(p_a, o_lane, N, BE, TIED)
    bias = tl.load(p_bias + o_e) if p_bias is not None else 0.0

    start = i_k * chunk
    steps = tl.minimum(chunk, length - start).to(tl.int32)
    first = start + reverse * (steps - 1)
    sense = 1 - 2 * reverse
    p_dy += (i_b * length + first) * E
    p_dt += i_b * s_dtb + first * s_dtt
    p_bc += (i_b * length + first) * 2 * N
    if p_z is not None:
        p_z += i_b * s_zb + first * s_zt
    total = tl.zeros([BE], tl.float32)
    adjoint = tl.zeros([N, BE], tl.float32)
    for _ in tl.range(0, steps, num_stages=STAGES, loop_unroll_factor=UNROLL):
        g = tl.load(p_dy + o_e).to(tl.float32)
        dt = tl.load(p_dt + o_e).to(tl.float32)
        _b, c = halves(tl.load(p_bc + tl.arange(0, 2 * N)), N)
        if p_z is not None:
            z = tl.load(p_z + o_e).to(tl.float32)
            g *= z * sigmoid(z)
            p_z += sense * s_zt
        delta = softplus(dt + bias)
        total += delta
        adjoint += decays(a, total, N, TIED, g) * c[:, None]
        p_dy += sense * E
        p_dt += sense * s_dtt
        p_bc += sense * 2 * N
    store_states(p_ends + i_chunk * N * E, o_lane, E, adjoint, N)
    tl.store(p_sums + i_chunk * E + o_e, total)


@triton.jit(do_not_specialize=SIZES)
def chunk_gradients(
    p_dy: tl.tensor,  # (B, L, E)
    p_x: tl.tensor,
    p_z: tl.tensor,
    p_dt: tl.tensor,
    p_bc: tl.tensor,
    p_a: tl.tensor,  # (E, N)
    p_d: tl.tensor,
    p_bias: tl.tensor,
    p_marks: tl.tensor,  # (B, tokens / MARK, N, E)
    p_exits: tl.tensor,  # (B, K, N, E), dL/dh at the exits of the chunks
    p_each: tl.tensor,  # (B, E), added to the gradient of every step, or None
    p_scratch: tl.tensor,  # (programs, MARK, N, BE)
    p_dx: tl.tensor,  # (B, L, E)
    p_ddt: tl.tensor,  # (B, L, E)
    p_dz: tl.tensor,  # (B, L, E) or None
    p_dbc: tl.tensor,  # (blocks of channels, B, L, 2 N)
    p_da: tl.tensor,  # (B, K, N, E)
    p_dd: tl.tensor,  # (B, K, E)
    p_dbias: tl.tensor,  # (B, K, E)
    p_dfirst: tl.tensor,  # (B, E, N), written if there is one chunk
    length: tl.tensor,
    batch: tl.tensor,
    chunk: tl.tensor,
    chunks: tl.tensor,
    s_xb: tl.tensor,
    s_xt: tl.tensor,
    s_zb: tl.tensor,
    s_zt: tl.tensor,
    s_dtb: tl.tensor,
    s_dtt: tl.tensor,
    reverse: tl.tensor,
    E: tl.constexpr,
    N: tl.constexpr,
    TIED: tl.constexpr,
    BE: tl.constexpr,
    MARK: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """All gradients of one chunk."""
    i_e = tl.program_id(0) % tl.cdiv(E, BE)
    i_chunk = (tl.program_id(0) // tl.cdiv(E, BE)).to(tl.int64)  # over (B, K)
    i_k = i_chunk % chunks
    i_b = i_chunk // chunks
    lane = tl.arange(0, BE)
    o_e = channels(i_e, E, BE)
    o_lane = o_e if TIED else lanes(i_e, E, BE)  # a tile of tied rates lies as its rows do
    o_bc = tl.arange(0, 2 * N)
    o_sum = tl.arange(0, 32) * N // 32  # where sum_lanes leaves which sum
    m_sum = tl.arange(0, 32) % (32 // N) == 0
    start = i_k * chunk
    steps = tl.minimum(chunk, length - start).to(tl.int32)
    first = start + reverse * (steps - 1)
    sense = (1 - 2 * reverse).to(tl.int64)
    p_dy += (i_b * length + first) * E + o_e
    p_dx += (i_b * length + first) * E + o_e
    p_ddt += (i_b * length + first) * E + o_e
    p_x += i_b * s_xb + first * s_xt + o_e
    p_dt += i_b * s_dtb + first * s_dtt + o_e
    p_bc += (i_b * length + first) * 2 * N
    p_dbc += ((i_e.to(tl.int64) * batch + i_b) * length + first) * 2 * N + o_sum
    p_marks += (i_b * tl.cdiv(length, MARK) + start // MARK) * N * E
    p_scratch += tl.program_id(0).to(tl.int64) * MARK * N * BE
    if p_z is not None:
        p_z += i_b * s_zb + first * s_zt + o_e
        p_dz += (i_b * length + first) * E + o_e
    a = load_rates(p_a, o_lane, N, BE, TIED)
    bias = tl.load(p_bias + o_e) if p_bias is not None else 0.0
    skip = tl.load(p_d + o_e) if p_d is not None else 0.0
    each = tl.load(p_each + i_b * E + o_e) if p_each is not None else 0.0

    adjoint = load_states(p_exits + i_chunk * N * E, o_lane, E, N, BE)
    sum_a = tl.zeros_like(a)
    sum_d = tl.zeros([BE], tl.float32)
    sum_bias = tl.zeros([BE], tl.float32)
    marks = tl.cdiv(steps, MARK)
    for i_mark in range(0, marks):
        mark = marks - 1 - i_mark
        tokens = tl.minimum(MARK, steps - mark * MARK)
        h = load_states(p_marks + mark.to(tl.int64) * N * E, o_lane, E, N, BE)
        for j in tl.range(0, tokens, num_stages=STAGES):
            t = sense * (mark * MARK + j)
            store_states(p_scratch + j * N * BE, lane, BE, h, N)
            x = tl.load(p_x + t * s_xt).to(tl.float32)
            delta = softplus(tl.load(p_dt + t * s_dtt).to(tl.float32) + bias)
            b, _c = halves(tl.load(p_bc + t * 2 * N + o_bc), N)
            h = advance(h, a, delta, x, b, N, TIED)
        tl.debug_barrier()  # what was stored is copied to shared memory ahead of its use below
        for i in tl.range(0, tokens, num_stages=STAGES):
            j = tokens - 1 - i
            t = sense * (mark * MARK + j)
            before = load_states(p_scratch + j * N * BE, lane, BE, N, BE)
            x = tl.load(p_x + t * s_xt).to(tl.float32)
            raw = tl.load(p_dt + t * s_dtt).to(tl.float32) + bias
            dy = tl.load(p_dy + t * E).to(tl.float32)
            b, c = halves(tl.load(p_bc + t * 2 * N + o_bc), N)
            delta = softplus(raw)
            g = dy
            if p_z is not None:
                z = tl.load(p_z + t * s_zt).to(tl.float32)
                gate = sigmoid(z)
                y = tl.sum(h * c[:, None], 0) + skip * x
                d_z = dy * y * gate * (1.0 + z * (1.0 - gate))
                tl.store(p_dz + t * E, d_z.to(p_dz.dtype.element_ty))
                g *= z * gate
            drive = delta * x
            g_once: tl.tensor = g
            if E % BE != 0:  # a channel that stands twice counts once in sums over channels
                once = i_e * BE + lane < E
                drive = tl.where(once, drive, 0.0)
                g_once = tl.where(once, g, 0.0)
            adjoint += g[None, :] * c[:, None]
            d_drive = tl.sum(adjoint * b[:, None], 0)
            d_b = sum_lanes(adjoint * drive[None, :], N, BE)
            d_c = sum_lanes(h * g_once[None, :], N, BE)
            adjoint *= decays(a, delta, N, TIED)
            decayed = adjoint * before
            if TIED:
                at_once = tl.sum((tl.arange(0, N) + 1.0)[:, None] * decayed, 0)
                d_exponent = a * at_once * LN_2  # a is for exp2
                sum_a += delta * at_once
            else:
                d_exponent = tl.sum(a * decayed, 0) * LN_2
                sum_a += delta[None, :] * decayed
            d_raw = (d_drive * x + d_exponent + each) * sigmoid(raw)
            d_x = d_drive * delta + g * skip
            sum_d += g * x
            sum_bias += d_raw
            tl.store(p_dx + t * E, d_x.to(p_dx.dtype.element_ty))
            tl.store(p_ddt + t * E, d_raw.to(p_ddt.dtype.element_ty))
            tl.store(p_dbc + t * 2 * N, d_b, mask=m_sum)
            tl.store(p_dbc + t * 2 * N + N, d_c, mask=m_sum)
            h = before
        tl.debug_barrier()  # before the scratch is written again
    if TIED:
        tl.store(p_da + i_chunk * E + o_e, sum_a)
    else:
        store_states(p_da + i_chunk * N * E, o_e, E, sum_a, N)
    tl.store(p_dd + i_chunk * E + o_e, sum_d)
    tl.store(p_dbias + i_chunk * E + o_e, sum_bias)
    if WHOLE:
        store_states(p_dfirst + i_b * E * N, o_e * N, 1, adjoint, N)
