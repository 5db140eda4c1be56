"""Cutting a batch into chunks of rows that never cross a document, and the pass over them that sums share.

A chunked mixer needs three functions of one chunk: what it adds to the State, how States join, and its outputs given
the State before it. `run_chunks` does the rest: cutting, packing, resets, initial and final States, and the split into
blocks that keeps the working set in cache. Cost and memory are linear in T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linattn.core.mixer import Combine, map_state, scan, select
from linattn.core.shapes import document_of_token

BLOCK_ROWS = 4096
"""Rows (tokens x heads x batch) that one block of chunks holds, about: what is built of them fits a CPU's cache."""
SUMMARY_TOKENS = 1024
"""Tokens a chunk, at most, where there are no outputs and documents are not packed: one product sums them all."""

Fold = Callable[[Any, Any], list[Any]]


@dataclass(frozen=True)
class Plan:
    """How [B, T, ...] becomes chunks [m, R, C, ...]: m chunks in a row, R rows, C tokens each.

    starts: int64 [m, R], where in its document each chunk begins.
    lengths: int64 [m, R], the real tokens of each chunk; the rest of its C are padding at its end.
    Both are None where every place holds a real token, so that nothing is masked.
    Packed rows (R = 1) also know: rows [m, C] the token each place holds; place [T] where each token went;
    fresh bool [m, 1] first chunk of its document; document int64 [m]; last int64 [N] each document's last chunk;
    empty bool [N] documents without tokens.
    """

    size: int
    tokens: int
    count: int
    starts: Tensor | None = None
    lengths: Tensor | None = None
    rows: Tensor | None = None
    place: Tensor | None = None
    fresh: Tensor | None = None
    document: Tensor | None = None
    last: Tensor | None = None
    empty: Tensor | None = None

    @property
    def mask(self) -> Tensor | None:
        """bool [m, R, C]: True on real tokens; None where all are."""
        if self.lengths is None:
            return None
        return torch.arange(self.size, device=self.lengths.device) < self.lengths[..., None]

    def limited(self, lengths: Tensor) -> Plan:
        """The same cut where row (or document) n holds only its first lengths[n] tokens; the rest is padding."""
        starts, held = self.starts, self.lengths
        if starts is None or held is None:
            starts, held = _unpacked(lengths.shape[0], self.tokens, self.size, self.count, lengths.device)
        lengths = lengths.long() if self.document is None else lengths.long()[self.document][:, None]
        return replace(self, starts=starts, lengths=torch.minimum(held, (lengths - starts).clamp(min=0)))


def _unpacked(batch: int, tokens: int, size: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    starts = (torch.arange(count, device=device)[:, None] * size).expand(count, batch)
    return starts, (tokens - starts).clamp(max=size)


def plan_chunks(batch: int, tokens: int, size: int, cu_seqlens: Tensor | None, device: torch.device) -> Plan:
    """Cut ``tokens`` tokens into chunks of ``size``; packed documents each begin a chunk of their own.

    Packed, the number of chunks is T // size + N whatever the documents' lengths, so that shapes are static and
    nothing waits for the device; chunks that no document needs have length 0.
    """
    if cu_seqlens is None:
        count = max(1, -(-tokens // size))
        if tokens == count * size:
            return Plan(size, tokens, count)
        return Plan(size, tokens, count, *_unpacked(batch, tokens, size, count, device))
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
        len(chunk),
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
    missing = plan.count * plan.size - plan.tokens
    if missing:
        x = F.pad(x, (0, 0, 0, 0, 0, missing))
    return x.unflatten(1, (plan.count, plan.size)).permute(1, 0, 3, 2, 4)


def join(blocks: list[Tensor], plan: Plan) -> Tensor:
    """Blocks of chunks [m, R, H, C, V] back as [B, T, H, V]."""
    rows = [y.permute(1, 0, 3, 2, 4) for y in blocks]
    y = (torch.cat(rows, 1) if len(rows) > 1 else rows[0]).flatten(1, 2)
    if plan.place is not None:
        return y[:, plan.place]
    return y if y.shape[1] == plan.tokens else y[:, : plan.tokens]


def run_chunks(
    plan: Plan,
    inputs: tuple[Tensor, ...],
    summarize: Callable[..., Any],
    combine: Combine,
    outputs: Callable[..., Tensor],
    initial_state: Any,
    return_state: bool,
    fold: Fold | None = None,
    lay_out: Callable[[Tensor], Tensor] = Tensor.contiguous,
) -> tuple[Tensor, Any]:
    """One pass over all chunks.

    Args:
        inputs: per-token tensors [B, T, H, D].
        summarize: (chunks of inputs [m, R, H, C, D]..., mask bool [m, R, 1, C], lengths [m, R]) -> State [m, R, ...];
            mask and lengths are None where every token is real.
        outputs: (State before each chunk [m, R, ...], chunks of inputs..., mask, lengths) -> [m, R, H, C, V].
        initial_state: State [N, ...], never None.
        fold: (State [R, ...], what each chunk adds [m, R, ...]) -> the State before the first chunk, and after each:
            what ``combine`` says, one after another, for rows without documents.
        lay_out: what is done to a block of each input [m, R, H, C, D], a permuted view, before its chunks are used.

    Returns:
        outputs [B, T, H, V] and the final State [N, ...] (None unless asked for).
    """
    fresh, documents = plan.fresh, plan.document
    carry = initial_state if fresh is None else map_state(lambda leaf: leaf[:1], initial_state)
    ys, kept = [], []
    for first, stop, tokens, mask, length in _blocks(plan, inputs, lay_out):
        added = summarize(*tokens, mask, length)
        if fresh is None or documents is None:
            states = _fold(combine, carry, added) if fold is None else fold(carry, added)
            before, carry = map_state(lambda *leaves: torch.stack(leaves), *states[:-1]), states[-1]
            del states
        else:
            is_first = fresh[first:stop]
            start = map_state(lambda leaf, d=documents[first:stop]: leaf[d][:, None], initial_state)
            added = select(is_first, combine(start, added), added)
            after = _with_carry(combine, carry, added, is_first)
            before = map_state(lambda head, rest: torch.cat([head[None], rest[:-1]]), carry, after)
            before = select(is_first, start, before)
            carry = map_state(lambda leaf: leaf[-1], after)
            if return_state:
                kept.append(after)
        del added
        ys.append(outputs(before, *tokens, mask, length))
    y = join(ys, plan)
    if not return_state:
        return y, None
    if plan.last is None or plan.empty is None:
        return y, carry
    final = map_state(lambda *leaves: torch.cat(leaves)[plan.last, 0], *kept)
    return y, select(plan.empty, initial_state, final)


def summary_size(tokens: int, size: int, cu_seqlens: Tensor | None) -> int:
    """Tokens a chunk for `sum_chunks`: ``size`` when packed, else as many times that as the tokens fill, to a limit."""
    return size if cu_seqlens is not None else min(SUMMARY_TOKENS, size * max(1, -(-tokens // size)))


def sum_chunks(
    plan: Plan,
    inputs: tuple[Tensor, ...],
    summarize: Callable[..., Any],
    combine: Combine,
    identity: Any,
    fold: Fold | None = None,
    lay_out: Callable[[Tensor], Tensor] = Tensor.contiguous,
) -> Any:
    """The State [N, ...] of all tokens read from nothing: `run_chunks` without outputs."""
    fresh = plan.fresh
    carry = identity if fresh is None else map_state(lambda leaf: leaf[:1], identity)
    kept = []
    for first, stop, tokens, mask, length in _blocks(plan, inputs, lay_out):
        added = summarize(*tokens, mask, length)
        if fresh is None:
            carry = (_fold(combine, carry, added) if fold is None else fold(carry, added))[-1]
        else:
            after = _with_carry(combine, carry, added, fresh[first:stop])
            carry = map_state(lambda leaf: leaf[-1], after)
            kept.append(after)
    if plan.last is None or plan.empty is None:
        return carry
    final = map_state(lambda *leaves: torch.cat(leaves)[plan.last, 0], *kept)
    return select(plan.empty, identity, final)


def _blocks(
    plan: Plan, inputs: tuple[Tensor, ...], lay_out: Callable[[Tensor], Tensor]
) -> Iterator[tuple[int, int, list[Tensor], Tensor | None, Tensor | None]]:
    """First and last + 1 chunk of each block, its inputs, mask [m, R, 1, C] and lengths [m, R]."""
    chunks = tuple(cut(x, plan) for x in inputs)
    block = max(1, BLOCK_ROWS // max(1, *(math.prod(x.shape[1:4]) for x in chunks)))
    mask, first = plan.mask, 0
    for parts in zip(*(x.split(block) for x in chunks), strict=True):
        stop = first + parts[0].shape[0]
        # Matrix products copy permuted views anyway: once here, instead of in each and again for the backward pass.
        tokens = [lay_out(x) for x in parts]
        if mask is None or plan.lengths is None:
            yield first, stop, tokens, None, None
        else:
            yield first, stop, tokens, mask[first:stop, :, None], plan.lengths[first:stop]
        first = stop


def _fold(combine: Combine, carry: Any, added: Any) -> list[Any]:
    """The State before the first chunk of a block, and after each. One after another: a scan's slices cost more."""
    states = [carry]
    for leaves in zip(*(leaf.unbind() for leaf in added), strict=True):
        states.append(combine(states[-1], type(added)(*leaves)))
    return states


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
