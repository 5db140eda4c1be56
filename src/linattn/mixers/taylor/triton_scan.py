"""The states before a text's segments, from what each segment adds: the pass between two sweeps of Taylor attention."""

# pyright: reportAttributeAccessIssue=false
# It takes the triton.py beside this file for triton itself.
# ruff: noqa: RUF005
# Triton joins tuples with +, and knows no star.
from __future__ import annotations

import triton
import triton.language as tl

from linattn.core.triton_parts import document_tokens


@triton.jit
def _scan_segments(
    added,
    before,
    S,
    z,
    cu_seqlens,
    first,
    first_part,
    tokens,
    segment_tokens,
    per_row,
    parts_per_row,
    heads,
    size,
    size_S,
    S_n,
    S_h,
    z_n,
    z_h,
    PARTS: tl.constexpr,
    REVERSE: tl.constexpr,
    PACKED: tl.constexpr,
    INITIAL: tl.constexpr,
    INITIAL_GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """From what each segment's PARTS add, [.., heads, size], S and then z, the state before each. In reverse: behind.

    Grid (blocks of size, heads, documents).
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h = tl.program_id(1)
    document = tl.program_id(2).to(tl.int64)
    _, _, length = document_tokens(cu_seqlens, document, tokens, PACKED)
    begin = document * per_row
    begin_parts = document * parts_per_row
    if PACKED:
        begin = tl.load(first + document).to(tl.int64)
        begin_parts = tl.load(first_part + document).to(tl.int64)
    count = tl.maximum(tl.cdiv(length, segment_tokens), 1)
    parts = tl.maximum(tl.cdiv(length, segment_tokens // PARTS), 1)
    inside = at < size
    state = tl.zeros([BLOCK], tl.float32)
    if INITIAL:
        head = (h // INITIAL_GROUP).to(tl.int64)
        state = tl.load(S + document * S_n + head * S_h + at, mask=at < size_S, other=0.0)
        state += tl.load(z + document * z_n + head * z_h + at - size_S, mask=inside & (at >= size_S), other=0.0)
    for base in range(0, count, AHEAD):
        # Asked for together: one after another each would wait for memory.
        more = ()
        for i in tl.static_range(AHEAD):
            s = count - 1 - base - i if REVERSE else base + i
            both = tl.zeros([BLOCK], tl.float32)
            for j in tl.static_range(PARTS):
                part = s * PARTS + j
                where = ((begin_parts + part) * heads + h) * size + at
                # What the last adds is read by nobody, and was not written.
                both += tl.load(added + where, mask=inside & (part < parts) & (base + i < count - 1), other=0.0)
            more = more + (both,)
        for i in tl.static_range(AHEAD):
            s = count - 1 - base - i if REVERSE else base + i
            tl.store(before + ((begin + s) * heads + h) * size + at, state, mask=inside & (base + i < count))
            state += more[i]
