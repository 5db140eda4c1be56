"""Cutting a batch into chunks of rows that never cross a document, and the pass over them that sums share.

A chunked mixer needs three functions of one chunk: what it adds to the State, how States join, and its outputs given
the State before it. `run_chunks` does the rest: cutting, packing, resets, initial and final States, and the split into
blocks that keeps the working set in cache. Cost and memory are linear in T.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linattn.core.mixer import Combine, map_state, scan, select
from linattn.core.shapes import document_of_token

BLOCK_ROWS = 2048
"""Rows (tokens x heads x batch) that one block of chunks holds, about: what is built of them fits a CPU's cache."""


@dataclass(frozen=True)
class Plan:
    """How [B, T, ...] becomes chunks [m, R, C, ...]: m chunks in a row, R rows, C tokens each.

    starts: int64 [m, R], where in its document each chunk begins.
    lengths: int64 [m, R], the real tokens of each chunk; the rest of its C are padding at its end.
    Packed rows (R = 1) also know: rows [m, C] the token each place holds; place [T] where each token went;
    fresh bool [m, 1] first chunk of its document; document int64 [m]; last int64 [N] each document's last chunk;
    empty bool [N] documents without tokens.
    """

    size: int
    tokens: int
    starts: Tensor
    lengths: Tensor
    rows: Tensor | None = None
    place: Tensor | None = None
    fresh: Tensor | None = None
    document: Tensor | None = None
    last: Tensor | None = None
    empty: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """bool [m, R, C]: True on real tokens."""
        return torch.arange(self.size, device=self.lengths.device) < self.lengths[..., None]

    def limited(self, lengths: Tensor) -> Plan:
        """The same cut where row (or document) n holds only its first lengths[n] tokens; the rest is padding."""
        lengths = lengths.long() if self.document is None else lengths.long()[self.document][:, None]
        return replace(self, lengths=torch.minimum(self.lengths, (lengths - self.starts).clamp(min=0)))


def plan_chunks(batch: int, tokens: int, size: int, cu_seqlens: Tensor | None, device: torch.device) -> Plan:
    """Cut ``tokens`` tokens into chunks of ``size``; packed documents each begin a chunk of their own.

    Packed, the number of chunks is T // size + N whatever the documents' lengths, so that shapes are static and
    nothing waits for the device; chunks that no document needs have length 0.
    """
    if cu_seqlens is None:
        count = max(1, -(-tokens // size))
        starts = (torch.arange(count, device=device)[:, None] * size).expand(count, batch)
        return Plan(size, tokens, starts, (tokens - starts).clamp(max=size))
    offsets = cu_seqlens.long()
    documents = offsets.numel() - 1
    per_document = (offsets.diff() + size - 1) // size
    ends = per_document.cumsum(0)
    firsts = ends - per_document
    chunk = torch.arange(tokens // size + documents, device=device)
    document = torch.searchsorted(ends, chunk, right=True)
    used = document < documents
    document = document.clamp(max=documents - 1)
    within = chunk - firsts[document]
    starts = offsets[document] + within * size
    lengths = (offsets[document + 1] - starts).clamp(0, size) * used
    # Padding repeats the document's own last token: what a neighbour holds, NaN included, never enters a chunk.
    ends_at = (offsets[document + 1] - 1).clamp(0, tokens - 1)
    rows = torch.minimum(starts[:, None] + torch.arange(size, device=device), ends_at[:, None])
    of_token = document_of_token(cu_seqlens, tokens)
    inside = torch.arange(tokens, device=device) - offsets[of_token]
    return Plan(
        size,
        tokens,
        (within * size)[:, None],
        lengths[:, None],
        rows=rows,
        place=(firsts[of_token] + inside // size) * size + inside % size,
        fresh=((within == 0) & used)[:, None],
        document=document,
        last=(ends - 1).clamp(min=0),
        empty=per_document == 0,
    )


def cut(x: Tensor, plan: Plan) -> Tensor:
    """x [B, T, H, D] as chunks [m, R, H, C, D]; places without a token hold copies or zeros, never garbage."""
    if plan.rows is not None:
        return x[0][plan.rows].permute(0, 2, 1, 3).unsqueeze(1)
    count = plan.lengths.shape[0]
    missing = count * plan.size - plan.tokens
    if missing:
        x = F.pad(x, (0, 0, 0, 0, 0, missing))
    return x.unflatten(1, (count, plan.size)).permute(1, 0, 3, 2, 4)


def join(y: Tensor, plan: Plan) -> Tensor:
    """Chunks [m, R, H, C, V] back as [B, T, H, V]."""
    y = y.permute(1, 0, 3, 2, 4).flatten(1, 2)
    return y[:, plan.place] if plan.place is not None else y[:, : plan.tokens]


def run_chunks(
    plan: Plan,
    inputs: tuple[Tensor, ...],
    summarize: Callable[..., Any],
    combine: Combine,
    outputs: Callable[..., Tensor],
    initial_state: Any,
    return_state: bool,
) -> tuple[Tensor, Any]:
    """One pass over all chunks.

    Args:
        inputs: per-token tensors [B, T, H, D].
        summarize: (chunks of inputs [m, R, H, C, D]..., mask bool [m, R, 1, C], lengths [m, R]) -> State [m, R, ...].
        outputs: (State before each chunk [m, R, ...], chunks of inputs..., mask, lengths) -> [m, R, H, C, V].
        initial_state: State [N, ...], never None.

    Returns:
        outputs [B, T, H, V] and the final State [N, ...] (None unless asked for).
    """
    chunks = tuple(cut(x, plan) for x in inputs)
    block = _chunks_a_block(chunks)
    masks, lengths = plan.mask[:, :, None], plan.lengths
    blocks = [x.split(block) for x in (*chunks, masks, lengths)]
    fresh = plan.fresh.split(block) if plan.fresh is not None else None
    documents = plan.document.split(block) if plan.document is not None else None
    carry = initial_state if fresh is None else map_state(lambda leaf: leaf[:1], initial_state)
    ys, kept = [], []
    for i, parts in enumerate(zip(*blocks, strict=True)):
        *tokens, mask, length = parts
        # Matrix products copy permuted views anyway: once here, instead of in each and again for the backward pass.
        tokens = [x.contiguous() for x in tokens]
        added = summarize(*tokens, mask, length)
        if fresh is None or documents is None:
            start, after = None, _with_carry(combine, carry, added, None)
        else:
            start = map_state(lambda leaf, d=documents[i]: leaf[d][:, None], initial_state)
            added = select(fresh[i], combine(start, added), added)
            after = _with_carry(combine, carry, added, fresh[i])
        before = map_state(lambda first, rest: torch.cat([first[None], rest[:-1]]), carry, after)
        if start is not None and fresh is not None:
            before = select(fresh[i], start, before)
        ys.append(outputs(before, *tokens, mask, length))
        carry = map_state(lambda leaf: leaf[-1], after)
        if return_state and fresh is not None:
            kept.append(after)
    y = join(torch.cat(ys), plan)
    if not return_state:
        return y, None
    if plan.last is None or plan.empty is None:
        return y, carry
    final = map_state(lambda *leaves: torch.cat(leaves)[plan.last, 0], *kept)
    return y, select(plan.empty, initial_state, final)


def sum_chunks(
    plan: Plan, inputs: tuple[Tensor, ...], summarize: Callable[..., Any], combine: Combine, identity: Any
) -> Any:
    """The State [N, ...] of all tokens read from nothing: `run_chunks` without outputs."""
    chunks = tuple(cut(x, plan) for x in inputs)
    block = _chunks_a_block(chunks)
    blocks = [x.split(block) for x in (*chunks, plan.mask[:, :, None], plan.lengths)]
    fresh = plan.fresh.split(block) if plan.fresh is not None else [None] * len(blocks[0])
    carry = identity if plan.fresh is None else map_state(lambda leaf: leaf[:1], identity)
    kept = []
    for parts, reset in zip(zip(*blocks, strict=True), fresh, strict=True):
        after = _with_carry(combine, carry, summarize(*parts), reset)
        carry = map_state(lambda leaf: leaf[-1], after)
        if reset is not None:
            kept.append(after)
    if plan.last is None or plan.empty is None:
        return carry
    final = map_state(lambda *leaves: torch.cat(leaves)[plan.last, 0], *kept)
    return select(plan.empty, identity, final)


def _chunks_a_block(chunks: tuple[Tensor, ...]) -> int:
    return max(1, BLOCK_ROWS // max(1, *(math.prod(x.shape[1:4]) for x in chunks)))


def _with_carry(combine: Combine, carry: Any, added: Any, fresh: Tensor | None) -> Any:
    """The States after each chunk of a block, given the State before the block."""
    n = added[0].shape[0]
    first = map_state(lambda leaf: leaf[:1], added)
    joined = combine(map_state(lambda leaf: leaf[None], carry), first)
    if fresh is not None:
        joined = select(fresh[:1], first, joined)
    if n == 1:
        return joined
    rest = map_state(lambda leaf: leaf[1:], added)
    elements = map_state(lambda a, b: torch.cat([a, b]), joined, rest)
    return scan(combine, elements, fresh)
