"""The selective scan, forward, in three launches.

1. `chunk_ends`: every chunk from a state of zero: its end state and its sum of steps.
2. `combine`: the state at which every chunk is entered, from those and the initial state.
3. `chunk_outputs`: outputs from known states, per direction; the last one adds and gates.

Only tokens within a chunk are in sequence; a single chunk needs the last launch alone.

Sizes: S directions, B batch, L tokens, K chunks, E channels, N states. Names: p_ pointer, i_ index
of a program, o_ offset, m_ mask, s_ stride between directions (s), sequences (b), tokens (t).
Offsets along the sequence are 64 bits wide. Bit s of `reverse` is set if direction s scans from the
last token to the first; chunks are numbered in token order either way.
"""

import triton
import triton.language as tl

from gigavim_kernels.cuda.arithmetic import (
    LOG2_E,
    advance,
    exponents,
    load_states,
    project,
    row,
    sigmoid,
    step_size,
    store_states,
    zeros,
)
from gigavim_kernels.cuda.launch import SIZES


@triton.jit(do_not_specialize=SIZES)
def chunk_ends(
    p_x: tl.tensor,
    p_dt: tl.tensor,
    p_a: tl.tensor,
    p_b: tl.tensor,
    p_bias: tl.tensor,
    p_ends: tl.tensor,  # (S, B, K, N, E)
    p_sums: tl.tensor,  # (S, B, K, E)
    length: tl.tensor,
    batch: tl.tensor,
    chunk: tl.tensor,
    chunks: tl.tensor,
    E: tl.tensor,
    s_xs: tl.tensor,
    s_xb: tl.tensor,
    s_xt: tl.tensor,
    s_dts: tl.tensor,
    s_dtb: tl.tensor,
    s_dtt: tl.tensor,
    s_bs: tl.tensor,
    s_bb: tl.tensor,
    s_bt: tl.tensor,
    reverse: tl.tensor,
    N: tl.constexpr,
    BE: tl.constexpr,
    U: tl.constexpr,
) -> None:
    """End state and sum of steps of one chunk, entered with a state of zero."""
    i_e = tl.program_id(0) % tl.cdiv(E, BE)
    i_chunk = tl.program_id(0) // tl.cdiv(E, BE)  # over (S, B, K)
    i_k = i_chunk % chunks
    i_b = (i_chunk // chunks % batch).to(tl.int64)
    i_s = (i_chunk // chunks // batch).to(tl.int64)
    o_e = i_e * BE + tl.arange(0, BE)
    m_e = o_e < E
    p_x += i_s * s_xs + i_b * s_xb
    p_dt += i_s * s_dts + i_b * s_dtb
    p_b += i_s * s_bs + i_b * s_bb
    a = exponents(p_a + i_s * E * N, o_e, m_e, N)
    bias = row(p_bias + i_s * E, o_e, m_e) if p_bias is not None else 0.0

    start = i_k.to(tl.int64) * chunk
    steps = tl.minimum(chunk, length - start).to(tl.int32)
    backward = (reverse >> i_s) & 1
    first = start + backward * (steps - 1)
    sense = 1 - 2 * backward
    p_x += first * s_xt
    p_dt += first * s_dtt
    p_b += first * s_bt
    total = tl.zeros([BE], tl.float32)
    h = zeros(total, N)
    for _ in range(0, steps // U):
        for _ in tl.static_range(U):
            delta = step_size(p_dt, bias, o_e, m_e)
            h = advance(h, a, delta, delta * row(p_x, o_e, m_e), p_b, N)
            total += delta
            p_x += sense * s_xt
            p_dt += sense * s_dtt
            p_b += sense * s_bt
    for _ in range(0, steps % U):
        delta = step_size(p_dt, bias, o_e, m_e)
        h = advance(h, a, delta, delta * row(p_x, o_e, m_e), p_b, N)
        total += delta
        p_x += sense * s_xt
        p_dt += sense * s_dtt
        p_b += sense * s_bt
    o_chunk = i_chunk.to(tl.int64) * E
    store_states(p_ends + o_chunk * N, o_e, m_e, E, h, N)
    tl.store(p_sums + o_chunk + o_e, total, mask=m_e)


@triton.jit(do_not_specialize=SIZES)
def combine(
    p_ends: tl.tensor,  # (S, B, K, N, E), becomes the states at which the chunks are entered
    p_sums: tl.tensor,  # (S, B, K, E)
    p_a: tl.tensor,  # (S, E, N)
    p_first: tl.tensor,  # (S, B, E, N) or None
    p_last: tl.tensor,  # (S, B, E, N)
    p_decay: tl.tensor,  # (S, B, E, N) or None
    batch: tl.tensor,
    chunks: tl.tensor,
    E: tl.tensor,
    reverse: tl.tensor,
    N: tl.constexpr,
    BE: tl.constexpr,
    U: tl.constexpr,
) -> None:
    """Scan over the chunks, one program per sequence, state and block of channels."""
    i_e = tl.program_id(0) % tl.cdiv(E, BE)
    i_n = tl.program_id(0) // tl.cdiv(E, BE) % N
    i_sb = (tl.program_id(0) // tl.cdiv(E, BE) // N).to(tl.int64)
    i_s = i_sb // batch
    o_e = i_e * BE + tl.arange(0, BE)
    m_e = o_e < E
    o_state = (i_sb * E + o_e) * N + i_n  # (S, B, E, N)
    a = tl.load(p_a + (i_s * E + o_e) * N + i_n, mask=m_e, other=0.0) * LOG2_E
    h = tl.zeros([BE], tl.float32)
    if p_first is not None:
        h = tl.load(p_first + o_state, mask=m_e, other=0.0)

    backward = (reverse >> i_s) & 1
    first = i_sb * chunks + backward * (chunks - 1)
    sense = 1 - 2 * backward
    total = tl.zeros([BE], tl.float32)
    for i in range(0, chunks, U):
        # All loads of a round before its stores: they wait for memory together.
        ends, sums = (), ()
        for u in tl.static_range(U):
            k = first + sense * (i + u)
            m = m_e & (tl.full([BE], i + u, tl.int32) < chunks)
            ends = ends + (tl.load(p_ends + (k * N + i_n) * E + o_e, mask=m, other=0.0),)  # noqa: RUF005
            sums = sums + (tl.load(p_sums + k * E + o_e, mask=m, other=0.0),)  # noqa: RUF005
        for u in tl.static_range(U):
            k = first + sense * (i + u)
            m = m_e & (tl.full([BE], i + u, tl.int32) < chunks)
            tl.store(p_ends + (k * N + i_n) * E + o_e, h, mask=m)
            h = tl.exp2(a * sums[u]) * h + ends[u]
            total += sums[u]
    tl.store(p_last + o_state, h, mask=m_e)
    if p_decay is not None:
        tl.store(p_decay + o_state, tl.exp2(a * total), mask=m_e)


@triton.jit(do_not_specialize=SIZES)
def chunk_outputs(
    p_x: tl.tensor,
    p_dt: tl.tensor,
    p_a: tl.tensor,
    p_b: tl.tensor,
    p_c: tl.tensor,
    p_d: tl.tensor,
    p_z: tl.tensor,  # None: no gate
    p_bias: tl.tensor,
    p_starts: tl.tensor,  # (B, K, N, E)
    p_first: tl.tensor,  # (B, E, N): instead of the starts if there is one chunk
    p_last: tl.tensor,  # (B, E, N): written if there is one chunk
    p_decay: tl.tensor,  # (B, E, N): likewise
    p_y: tl.tensor,  # (B, L, E)
    length: tl.tensor,
    chunk: tl.tensor,
    chunks: tl.tensor,
    E: tl.tensor,
    s_xb: tl.tensor,
    s_xt: tl.tensor,
    s_dtb: tl.tensor,
    s_dtt: tl.tensor,
    s_bb: tl.tensor,
    s_bt: tl.tensor,
    s_cb: tl.tensor,
    s_ct: tl.tensor,
    s_zb: tl.tensor,
    s_zt: tl.tensor,
    reverse: tl.tensor,
    N: tl.constexpr,
    BE: tl.constexpr,
    U: tl.constexpr,
    WHOLE: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    """Outputs of one chunk of one direction; ADD adds those that are there already."""
    i_e = tl.program_id(0) % tl.cdiv(E, BE)
    i_chunk = (tl.program_id(0) // tl.cdiv(E, BE)).to(tl.int64)  # over (B, K)
    i_k = i_chunk % chunks
    i_b = i_chunk // chunks
    o_e = i_e * BE + tl.arange(0, BE)
    m_e = o_e < E
    o_state = i_b * E * N
    start = i_k * chunk
    steps = tl.minimum(chunk, length - start).to(tl.int32)
    p_x += i_b * s_xb
    p_dt += i_b * s_dtb
    p_b += i_b * s_bb
    p_c += i_b * s_cb
    p_y += i_b * length * E
    if p_z is not None:
        p_z += i_b * s_zb

    a = exponents(p_a, o_e, m_e, N)
    bias = row(p_bias, o_e, m_e) if p_bias is not None else 0.0
    skip = row(p_d, o_e, m_e) if p_d is not None else 0.0
    total = tl.zeros([BE], tl.float32)
    if not WHOLE:
        h = load_states(p_starts + i_chunk * N * E, o_e, m_e, E, N)
    elif p_first is not None:
        h = load_states(p_first + o_state, o_e * N, m_e, 1, N)
    else:
        h = zeros(total, N)
    first = start + reverse * (steps - 1)
    sense = 1 - 2 * reverse
    p_x += first * s_xt
    p_dt += first * s_dtt
    p_b += first * s_bt
    p_c += first * s_ct
    p_y += first * E
    if p_z is not None:
        p_z += first * s_zt
    for _ in range(0, steps // U):
        for _ in tl.static_range(U):
            delta = step_size(p_dt, bias, o_e, m_e)
            x = row(p_x, o_e, m_e)
            h = advance(h, a, delta, delta * x, p_b, N)
            store_output(project(h, p_c, N) + skip * x, p_y, p_z, o_e, m_e, ADD)
            total += delta
            p_x += sense * s_xt
            p_dt += sense * s_dtt
            p_b += sense * s_bt
            p_c += sense * s_ct
            p_y += sense * E
            if p_z is not None:
                p_z += sense * s_zt
    for _ in range(0, steps % U):
        delta = step_size(p_dt, bias, o_e, m_e)
        x = row(p_x, o_e, m_e)
        h = advance(h, a, delta, delta * x, p_b, N)
        store_output(project(h, p_c, N) + skip * x, p_y, p_z, o_e, m_e, ADD)
        total += delta
        p_x += sense * s_xt
        p_dt += sense * s_dtt
        p_b += sense * s_bt
        p_c += sense * s_ct
        p_y += sense * E
        if p_z is not None:
            p_z += sense * s_zt
    if WHOLE:
        store_states(p_last + o_state, o_e * N, m_e, 1, h, N)
        if p_decay is not None:
            for n in tl.static_range(N):
                decay = tl.exp2(a[n] * total)
                tl.store(p_decay + o_state + o_e * N + n, decay, mask=m_e)


@triton.jit
def store_output(
    y: tl.tensor,
    p_y: tl.tensor,
    p_z: tl.tensor,
    o_e: tl.tensor,
    m_e: tl.tensor,
    ADD: tl.constexpr,
) -> None:
    """Store the outputs of a token, with what is added to them and the gate."""
    if ADD:
        y += row(p_y, o_e, m_e)
    if p_z is not None:
        z = row(p_z, o_e, m_e)
        y *= z * sigmoid(z)
    tl.store(p_y + o_e, y.to(p_y.dtype.element_ty), mask=m_e)
