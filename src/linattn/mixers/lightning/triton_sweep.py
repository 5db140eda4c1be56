"""The one kernel of lightning attention in Triton: a sweep over a document, its state in registers.

    out_t = sum over s of decay^|t - s| (a_t . b_s) c_s,  s up to t (forward) or from t on (reverse)

The forward is the sweep of (q, k, v). The gradients are three more: dq of (do, v, k) forward, dk of (v, do, q) and dv
of (k, q, do) in reverse, whose state is the State's gradient; where K = V one launch sweeps dk and dv side by side.
A document may be cut in segments, each a program of its own, given the state before each: `_sweep` without outputs
makes what each segment adds, `_scan_segments` the running states.
"""

# pyright: reportAttributeAccessIssue=false
# It takes the triton.py beside this file for triton itself.
# ruff: noqa: RUF005
# Triton joins tuples with +, and knows no star.
from __future__ import annotations

import triton
import triton.language as tl

from linattn.core.triton_parts import (
    adds_for_nobody,
    document_tokens,
    ends_document,
    of_no_document,
    operand,
    segment_tokens_of,
)


@triton.jit
def _expm1(x):
    """exp(x) - 1 of a scalar x <= 0 to fp32's precision: a decay near 1 is applied as S + expm1(x) S."""
    series = 1 + x / 8
    for n in tl.static_range(6):
        series = 1 + x / (7 - n) * series
    return tl.where(x > -0.5, x * series, tl.exp2(x * 1.4426950408889634) - 1)


@triton.jit
def _first_heard(first, last, length, chunks, segment_tokens, part, log2_decay, C: tl.constexpr, REVERSE: tl.constexpr):
    """At which step to begin a segment of which only what it adds is wanted; ``chunks``: at none.

    Weights below 2^-149 are 0 in fp32: what lies further from where the state is read next is not read itself, nor what
    the last segment would add, which nobody reads.
    """
    heard = tl.minimum(150.0 / tl.maximum(-log2_decay, 1e-30), 1e9).to(tl.int32)
    whole = first // segment_tokens // part * part * segment_tokens
    beyond = first - whole if REVERSE else tl.minimum(whole + part * segment_tokens, length) - last
    unread = adds_for_nobody(first, length, segment_tokens, part, REVERSE)
    begin_step = tl.maximum(chunks - tl.maximum(heard - beyond + C - 1, 0) // C - 1, 0)
    if unread | (beyond > heard):
        begin_step = chunks
    return begin_step


@triton.jit
def _sweep(
    a,
    b,
    c,
    out,
    a2,
    b2,
    c2,
    out2,
    log_decay,
    state_in,
    state_out,
    cu_seqlens,
    segment_document,
    segment_start,
    scale,
    tokens,
    segment_tokens,
    per_row,
    part,
    a_n,
    a_t,
    a_h,
    b_n,
    b_t,
    b_h,
    c_n,
    c_t,
    c_h,
    out_n,
    out_t,
    out_h,
    a2_n,
    a2_t,
    a2_h,
    b2_n,
    b2_t,
    b2_h,
    c2_n,
    c2_t,
    c2_h,
    out2_n,
    out2_t,
    out2_h,
    in_n,
    in_h,
    in_k,
    in_v,
    final_n,
    final_h,
    final_k,
    final_v,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    A_GROUP: tl.constexpr,
    B_GROUP: tl.constexpr,
    C_GROUP: tl.constexpr,
    STATE_GROUP: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    SPLIT: tl.constexpr,
    OUTPUT: tl.constexpr,
    INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
    A2_GROUP: tl.constexpr,
    B2_GROUP: tl.constexpr,
    C2_GROUP: tl.constexpr,
    PAIR: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Grid (value blocks, heads, segments). a, b [.., K], c, out [.., V]; state [K, V], held as [V, K].

    STATE_GROUP heads share a state; the first of them writes it. SPLIT: documents are cut in segments of
    segment_tokens (a multiple of C), per_row of them a row, or as segment_document and segment_start say when packed.
    PAIR: even programs sweep the first four tensors, odd ones the second four, with the state transposed.
    FINAL: 0 nothing, 1 the state after each document, 2 what each segment adds, ``part`` (at least 1) segments being
    read as one.
    """
    h = tl.program_id(1)
    block = tl.program_id(0)
    a_head = (h // A_GROUP).to(tl.int64)
    b_head = (h // B_GROUP).to(tl.int64)
    c_head = (h // C_GROUP).to(tl.int64)
    second = False
    if PAIR:
        second = block % 2 == 1
        block = block // 2
        if second:
            a, b, c, out = a2, b2, c2, out2
            a_head = (h // A2_GROUP).to(tl.int64)
            b_head = (h // B2_GROUP).to(tl.int64)
            c_head = (h // C2_GROUP).to(tl.int64)
        a_n, a_t, a_h = tl.where(second, a2_n, a_n), tl.where(second, a2_t, a_t), tl.where(second, a2_h, a_h)
        b_n, b_t, b_h = tl.where(second, b2_n, b_n), tl.where(second, b2_t, b_t), tl.where(second, b2_h, b_h)
        c_n, c_t, c_h = tl.where(second, c2_n, c_n), tl.where(second, c2_t, c_t), tl.where(second, c2_h, c_h)
        out_n, out_t = tl.where(second, out2_n, out_n), tl.where(second, out2_t, out_t)
        out_h = tl.where(second, out2_h, out_h)
        in_k, in_v = tl.where(second, in_v, in_k), tl.where(second, in_k, in_v)
    v0 = block * BV
    segment = tl.program_id(2).to(tl.int64)
    document, row, begin, length, first, last, chunks = segment_tokens_of(
        segment, cu_seqlens, segment_document, segment_start, tokens, segment_tokens, per_row, C, PACKED, SPLIT
    )
    if PACKED and SPLIT:  # noqa: SIM102  what is known at compile time stands apart
        if of_no_document(first, length):
            return

    rows = tl.maximum(length, 1)
    b_rows = tl.make_tensor_descriptor(b + row * b_n + begin * b_t + b_head * b_h, [rows, K], [b_t, 1], [C, BK])
    c_rows = tl.make_tensor_descriptor(c + row * c_n + begin * c_t + c_head * c_h, [rows, V], [c_t, 1], [C, BV])
    if OUTPUT:
        a_rows = tl.make_tensor_descriptor(a + row * a_n + begin * a_t + a_head * a_h, [rows, K], [a_t, 1], [C, BK])
        out_rows = tl.make_tensor_descriptor(
            out + row * out_n + begin * out_t + h.to(tl.int64) * out_h, [rows, V], [out_t, 1], [C, BV]
        )

    decay = tl.load(log_decay + h // STATE_GROUP).to(tl.float32)
    log2_decay = decay * 1.4426950408889634
    begin_step = 0
    if FINAL == 2:
        begin_step = _first_heard(first, last, length, chunks, segment_tokens, part, log2_decay, C, REVERSE)
    i = tl.arange(0, C)
    k_index = tl.arange(0, BK)
    v_index = v0 + tl.arange(0, BV)
    inside = (v_index[:, None] < V) & (k_index[None, :] < K)
    dtype = c.dtype.element_ty
    if INITIAL:
        at = segment * in_n + (h // STATE_GROUP).to(tl.int64) * in_h
        state = tl.load(state_in + at + v_index[:, None] * in_v + k_index[None, :] * in_k, mask=inside, other=0.0)
    else:
        state = tl.zeros([BV, BK], tl.float32)
    # Scores are held [C of b, C of a]. Distances are selected before the exponential, which never passes 1.
    if OUTPUT:
        distance = i[:, None] - i[None, :] if REVERSE else i[None, :] - i[:, None]
        within = tl.exp2(tl.where(distance >= 0, log2_decay * distance, -float("inf"))) * scale
    read_scale = 1.0 if REVERSE else scale
    add_scale = scale if REVERSE else 1.0

    for step in tl.range(begin_step, chunks, num_stages=NUM_STAGES):
        t = first + (chunks - 1 - step if REVERSE else step) * C
        m = tl.minimum(C, length - t)
        to_end = tl.maximum(m - 1 - i, 0)
        bs = b_rows.load([t, 0])
        cs = c_rows.load([t, v0])
        if OUTPUT:
            q = a_rows.load([t, 0])
            p = tl.dot(bs, tl.trans(q)) * within
            since = to_end if REVERSE else i + 1
            rounded, unit = operand(state, dtype)
            y = tl.dot(rounded, tl.trans(q)) * (tl.exp2(log2_decay * since) * (read_scale * unit))[None, :]
            y = tl.dot(tl.trans(cs), p.to(dtype), y)
            out_rows.store([t, v0], tl.trans(y).to(out.dtype.element_ty))
        ahead = i + 1 if REVERSE else to_end
        weighted = (bs.to(tl.float32) * (tl.exp2(log2_decay * ahead) * add_scale)[:, None]).to(dtype)
        state = tl.dot(tl.trans(cs), weighted, state + state * _expm1(decay * m))

    if FINAL == 2:
        at = segment * final_n + h.to(tl.int64) * final_h
        tl.store(state_out + at + v_index[:, None] * final_v + k_index[None, :] * final_k, state, mask=inside)
    elif FINAL == 1:
        ends = ends_document(first, last, length, chunks, REVERSE)
        if ends & (h % STATE_GROUP == 0) & (not second):
            at = document * final_n + (h // STATE_GROUP).to(tl.int64) * final_h
            tl.store(state_out + at + v_index[:, None] * final_v + k_index[None, :] * final_k, state, mask=inside)


@triton.jit
def _scan_segments(
    added,
    before,
    initial,
    log_decay,
    cu_seqlens,
    first_added,
    first_before,
    tokens,
    segment_tokens,
    added_a_row,
    before_a_row,
    part,
    heads,
    size,
    in_n,
    in_h,
    in_k,
    in_v,
    V: tl.constexpr,
    STATE_GROUP: tl.constexpr,
    INITIAL_GROUP: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    INITIAL: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """From what each segment adds, [.., heads, K, V], the state before every ``part``-th.

    Grid (blocks of K V, heads, documents). In reverse "before" is after in the text.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h = tl.program_id(1)
    document = tl.program_id(2).to(tl.int64)
    inside = at < size
    _, _, length = document_tokens(cu_seqlens, document, tokens, PACKED)
    begin = document * added_a_row
    begin_before = document * before_a_row
    if PACKED:
        begin = tl.load(first_added + document).to(tl.int64)
        begin_before = tl.load(first_before + document).to(tl.int64)
    count = tl.maximum(tl.cdiv(length, segment_tokens), 1)
    decay = tl.load(log_decay + h // STATE_GROUP).to(tl.float32)
    if INITIAL:
        where = document * in_n + (h // INITIAL_GROUP).to(tl.int64) * in_h + (at // V) * in_k + (at % V) * in_v
        state = tl.load(initial + where, mask=inside, other=0.0)
    else:
        state = tl.zeros([BLOCK], tl.float32)
    for base in range(0, count, AHEAD):
        # Asked for together: one after another each would wait for memory.
        more = ()
        for i in tl.static_range(AHEAD):
            s = count - 1 - base - i if REVERSE else base + i
            live = inside & (base + i < count)
            more = more + (tl.load(added + ((begin + s) * heads + h) * size + at, mask=live, other=0.0),)
        for i in tl.static_range(AHEAD):
            s = count - 1 - base - i if REVERSE else base + i
            ends = ((s + 1) % part == 0) | (s == count - 1) if REVERSE else s % part == 0
            to = before + ((begin_before + s // part) * heads + h) * size + at
            tl.store(to, state, mask=inside & ends & (base + i < count))
            own = tl.maximum(tl.minimum(segment_tokens, length - s * segment_tokens), 0)
            state += state * _expm1(decay * own) + more[i]
