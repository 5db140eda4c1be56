"""Sliding-window attention's gradients in Triton, no atomics: dq by blocks of queries, dk and dv by blocks of keys.

    p = 2^(s - lse),   ds = p (dy . v - delta),   delta = dy . y,   dq = scale ds k,   dk = scale ds^T q,   dv = p^T dy

A key at position j is read by the queries j to j + W-1; a State's keys stand at -(W-1) to -1.
"""

# pyright: reportAttributeAccessIssue=false
# It takes the triton.py beside this file for triton itself.
from __future__ import annotations

import triton
import triton.language as tl

from linattn.core.triton_parts import document_tokens
from linattn.mixers.window.triton_blocks import _keys, _locate, _near, _rows, _store_rows


@triton.jit
def _read_back(query, dys, lses, delta, keys, values, seen, dq, exact, scale):
    """What one block of keys adds to dq, before the scale, and to delta as it is before y is rounded."""
    p = tl.where(seen, tl.exp2(tl.dot(query, tl.trans(keys)) * scale - lses[:, None]), 0.0)
    dp = tl.dot(dys, tl.trans(values))
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(keys.dtype), keys, dq), exact + tl.sum(p * dp, 1)


@triton.jit
def _query_gradient(
    q,
    k,
    v,
    state_k,
    state_v,
    count,
    cu_seqlens,
    y,
    dy,
    lse,
    deltas,
    dq,
    scale,
    tokens,
    documents,
    q_n,
    q_t,
    q_h,
    k_n,
    k_t,
    k_h,
    v_n,
    v_t,
    v_h,
    y_n,
    y_t,
    y_h,
    dy_n,
    dy_t,
    dy_h,
    dq_n,
    dq_t,
    dq_h,
    state_k_n,
    state_k_t,
    state_k_h,
    state_v_n,
    state_v_t,
    state_v_h,
    W: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    INITIAL: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (blocks of queries x HEADS, 1, rows). Writes delta [B, Hq, T] for `_key_gradient` too.

    That delta is sum p dp, not dy . y: a key that no other query reads, as a State's is where W is 2, has a gradient of
    p (dp - delta) alone, and where p is near 1 the rounding of y would be all of it.
    """
    h = tl.program_id(0) % HEADS
    block = tl.program_id(0) // HEADS
    row, document, begin, length, first = _locate(cu_seqlens, block, tokens, documents, PACKED, QUERIES)
    if first >= length:
        return
    k_head = h // GROUP
    k += row * k_n + begin * k_t + k_head * k_h
    v += row * v_n + begin * v_t + k_head * v_h
    query = _rows(q + row * q_n + begin * q_t + h * q_h, first, q_t, 0, length, QUERIES, D, BD)
    dys = _rows(dy + row * dy_n + begin * dy_t + h * dy_h, first, dy_t, 0, length, QUERIES, V, BV)
    ys = _rows(y + row * y_n + begin * y_t + h * y_h, first, y_t, 0, length, QUERIES, V, BV)
    delta = tl.sum(ys.to(tl.float32) * dys.to(tl.float32), 1)
    r = first + tl.arange(0, QUERIES)
    at = (row * HEADS + h) * tokens + begin + r
    lses = tl.load(lse + at, mask=r < length, other=0.0)
    i = r[:, None]
    out = tl.zeros([QUERIES, BD], tl.float32)
    exact = tl.zeros([QUERIES], tl.float32)
    scale2 = scale * 1.4426950408889634
    if INITIAL:
        low = W - 1 - tl.load(count + document).to(tl.int32)
        state_k += document * state_k_n + k_head * state_k_h
        state_v += document * state_v_n + k_head * state_v_h
        for s in tl.range(tl.maximum(first, low), W - 1, KEYS, num_stages=1):
            keys, values, place = _keys(state_k, state_v, s, state_k_t, state_v_t, W - 1, KEYS, D, BD, V, BV)
            seen = _near(i, place - (W - 1), W) & (place < W - 1)
            out, exact = _read_back(query, dys, lses, delta, keys, values, seen, out, exact, scale2)
    for j in tl.range(tl.maximum(first - (W - 1), 0), tl.minimum(first + QUERIES, length), KEYS, num_stages=STAGES):
        keys, values, place = _keys(k, v, j, k_t, v_t, length, KEYS, D, BD, V, BV)
        seen = _near(i, place, W)
        out, exact = _read_back(query, dys, lses, delta, keys, values, seen, out, exact, scale2)
    tl.store(deltas + at, exact, mask=r < length)
    _store_rows(dq + row * dq_n + begin * dq_t + h * dq_h, first, dq_t, length, out * scale, QUERIES, D, BD)


@triton.jit
def _key_gradient(
    q,
    k,
    v,
    count,
    cu_seqlens,
    dy,
    lse,
    deltas,
    dk,
    dv,
    scale,
    tokens,
    documents,
    q_n,
    q_t,
    q_h,
    k_n,
    k_t,
    k_h,
    v_n,
    v_t,
    v_h,
    dy_n,
    dy_t,
    dy_h,
    dk_n,
    dk_t,
    dk_h,
    dv_n,
    dv_t,
    dv_h,
    W: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    STATE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (blocks of keys x key heads, 1, rows). A key head's program walks its GROUP query heads in turn.

    STATE: k, v, dk, dv are a State's, [N, W-1, H, ...], and the grid's last axis is its documents.
    """
    KEY_HEADS: tl.constexpr = HEADS // GROUP
    h = tl.program_id(0) % KEY_HEADS
    block = tl.program_id(0) // KEY_HEADS
    if STATE:
        document = tl.program_id(2).to(tl.int64)
        row, begin, length = document_tokens(cu_seqlens, document, tokens, PACKED)
        first = block * KEYS
        high = W - 1
        low = W - 1 - tl.load(count + document).to(tl.int32)
        before = W - 1
        own = document
        own_begin = document * 0
    else:
        row, document, begin, length, first = _locate(cu_seqlens, block, tokens, documents, PACKED, KEYS)
        high = length
        low = 0
        before = 0
        own = row
        own_begin = begin
        if first >= length:
            return
    keys = _rows(k + own * k_n + own_begin * k_t + h * k_h, first, k_t, low, high, KEYS, D, BD)
    values = _rows(v + own * v_n + own_begin * v_t + h * v_h, first, v_t, low, high, KEYS, V, BV)
    place = first + tl.arange(0, KEYS)
    real = (place >= low) & (place < high)
    j = (place - before)[:, None]
    dk_rows = tl.zeros([KEYS, BD], tl.float32)
    dv_rows = tl.zeros([KEYS, BV], tl.float32)
    scale2 = scale * 1.4426950408889634
    start = tl.maximum(first - before, 0)
    blocks = tl.maximum(tl.cdiv(tl.minimum(first - before + KEYS - 1 + W, length) - start, QUERIES), 0)
    q += row * q_n + begin * q_t
    dy += row * dy_n + begin * dy_t
    for step in tl.range(0, GROUP * blocks, num_stages=STAGES):
        head = h
        t = start + step * QUERIES
        if GROUP > 1:
            head = h * GROUP + step // blocks
            t = start + step % blocks * QUERIES
        query = _rows(q + head * q_h, t, q_t, 0, length, QUERIES, D, BD)
        dys = _rows(dy + head * dy_h, t, dy_t, 0, length, QUERIES, V, BV)
        r = t + tl.arange(0, QUERIES)
        at = (row * HEADS + head) * tokens + begin + r
        lses = tl.load(lse + at, mask=r < length, other=0.0)
        delta = tl.load(deltas + at, mask=r < length, other=0.0)
        seen = _near(r[None, :], j, W) & real[:, None] & (r < length)[None, :]
        p = tl.where(seen, tl.exp2(tl.dot(keys, tl.trans(query)) * scale2 - lses[None, :]), 0.0)
        dv_rows = tl.dot(p.to(dys.dtype), dys, dv_rows)
        ds = p * (tl.dot(values, tl.trans(dys)) - delta[None, :])
        dk_rows = tl.dot(ds.to(query.dtype), query, dk_rows)
    _store_rows(dk + own * dk_n + own_begin * dk_t + h * dk_h, first, dk_t, high, dk_rows * scale, KEYS, D, BD)
    _store_rows(dv + own * dv_n + own_begin * dv_t + h * dv_h, first, dv_t, high, dv_rows, KEYS, V, BV)
