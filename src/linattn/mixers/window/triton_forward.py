"""Sliding-window attention forward in Triton: a block of queries, the W-1 keys before it and its own, one softmax.

Positions count from the start of a document. A State's row r stands at r - (W-1), so that queries meet it like any key.
"""

# pyright: reportAttributeAccessIssue=false
# It takes the triton.py beside this file for triton itself.
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _locate(cu_seqlens, block, tokens, documents, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """(row, document, its first token in the row, its length, the first position of this block).

    Packed, document n owns the blocks from cu_seqlens[n] // BLOCK + n on: as many as it needs or one more, found
    without a sum over the documents before it. A block that nobody needs starts at or behind the document's end.
    """
    row = tl.program_id(2).to(tl.int64)
    document = row
    begin = row * 0
    length = tokens
    first = block * BLOCK
    if PACKED:
        n = block * 0
        for start in range(0, documents, 128):
            at = start + tl.arange(0, 128)
            begins = tl.load(cu_seqlens + at, mask=at < documents, other=0).to(tl.int32)
            owned = (tl.minimum(tl.maximum(begins, 0), tokens) // BLOCK + at <= block) & (at < documents)
            n += tl.sum(owned.to(tl.int32), 0)
        n = tl.maximum(n - 1, 0)
        document = n.to(tl.int64)
        begin, length = _document(cu_seqlens, document, tokens)
        first = (block - (begin // BLOCK).to(tl.int32) - n) * BLOCK
    return row, document, begin, length, first


@triton.jit
def _document(cu_seqlens, document, tokens):
    """A packed document's first token in its row, int64, and its length."""
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + document).to(tl.int64), 0), tokens)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + document + 1).to(tl.int64), begin), tokens)
    return begin, (end - begin).to(tl.int32)


@triton.jit
def _rows(x, start, stride, low, high, BLOCK: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Rows start to start + BLOCK of x, zeros outside [low, high): a neighbour's NaN must not meet a weight of 0."""
    r = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_DIM)
    inside = (start + r >= low) & (start + r < high)
    at = x + tl.cast(start, tl.int64) * stride + r[:, None] * stride + d[None, :]
    return tl.load(at, mask=inside[:, None] & (d[None, :] < DIM), other=0.0)


@triton.jit
def _store_rows(x, start, stride, high, rows, BLOCK: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    r = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_DIM)
    at = x + tl.cast(start, tl.int64) * stride + r[:, None] * stride + d[None, :]
    tl.store(at, rows.to(x.dtype.element_ty), mask=(start + r < high)[:, None] & (d[None, :] < DIM))


@triton.jit
def _near(i, j, W: tl.constexpr):
    """Which keys at positions j the queries at i see."""
    return (j <= i) & (j > i - W)


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
            keys = _rows(state_k, r, state_k_t, 0, W - 1, KEYS, D, BD)
            values = _rows(state_v, r, state_v_t, 0, W - 1, KEYS, V, BV)
            place = (r + tl.arange(0, KEYS))[None, :]
            seen = _near(i, place - (W - 1), W) & (place < W - 1)
            highest, total, out = _read(query, keys, values, seen, highest, total, out, scale)
    for j in tl.range(tl.maximum(first - (W - 1), 0), tl.minimum(first + QUERIES, length), KEYS, num_stages=STAGES):
        keys = _rows(k, j, k_t, 0, length, KEYS, D, BD)
        values = _rows(v, j, v_t, 0, length, KEYS, V, BV)
        seen = _near(i, (j + tl.arange(0, KEYS))[None, :], W)
        highest, total, out = _read(query, keys, values, seen, highest, total, out, scale)
    _store_rows(y + row * y_n + begin * y_t + h * y_h, first, y_t, length, out / total[:, None], QUERIES, V, BV)
    r = first + tl.arange(0, QUERIES)
    tl.store(lse + (row * HEADS + h) * tokens + begin + r, highest + tl.log2(total), mask=r < length)
