"""How a sweep's documents are cut in segments, each a program of its own: whole, or split over the multiprocessors.

Without a look at the device: where documents are packed their lengths are on it, and the plan is made of tensors there.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from linattn.core.tiles import multiprocessors

SHORTEST_SEGMENT = 1024
"""Tokens: below that a segment's start and end cost more than another program gains."""


@dataclass(frozen=True)
class Segments:
    """How documents are cut: ``count`` segments in all, of ``tokens`` each, ``per_row`` a row.

    Where there is more than one a document, `fine` cuts each again in `parts`, to find what they add.
    document, start, first: int32, for packed rows: each segment's document and first token there, and each document's
    first segment.
    """

    count: int
    tokens: int
    per_row: int
    fine: Segments | None = None
    document: Tensor | None = None
    start: Tensor | None = None
    first: Tensor | None = None

    @property
    def parts(self) -> int:
        """How many of its fine cut's segments make one."""
        assert self.fine is not None
        return self.tokens // self.fine.tokens


@functools.cache
def segments_a_row(programs: int, tokens: int, slots: int, again: float, shortest: int = SHORTEST_SEGMENT) -> int:
    """In how many segments to cut each row: the least of (idle slots) x (work done).

    again: what finding the segments' states costs, over the cost of the pass itself.
    """
    best, least = 1, float("inf")
    for n in range(1, min(max(1, tokens // shortest), 8 * slots) + 1):
        waves = -(-programs * n // slots)
        cost = waves * slots / (programs * n) * (1 + again * (n - 1) / n)
        if cost < least - 1e-9:
            best, least = n, cost
    return best


def cut_segments(
    rows: int,
    tokens: int,
    programs: int,
    resident: int,
    unit: int,
    cu_seqlens: Tensor | None,
    device: torch.device,
    *,
    again: float,
    parts: int = 1,
    shortest: int = SHORTEST_SEGMENT,
    segments: int | None = None,
) -> Segments:
    """Segments for ``rows`` rows of ``tokens`` tokens with ``programs`` programs each.

    resident: programs that one multiprocessor holds. unit: tokens that a part is a multiple of. parts: how many of them
    a segment has, each summed up by a program of its own. segments: so many a row, whatever the cost model says.
    """
    slots = multiprocessors(device) * resident if device.type == "cuda" else 8
    unit *= parts
    if cu_seqlens is None:
        n = segments or segments_a_row(rows * programs, tokens, slots, again, shortest)
        return _row_segments(rows, tokens, n, unit, parts)
    # Lengths are on the device. One document may hold everything: twice as many segments as slots if so.
    n = segments or max(1, min(tokens // shortest, 2 * slots // programs))
    size = -(-tokens // (n * unit)) * unit
    if size >= tokens:
        return Segments(cu_seqlens.numel() - 1, tokens, 1)
    return _packed_segments(cu_seqlens, tokens, size, _packed_segments(cu_seqlens, tokens, size // parts))


@functools.lru_cache(4096)
def _row_segments(rows: int, tokens: int, n: int, unit: int, parts: int) -> Segments:
    size = -(-tokens // (n * unit)) * unit
    n = -(-tokens // size)
    if n == 1:
        return Segments(rows, tokens, 1)
    pieces = -(-tokens // (size // parts))
    return Segments(rows * n, size, n, Segments(rows * pieces, size // parts, pieces))


def _packed_segments(cu_seqlens: Tensor, tokens: int, size: int, fine: Segments | None = None) -> Segments:
    """T // size + N segments whatever the documents' lengths; those that no document needs start behind its end."""
    offsets = cu_seqlens.long()
    documents = offsets.numel() - 1
    counts = ((offsets.diff() + size - 1) // size).clamp(min=1)
    ends = counts.cumsum(0)
    first = ends - counts
    index = torch.arange(tokens // size + documents, device=offsets.device)
    document = torch.searchsorted(ends, index, right=True)
    used = document < documents
    document = document.clamp(max=documents - 1)
    start = torch.where(used, (index - first[document]) * size, -(-tokens // size) * size)
    parts = (x.to(torch.int32) for x in (document, start, first))
    return Segments(tokens // size + documents, size, 0, fine, *parts)
