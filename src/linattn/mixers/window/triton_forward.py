"""Sliding-window attention forward in Triton: a block of queries, the W-1 keys before it and its own, one softmax."""

# pyright: reportAttributeAccessIssue=false
# It takes the triton.py beside this file for triton itself.
from __future__ import annotations

import triton
import triton.language as tl

from linattn.mixers.window.triton_blocks import _keys, _locate, _near, _rows, _store_rows


@triton.jit
def _read(q, k, v, seen, highest, total, y, scale):
    """One block of keys more for a running softmax in base 2.

    Where nothing is seen a score is -1e30, not -inf: a row that has seen nothing yet stays free of NaN, and what it
    adds meanwhile is multiplied by 2^-1e30 as soon as it sees itself.
    """
    s = tl.where(seen, tl.dot(q, tl.trans(k)) * scale, -1e30)
    higher = tl.maximum(highest, tl.max(s, 1))
    p = tl.exp2(s - higher[:, None])
    less = tl.exp2(highest - higher)
    y = tl.dot(p.to(v.dtype), v, y * less[:, None])
    return higher, total * less + tl.sum(p, 1), y


@triton.jit
def _forward(
    q,
    k,
    v,
    state_k,
    state_v,
    count,
    cu_seqlens,
    y,
    lse,
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
    """Grid (blocks of queries x HEADS, 1, rows), heads the fastest: what runs side by side lies side by side."""
    h = tl.program_id(0) % HEADS
    block = tl.program_id(0) // HEADS
    row, document, begin, length, first = _locate(cu_seqlens, block, tokens, documents, PACKED, QUERIES)
    if first >= length:
        return
    k_head = h // GROUP
    k += row * k_n + begin * k_t + k_head * k_h
    v += row * v_n + begin * v_t + k_head * v_h
    query = _rows(q + row * q_n + begin * q_t + h * q_h, first, q_t, 0, length, QUERIES, D, BD)
    i = (first + tl.arange(0, QUERIES))[:, None]
    highest = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, BV], tl.float32)
    scale *= 1.4426950408889634
    if INITIAL:
        # Row r is seen by queries up to position r: only a document's first W-1 tokens come here.
        low = W - 1 - tl.load(count + document).to(tl.int32)
        state_k += document * state_k_n + k_head * state_k_h
        state_v += document * state_v_n + k_head * state_v_h
        for r in tl.range(tl.maximum(first, low), W - 1, KEYS, num_stages=1):
            keys, values, place = _keys(state_k, state_v, r, state_k_t, state_v_t, W - 1, KEYS, D, BD, V, BV)
            seen = _near(i, place - (W - 1), W) & (place < W - 1)
            highest, total, out = _read(query, keys, values, seen, highest, total, out, scale)
    for j in tl.range(tl.maximum(first - (W - 1), 0), tl.minimum(first + QUERIES, length), KEYS, num_stages=STAGES):
        keys, values, place = _keys(k, v, j, k_t, v_t, length, KEYS, D, BD, V, BV)
        seen = _near(i, place, W)
        highest, total, out = _read(query, keys, values, seen, highest, total, out, scale)
    _store_rows(y + row * y_n + begin * y_t + h * y_h, first, y_t, length, out / total[:, None], QUERIES, V, BV)
    r = first + tl.arange(0, QUERIES)
    tl.store(lse + (row * HEADS + h) * tokens + begin + r, highest + tl.log2(total), mask=r < length)
