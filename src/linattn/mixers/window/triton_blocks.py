"""What the passes of sliding-window attention share: where a block lies, its rows, and which keys a query sees.

Positions count from the start of a document. A State's row r stands at r - (W-1), so that queries meet it like any key.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linattn.core.triton_parts import document_tokens


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
        _, begin, length = document_tokens(cu_seqlens, document, tokens, True)
        first = (block - (begin // BLOCK).to(tl.int32) - n) * BLOCK
    return row, document, begin, length, first


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
def _keys(
    k,
    v,
    start,
    k_t,
    v_t,
    high,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
):
    """A block of keys from ``start`` on, their values, and where they stand, [1, BLOCK]."""
    keys = _rows(k, start, k_t, 0, high, BLOCK, D, BD)
    values = _rows(v, start, v_t, 0, high, BLOCK, V, BV)
    return keys, values, (start + tl.arange(0, BLOCK))[None, :]


@triton.jit
def _near(i, j, W: tl.constexpr):
    """Which keys at positions j the queries at i see."""
    return (j <= i) & (j > i - W)
