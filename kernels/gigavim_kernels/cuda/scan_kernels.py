"""The selective scan, forward, in three launches.

1. `chunk_ends`: every chunk from a state of zero: its end state and its sum of steps.
2. `combine`: the state at which every chunk is entered, from those and the initial state.
3. `chunk_outputs`: outputs from known states, per direction; the last one adds and gates.

Only tokens within a chunk are in sequence; a single chunk needs the last launch alone. A program
is one warp. The rows of the next tokens are copied to shared memory while one is computed (that is
what `num_stages` of a loop asks for); read when needed, they would cost more than the arithmetic.

Sizes: S directions, B batch, L tokens, K chunks, E channels, N states. Names: p_ pointer, i_ index
of a program, o_ offset, m_ mask, s_ stride between directions (s), sequences (b), tokens (t).
Offsets along the sequence are 64 bits wide. Bit s of `reverse` is set if direction s scans from the
last token to the first; chunks are numbered in token order either way. p_bc: B and C of a token,
one after the other, float32: (S, B, L, 2 N) or without S. STEPS: what p_dt points to are the
steps, softplus(dt + bias), already.
"""

import triton
import triton.language as tl

from gigavim_kernels.cuda.arithmetic import (
    LOG2_E,
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


@triton.jit(do_not_specialize=SIZES)
def chunk_ends(
    p_x: tl.tensor,
    p_dt: tl.tensor,
    p_bc: tl.tensor,
    p_a: tl.tensor,
    p_bias: tl.tensor,
    p_ends: tl.tensor,  # (S, B, K, N, E)
    p_sums: tl.tensor,  # (S, B, K, E)
    length: tl.tensor,
    batch: tl.tensor,
    chunk: tl.tensor,
    chunks: tl.tensor,
    s_xs: tl.tensor,
    s_xb: tl.tensor,
    s_xt: tl.tensor,
    s_dts: tl.tensor,
    s_dtb: tl.tensor,
    s_dtt: tl.tensor,
    reverse: tl.tensor,
    E: tl.constexpr,
    N: tl.constexpr,
    TIED: tl.constexpr,
    STEPS: tl.constexpr,
    BE: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
) -> None:
    """End state and sum of steps of one chunk, entered with a state of zero.

    From its last token to its first: what a token adds to the end state has decayed by the steps
    after it, whose sum is known here. Of tied rates a third of the products of a recurrence go.
    """
    i_e = tl.program_id(0) % tl.cdiv(E, BE)
    i_chunk = (tl.program_id(0) // tl.cdiv(E, BE)).to(tl.int64)  # over (S, B, K)
    i_k = i_chunk % chunks
    i_b = i_chunk // chunks % batch
    i_s = i_chunk // chunks // batch
    o_e = channels(i_e, E, BE)
    o_lane = o_e if TIED else lanes(i_e, E, BE)  # a tile of tied rates lies as its rows do
    a = load_rates(p_a + i_s * E * (1 if TIED else N), o_lane, N, BE, TIED)
    bias = tl.load(p_bias + i_s * E + o_e) if p_bias is not None else 0.0

    start = i_k * chunk
    steps = tl.minimum(chunk, length - start).to(tl.int32)
    backward = (reverse >> i_s) & 1
    last = start + (1 - backward) * (steps - 1)
    sense = 2 * backward - 1
    p_x += i_s * s_xs + i_b * s_xb + last * s_xt
    p_dt += i_s * s_dts + i_b * s_dtb + last * s_dtt
    p_bc += ((i_s * batch + i_b) * length + last) * 2 * N
    total = tl.zeros([BE], tl.float32)
    h = tl.zeros([N, BE], tl.float32)
    for _ in tl.range(0, steps, num_stages=STAGES, loop_unroll_factor=UNROLL):
        x = tl.load(p_x + o_e).to(tl.float32)
        dt = tl.load(p_dt + o_e).to(tl.float32)
        b, _c = halves(tl.load(p_bc + tl.arange(0, 2 * N)), N)
        delta = dt if STEPS else softplus(dt + bias)
        h += decays(a, total, N, TIED, delta * x) * b[:, None]
        total += delta
        p_x += sense * s_xt
        p_dt += sense * s_dtt
        p_bc += sense * 2 * N
    store_states(p_ends + i_chunk * N * E, o_lane, E, h, N)
    tl.store(p_sums + i_chunk * E + o_e, total)


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
    reverse: tl.tensor,
    E: tl.constexpr,
    N: tl.constexpr,
    TIED: tl.constexpr,
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
    if TIED:
        a = tl.load(p_a + i_s * E + o_e, mask=m_e, other=0.0) * LOG2_E * (i_n + 1)
    else:
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
    p_bc: tl.tensor,
    p_a: tl.tensor,
    p_d: tl.tensor,
    p_z: tl.tensor,  # None: no gate
    p_bias: tl.tensor,
    p_starts: tl.tensor,  # (B, K, N, E), None if there is one chunk
    p_first: tl.tensor,  # (B, E, N): instead of the starts if there is one chunk
    p_last: tl.tensor,  # (B, E, N): written if there is one chunk
    p_decay: tl.tensor,  # (B, E, N): likewise
    p_marks: tl.tensor,  # (B, tokens / MARK, N, E) or None: the state every MARK tokens
    p_y: tl.tensor,  # (B, L, E)
    length: tl.tensor,
    chunk: tl.tensor,
    chunks: tl.tensor,
    s_xb: tl.tensor,
    s_xt: tl.tensor,
    s_dtb: tl.tensor,
    s_dtt: tl.tensor,
    s_zb: tl.tensor,
    s_zt: tl.tensor,
    s_yb: tl.tensor,
    s_yt: tl.tensor,
    reverse: tl.tensor,
    E: tl.constexpr,
    N: tl.constexpr,
    TIED: tl.constexpr,
    STEPS: tl.constexpr,
    BE: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
    MARK: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    """Outputs of one chunk of one direction; ADD adds those that are there already."""
    i_e = tl.program_id(0) % tl.cdiv(E, BE)
    i_chunk = (tl.program_id(0) // tl.cdiv(E, BE)).to(tl.int64)  # over (B, K)
    i_k = i_chunk % chunks
    i_b = i_chunk // chunks
    o_e = channels(i_e, E, BE)
    o_lane = o_e if TIED else lanes(i_e, E, BE)  # a tile of tied rates lies as its rows do
    o_state = i_b * E * N
    start = i_k * chunk
    steps = tl.minimum(chunk, length - start).to(tl.int32)
    first = start + reverse * (steps - 1)
    sense = 1 - 2 * reverse
    p_x += i_b * s_xb + first * s_xt
    p_dt += i_b * s_dtb + first * s_dtt
    p_bc += (i_b * length + first) * 2 * N
    p_y += i_b * s_yb + first * s_yt
    if p_z is not None:
        p_z += i_b * s_zb + first * s_zt
    if p_marks is not None:
        p_marks += (i_b * tl.cdiv(length, MARK) + start // MARK) * N * E

    a = load_rates(p_a, o_lane, N, BE, TIED)
    bias = tl.load(p_bias + o_e) if p_bias is not None else 0.0
    skip = tl.load(p_d + o_e) if p_d is not None else 0.0
    total = tl.zeros([BE], tl.float32)
    if p_starts is not None:
        h = load_states(p_starts + i_chunk * N * E, o_lane, E, N, BE)
    elif p_first is not None:
        h = load_states(p_first + o_state, o_lane * N, 1, N, BE)
    else:
        h = tl.zeros([N, BE], tl.float32)
    for i in tl.range(0, steps, num_stages=STAGES, loop_unroll_factor=UNROLL):
        x = tl.load(p_x + o_e).to(tl.float32)
        dt = tl.load(p_dt + o_e).to(tl.float32)
        b, c = halves(tl.load(p_bc + tl.arange(0, 2 * N)), N)
        if p_marks is not None and i % MARK == 0:
            o_mark = tl.full([], i // MARK, tl.int64) * N * E
            store_states(p_marks + o_mark, o_lane, E, h, N)
        delta = dt if STEPS else softplus(dt + bias)
        h = advance(h, a, delta, x, b, N, TIED)
        y = tl.sum(h * c[:, None], 0) + skip * x
        if ADD:
            y += tl.load(p_y + o_e).to(tl.float32)
        if p_z is not None:
            z = tl.load(p_z + o_e).to(tl.float32)
            y *= z * sigmoid(z)
            p_z += sense * s_zt
        tl.store(p_y + o_e, y.to(p_y.dtype.element_ty))
        if p_starts is None:
            total += delta
        p_x += sense * s_xt
        p_dt += sense * s_dtt
        p_bc += sense * 2 * N
        p_y += sense * s_yt
    if p_starts is None:
        store_states(p_last + o_state, o_lane * N, 1, h, N)
        if p_decay is not None:
            store_states(p_decay + o_state, o_lane * N, 1, decays(a, total, N, TIED), N)
