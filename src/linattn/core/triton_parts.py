"""What the kernels of several mixers are made of: jit functions that find a program's tokens, and round a state.

Imports triton itself, so only files that are loaded to launch kernels may import it.
"""

# pyright: reportGeneralTypeIssues=false
# Called by Python a jit function raises, and Triton's types say so.
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def document_tokens(cu_seqlens, document, tokens, PACKED: tl.constexpr):
    """(row of the tensors, first token in it, length) of a document, int64; the length int32.

    Offsets are on the device, unchecked: what they say beyond the row's ``tokens`` is cut off.
    """
    if PACKED:
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + document).to(tl.int64), 0), tokens)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens + document + 1).to(tl.int64), begin), tokens)
        return document * 0, begin, (end - begin).to(tl.int32)
    else:  # noqa: RET505  what follows a constexpr branch would be compiled for both
        return document, document * 0, tokens


@triton.jit
def segment_tokens_of(
    segment,
    cu_seqlens,
    segment_document,
    segment_start,
    tokens,
    segment_tokens,
    per_row,
    C: tl.constexpr,
    PACKED: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """(document, its row, its first token there, its length, the segment's first token and the one behind, chunks).

    SPLIT: documents are cut in segments of ``segment_tokens`` (a multiple of C), ``per_row`` of them a row, or as
    segment_document and segment_start say when packed (core/segments.py). Else a segment is a document.
    """
    document = segment
    first = 0
    if SPLIT:
        if PACKED:
            document = tl.load(segment_document + segment).to(tl.int64)
            first = tl.load(segment_start + segment)
        else:
            document = segment // per_row
            first = ((segment % per_row) * segment_tokens).to(tl.int32)
    row, begin, length = document_tokens(cu_seqlens, document, tokens, PACKED)
    last = length
    if SPLIT:
        last = tl.minimum(length, first + segment_tokens)
    return document, row, begin, length, first, last, tl.maximum(tl.cdiv(last - first, C), 0)


@triton.jit
def of_no_document(first, length):
    """Whether a segment is one that packed rows have room for and no document needs; its state was never written."""
    return (first > 0) & (first >= length)


@triton.jit
def adds_for_nobody(first, length, segment_tokens, part, REVERSE: tl.constexpr):
    """Whether nobody reads what a segment adds, ``part`` of them being read as one; 0: everything is read."""
    index = first // segment_tokens
    if REVERSE:
        return index < part
    else:  # noqa: RET505  what follows a constexpr branch would be compiled for both
        return (part > 0) & ((index // tl.maximum(part, 1) + 1) * part * segment_tokens >= length)


@triton.jit
def ends_document(first, last, length, chunks, REVERSE: tl.constexpr):
    """Whether a document's sweep ends with this segment: one alone of each, an empty document's first among them."""
    return first == 0 if REVERSE else (last == length) & ((chunks > 0) | (first == 0))


@triton.jit
def slot_of(slots, row, n_slots):
    """(whether a row has a slot of the pool, which: 0 where it has none)."""
    slot = tl.load(slots + row).to(tl.int64)
    alive = (slot >= 0) & (slot < n_slots)
    return alive, tl.where(alive, slot, 0)


@triton.jit
def operand(state, dtype: tl.constexpr):
    """A state as an operand of a product, and the power of two to multiply that product by.

    float16 ends at 65504, which sums over a long text pass; bfloat16 would lose three bits of what float16 can say.
    """
    if dtype == tl.float16:
        largest = tl.max(tl.max(tl.abs(state), 1), 0)
        exponent = tl.maximum(tl.ceil(tl.log2(tl.maximum(largest, 1.0))) - 14, 0)
        return (state * tl.exp2(-exponent)).to(dtype), tl.exp2(exponent)
    else:  # noqa: RET505  what follows a constexpr branch would be compiled for both
        return state.to(dtype), 1.0
