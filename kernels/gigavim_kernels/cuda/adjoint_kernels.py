"""The gradients of the scan, from its inputs and the states at which chunks are entered.

With l_t = dL/dh_t and g_t = dL/d(C_t . h_t) the adjoint recurrence runs against the scan:

    l_t = g_t C_t + exp(delta_{t+1} A) l_{t+1}

1. `chunk_adjoints`: every chunk from zero: what it adds to dL/dh at its entry.
2. `scan_kernels.combine`, against the scan: dL/dh at the exit of every chunk.
3. `chunk_gradients`: hidden states again, groups of U tokens from the last to the first, and with
   them all gradients. The states at which the groups are entered lie in a scratch tensor meanwhile.

Sums over tokens are kept per chunk and sums over channels per block of channels; the caller adds
them up in a fixed order, so that two runs give the same bits. Names as in `scan_kernels`.
"""

import triton
import triton.language as tl

from gigavim_kernels.cuda.arithmetic import (
    advance,
    exponents,
    load_states,
    row,
    sigmoid,
    softplus,
    step_size,
    store_states,
    zeros,
)
from gigavim_kernels.cuda.launch import SIZES

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def output_gradient(
    p_dy: tl.tensor,
    p_z: tl.tensor,
    s_zt: tl.tensor,
    t: tl.tensor,
    E: tl.tensor,
    o_e: tl.tensor,
    m_e: tl.tensor,
) -> tl.tensor:
    """Gradient of a token's outputs before the gate."""
    g = row(p_dy + t * E, o_e, m_e)
    if p_z is not None:
        z = row(p_z + t * s_zt, o_e, m_e)
        g *= z * sigmoid(z)
    return g


@triton.jit
def retreat(
    adjoint: tl.tensor,
    a: tl.tensor,
    delta: tl.tensor,
    g: tl.tensor,
    p_c: tl.tensor,
    N: tl.constexpr,
) -> tl.tensor:
    """One step of the adjoint recurrence: exp(A delta) (l + g C)."""
    new = ()
    for n in tl.static_range(N):
        c = tl.load(p_c + n).to(tl.float32)
        new = new + (tl.exp2(a[n] * delta) * (adjoint[n] + g * c),)  # noqa: RUF005
    return new


@triton.jit
def sum_lanes(values: tl.tensor, N: tl.constexpr) -> tl.tensor:
    """Sum each of N rows of 32 numbers over its lanes: lane i returns the sum of row i N // 32.

    Lanes pair up and each keeps half of the rows: as many exchanges as rows, in place of five each.
    """
    lane = tl.arange(0, 32)
    for s in tl.static_range(5):
        partner = lane ^ (16 >> s)
        upper = (lane & (16 >> s)) != 0
        if (N >> s) > 1:
            kept = ()
            for i in tl.static_range(N >> (s + 1)):
                low, high = values[i], values[i + (N >> (s + 1))]
                given = tl.gather(tl.where(upper, low, high), partner, 0)
                kept = kept + (tl.where(upper, high, low) + given,)  # noqa: RUF005
            values = kept
        else:
            values = (values[0] + tl.gather(values[0], partner, 0),)
    return values[0]


@triton.jit(do_not_specialize=SIZES)
def chunk_adjoints(
    p_dy: tl.tensor,  # (B, L, E)
    p_z: tl.tensor,
    p_dt: tl.tensor,
    p_a: tl.tensor,  # (E, N)
    p_c: tl.tensor,
    p_bias: tl.tensor,
    p_ends: tl.tensor,  # (B, K, N, E)
    p_sums: tl.tensor,  # (B, K, E)
    length: tl.tensor,
    chunk: tl.tensor,
    chunks: tl.tensor,
    E: tl.tensor,
    s_zb: tl.tensor,
    s_zt: tl.tensor,
    s_dtb: tl.tensor,
    s_dtt: tl.tensor,
    s_cb: tl.tensor,
    s_ct: tl.tensor,
    reverse: tl.tensor,
    N: tl.constexpr,
    BE: tl.constexpr,
    U: tl.constexpr,
) -> None:
    """dL/dh at the entry of one chunk if nothing came from behind its exit; its sum of steps."""
    i_e = tl.program_id(0) % tl.cdiv(E, BE)
    i_chunk = (tl.program_id(0) // tl.cdiv(E, BE)).to(tl.int64)  # over (B, K)
    i_k = i_chunk % chunks
    i_b = i_chunk // chunks
    o_e = i_e * BE + tl.arange(0, BE)
    m_e = o_e < E
    start = i_k * chunk
    steps = tl.minimum(chunk, length - start).to(tl.int32)
    p_dy += i_b * length * E
    p_z = p_z + i_b * s_zb if p_z is not None else p_z
    p_dt += i_b * s_dtb
    p_c += i_b * s_cb
    a = exponents(p_a, o_e, m_e, N)
    bias = row(p_bias, o_e, m_e) if p_bias is not None else 0.0
    total = tl.zeros([BE], tl.float32)
    adjoint = zeros(total, N)
    last = start + (1 - reverse) * (steps - 1)
    sense = 1 - 2 * reverse
    for i in range(0, steps // U):
        for u in tl.static_range(U):
            t = last - sense * (i * U + u)
            delta = step_size(p_dt + t * s_dtt, bias, o_e, m_e)
            g = output_gradient(p_dy, p_z, s_zt, t, E, o_e, m_e)
            adjoint = retreat(adjoint, a, delta, g, p_c + t * s_ct, N)
            total += delta
    for i in range(steps // U * U, steps):
        t = last - sense * i
        delta = step_size(p_dt + t * s_dtt, bias, o_e, m_e)
        g = output_gradient(p_dy, p_z, s_zt, t, E, o_e, m_e)
        adjoint = retreat(adjoint, a, delta, g, p_c + t * s_ct, N)
        total += delta
    store_states(p_ends + i_chunk * N * E, o_e, m_e, E, adjoint, N)
    tl.store(p_sums + i_chunk * E + o_e, total, mask=m_e)


@triton.jit(do_not_specialize=SIZES)
def chunk_gradients(
    p_dy: tl.tensor,  # (B, L, E)
    p_x: tl.tensor,
    p_z: tl.tensor,
    p_dt: tl.tensor,
    p_a: tl.tensor,  # (E, N)
    p_b: tl.tensor,
    p_c: tl.tensor,
    p_d: tl.tensor,
    p_bias: tl.tensor,
    p_starts: tl.tensor,  # (B, K, N, E), the states at which chunks are entered
    p_exits: tl.tensor,  # (B, K, N, E), dL/dh at their exits
    p_each: tl.tensor,  # (B, E), added to the gradient of every step, or None
    p_scratch: tl.tensor,  # (B, K, groups, N, E)
    p_dx: tl.tensor,  # (B, L, E)
    p_ddt: tl.tensor,  # (B, L, E)
    p_dz: tl.tensor,  # (B, L, E) or None
    p_db: tl.tensor,  # (blocks of channels, B, L, N)
    p_dc: tl.tensor,  # (blocks of channels, B, L, N)
    p_da: tl.tensor,  # (B, K, N, E)
    p_dd: tl.tensor,  # (B, K, E)
    p_dbias: tl.tensor,  # (B, K, E)
    p_dfirst: tl.tensor,  # (B, E, N), written if there is one chunk
    length: tl.tensor,
    batch: tl.tensor,
    chunk: tl.tensor,
    chunks: tl.tensor,
    E: tl.tensor,
    s_xb: tl.tensor,
    s_xt: tl.tensor,
    s_zb: tl.tensor,
    s_zt: tl.tensor,
    s_dtb: tl.tensor,
    s_dtt: tl.tensor,
    s_bb: tl.tensor,
    s_bt: tl.tensor,
    s_cb: tl.tensor,
    s_ct: tl.tensor,
    reverse: tl.tensor,
    N: tl.constexpr,
    BE: tl.constexpr,
    U: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """All gradients of one chunk."""
    i_e = tl.program_id(0) % tl.cdiv(E, BE)
    i_chunk = (tl.program_id(0) // tl.cdiv(E, BE)).to(tl.int64)  # over (B, K)
    i_k = i_chunk % chunks
    i_b = i_chunk // chunks
    o_e = i_e * BE + tl.arange(0, BE)
    m_e = o_e < E
    o_n = tl.arange(0, BE) * N // BE
    start = i_k * chunk
    steps = tl.minimum(chunk, length - start).to(tl.int32)
    p_dy += i_b * length * E
    p_dx += i_b * length * E
    p_ddt += i_b * length * E
    p_x += i_b * s_xb
    p_dt += i_b * s_dtb
    p_b += i_b * s_bb
    p_c += i_b * s_cb
    if p_z is not None:
        p_z += i_b * s_zb
        p_dz += i_b * length * E
    p_db += (i_e.to(tl.int64) * batch + i_b) * length * N
    p_dc += (i_e.to(tl.int64) * batch + i_b) * length * N
    p_scratch += i_chunk * tl.cdiv(chunk, U) * N * E
    a = exponents(p_a, o_e, m_e, N)
    bias = row(p_bias, o_e, m_e) if p_bias is not None else 0.0
    skip = row(p_d, o_e, m_e) if p_d is not None else 0.0
    each = row(p_each + i_b * E, o_e, m_e) if p_each is not None else 0.0
    first = start + reverse * (steps - 1)
    sense = 1 - 2 * reverse
    groups = tl.cdiv(steps, U)

    h = load_states(p_starts + i_chunk * N * E, o_e, m_e, E, N)
    for j in range(0, groups - 1):
        store_states(p_scratch, o_e, m_e, E, h, N)
        p_scratch += N * E
        for u in tl.static_range(U):
            t = first + sense * (j * U + u)
            delta = step_size(p_dt + t * s_dtt, bias, o_e, m_e)
            h = advance(h, a, delta, delta * row(p_x + t * s_xt, o_e, m_e), p_b + t * s_bt, N)
    store_states(p_scratch, o_e, m_e, E, h, N)

    adjoint = load_states(p_exits + i_chunk * N * E, o_e, m_e, E, N)
    sum_d = tl.zeros([BE], tl.float32)
    sum_bias = tl.zeros([BE], tl.float32)
    sum_a = zeros(sum_d, N)
    for i in range(0, groups):
        j = groups - 1 - i
        hidden = (load_states(p_scratch, o_e, m_e, E, N),)
        p_scratch -= N * E
        raws, deltas, inputs = (), (), ()
        for u in tl.static_range(U):
            # Beyond the end of the chunk: the last token again, with a step of zero.
            inside = tl.full([BE], j * U + u, tl.int32) < steps
            t = first + sense * tl.minimum(j * U + u, steps - 1)
            raw = row(p_dt + t * s_dtt, o_e, m_e) + bias
            x = row(p_x + t * s_xt, o_e, m_e)
            delta = tl.where(inside, softplus(raw), 0.0)
            hidden = hidden + (advance(hidden[u], a, delta, delta * x, p_b + t * s_bt, N),)  # noqa: RUF005
            raws = raws + (raw,)  # noqa: RUF005
            deltas = deltas + (delta,)  # noqa: RUF005
            inputs = inputs + (x,)  # noqa: RUF005
        for u in tl.static_range(U - 1, -1, -1):
            inside = tl.full([BE], j * U + u, tl.int32) < steps
            t = first + sense * tl.minimum(j * U + u, steps - 1)
            m_t = m_e & inside
            delta, x = deltas[u], inputs[u]
            g = row(p_dy + t * E, o_e, m_t)
            if p_z is not None:
                dy = g
                z = row(p_z + t * s_zt, o_e, m_e)
                gate = sigmoid(z)
                g *= z * gate
            d_drive = tl.zeros([BE], tl.float32)
            d_exponent = tl.zeros([BE], tl.float32)  # of exp2, times delta
            y = skip * x
            db = ()
            dc = ()
            carried = ()
            sums = ()
            for n in tl.static_range(N):
                b = tl.load(p_b + t * s_bt + n).to(tl.float32)
                c = tl.load(p_c + t * s_ct + n).to(tl.float32)
                l = adjoint[n] + g * c  # noqa: E741
                d_drive += l * b
                y += hidden[u + 1][n] * c
                db = db + (l * (delta * x),)  # noqa: RUF005
                dc = dc + (g * hidden[u + 1][n],)  # noqa: RUF005
                l = l * tl.exp2(a[n] * delta)  # noqa: E741
                decayed = l * hidden[u][n]
                d_exponent += a[n] * decayed
                sums = sums + (sum_a[n] + delta * decayed,)  # noqa: RUF005
                carried = carried + (l,)  # noqa: RUF005
            adjoint = carried
            sum_a = sums
            d_raw = (d_drive * x + d_exponent * LN_2 + each) * sigmoid(raws[u])
            d_x = d_drive * delta + g * skip
            sum_d += g * x
            sum_bias += tl.where(inside, d_raw, 0.0)
            tl.store(p_dx + t * E + o_e, d_x.to(p_dx.dtype.element_ty), mask=m_t)
            tl.store(p_ddt + t * E + o_e, d_raw.to(p_ddt.dtype.element_ty), mask=m_t)
            if p_z is not None:
                d_z = dy * y * gate * (1.0 + z * (1.0 - gate))
                tl.store(p_dz + t * E + o_e, d_z.to(p_dz.dtype.element_ty), mask=m_t)
            m_n = inside & (tl.arange(0, BE) % (BE // N) == 0)
            tl.store(p_db + t * N + o_n, sum_lanes(db, N), mask=m_n)
            tl.store(p_dc + t * N + o_n, sum_lanes(dc, N), mask=m_n)
    store_states(p_da + i_chunk * N * E, o_e, m_e, E, sum_a, N)
    tl.store(p_dd + i_chunk * E + o_e, sum_d, mask=m_e)
    tl.store(p_dbias + i_chunk * E + o_e, sum_bias, mask=m_e)
    if WHOLE:
        store_states(p_dfirst + i_b * E * N, o_e * N, m_e, 1, adjoint, N)
