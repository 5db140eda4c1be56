"""States that are the last rows read: a window's keys and values, a filter's inputs.

A tail is [..., R, *rest]: the last R rows, right-aligned, zeros where fewer were read; a count [...] beside it says how
many are real. Everything here moves rows by index and selects, never by a product: a NaN stays in its own document.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def last_rows(x: Tensor, rows: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """The tail [N, rows, ...] of x [B, T, ...] read from nothing. A copy: a view would keep all of x alive."""
    tokens = x.shape[1]
    if cu_seqlens is None:
        if tokens < rows:
            return F.pad(x, (0, 0) * (x.ndim - 2) + (rows - tokens, 0))
        return x[:, tokens - rows :].clone()
    offsets = cu_seqlens.long()
    if not tokens:
        return x.new_zeros(offsets.numel() - 1, rows, *x.shape[2:])
    row = offsets[1:, None] + torch.arange(-rows, 0, device=x.device)
    real = row >= offsets[:-1, None]
    picked = x[0].index_select(0, row.clamp(min=0).flatten()).unflatten(0, row.shape)
    return picked.masked_fill(~_over(real, picked), 0)


def last_count(x: Tensor, rows: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """How many rows of `last_rows` are real: int32 [N]."""
    if cu_seqlens is None:
        return torch.full((x.shape[0],), min(x.shape[1], rows), dtype=torch.int32, device=x.device)
    return cu_seqlens.diff().clamp(max=rows).to(torch.int32)


def append_tail(earlier: Tensor, later: Tensor, count: Tensor) -> Tensor:
    """The tail of both texts: ``earlier`` pushed out by ``later``, of which ``count`` [...] rows are real."""
    axis, rows = count.ndim, later.shape[count.ndim]
    place, pushed = torch.arange(rows, device=later.device), count.long()[..., None]
    row = torch.where(place >= rows - pushed, place + rows, place + pushed)
    return torch.cat([earlier, later], axis).take_along_dim(_over(row, later), axis)


def append_count(earlier: Tensor, later: Tensor, rows: int) -> Tensor:
    """How many rows of `append_tail` are real."""
    return (earlier + later).clamp(max=rows)


def tail_of_ring(ring: Tensor, read: Tensor) -> Tensor:
    """The tail [B, R, ...] of ``read`` [B] tokens in a ring [B, R + 1, ...] whose place t % (R + 1) holds token t."""
    size = ring.shape[1]
    token = read.long()[:, None] + torch.arange(1 - size, 0, device=ring.device)
    rows = ring.take_along_dim(_over(token % size, ring), 1)
    return rows.masked_fill(~_over(token >= 0, rows), 0)


def ring_of_tail(tail: Tensor, count: Tensor) -> Tensor:
    """The ring [B, R + 1, ...] of the ``count`` [B] real rows of a tail [B, R, ...], from place 0 on; else zeros.

    What the ring held before is overwritten, because a zero weight does not silence a NaN.
    """
    size = tail.shape[1] + 1
    place, real = torch.arange(size, device=tail.device), count.long()[:, None]
    row = torch.where(place < real, place + size - 1 - real, size - 1)
    zero = tail.new_zeros(tail.shape[0], 1, *tail.shape[2:])
    return torch.cat([tail, zero], 1).take_along_dim(_over(row, tail), 1)


def _over(index: Tensor, x: Tensor) -> Tensor:
    """``index`` with axes of 1 behind, to go with x."""
    return index.reshape(index.shape + (1,) * (x.ndim - index.ndim))
