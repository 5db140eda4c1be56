"""Softmax attention, backend "torch": torch's scaled_dot_product_attention, in blocks of queries where it needs a mask.

From nothing, one fused causal call. From a State, BLOCK queries at a time against the keys before them, so that scores
and masks never hold T^2 entries. Packed documents are read one by one: none meets another's keys, whatever they hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from linattn.core.pool import pool_rows
from linattn.core.shapes import values_are_checked

BLOCK = 512
"""Queries that share one mask, when there is a State."""


class SoftmaxState(NamedTuple):
    """What softmax attention remembers: everything. Keys and values keep their dtype.

    k: [N, L, H, D], v: [N, L, H, V], left-aligned, zeros beyond the count.   count: int32 [N], at most L.
    L is a capacity: rows of one State may hold different numbers of tokens.
    """

    k: Tensor
    v: Tensor
    count: Tensor


def identity(documents: int, heads: int, key_dim: int, value_dim: int, like: Tensor) -> SoftmaxState:
    """The State that has read nothing, of capacity 0, on ``like``'s device and in its dtype."""
    count = torch.zeros(documents, dtype=torch.int32, device=like.device)
    return SoftmaxState(
        like.new_zeros(documents, 0, heads, key_dim), like.new_zeros(documents, 0, heads, value_dim), count
    )


def combine(earlier: SoftmaxState, later: SoftmaxState) -> SoftmaxState:
    """Both texts' tokens, over any leading axes; the capacities add."""
    capacity = earlier.k.shape[-3]
    total = capacity + later.k.shape[-3]
    if capacity == 0 or total == capacity:
        return (later if capacity == 0 else earlier)._replace(count=earlier.count + later.count)
    place = torch.arange(total, device=earlier.k.device)
    first, count = earlier.count[..., None], (earlier.count + later.count)[..., None]
    # The row of cat(earlier, later) that each place takes; places without a token take any, and become zero.
    source = torch.where(place < first, place, capacity + place - first).clamp(max=total - 1).long()

    def leaf(a: Tensor, b: Tensor) -> Tensor:
        rows = torch.take_along_dim(torch.cat([a, b], -3), source[..., None, None], -3)
        return torch.where((place < count)[..., None, None], rows, 0)

    return SoftmaxState(leaf(earlier.k, later.k), leaf(earlier.v, later.v), earlier.count + later.count)


def summarize(k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> SoftmaxState:
    """The State of k [B, T, H, D], v [B, T, H, V] read from nothing. Its capacity is T, or the longest document."""
    B, T = k.shape[:2]
    if cu_seqlens is None:
        return SoftmaxState(k.clone(), v.clone(), torch.full((B,), T, dtype=torch.int32, device=k.device))
    lengths = cu_seqlens.diff()
    # A trace cannot look at the lengths; there the capacity is what always suffices.
    capacity = T if torch.compiler.is_compiling() else int(lengths.max())
    place = torch.arange(capacity, device=k.device)
    rows = (cu_seqlens[:-1, None].long() + place).clamp(max=T - 1)
    real = (place < lengths[:, None])[..., None, None]
    return SoftmaxState(torch.where(real, k[0][rows], 0), torch.where(real, v[0][rows], 0), lengths.to(torch.int32))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    initial_state: SoftmaxState | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, SoftmaxState | None]:
    """`softmax_attention` on checked arguments."""
    if cu_seqlens is None and initial_state is not None:
        joined = combine(initial_state, summarize(k, v))
        return _after(q, joined, initial_state.count, initial_state.k.shape[1], scale), joined if return_state else None
    o = _attend(q, k, v, scale) if cu_seqlens is None else _documents(q, k, v, scale, initial_state, cu_seqlens)
    if not return_state:
        return o, None
    state = summarize(k, v, cu_seqlens)
    return o, state if initial_state is None else combine(initial_state, state)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, causal: bool = True) -> Tensor:
    """[B, T, H, D] in and out; ``causal`` gives way to a mask [B or 1, 1, Tq, Tk]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale, enable_gqa=grouped
    )
    return o.transpose(1, 2)


def _after(q: Tensor, joined: SoftmaxState, before: Tensor, capacity: int, scale: float) -> Tensor:
    """Queries q that follow ``before`` [B] <= ``capacity`` earlier tokens, against all of ``joined``."""
    outputs, first = [], 0
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, joined.k, joined.v))
    for block in q.split(BLOCK, 1):
        arguments = block, joined.k, joined.v, before + first, capacity + first + block.shape[1], scale
        # Each block's mask is built again for backward: kept, the masks would be T^2.
        outputs.append(
            checkpoint(_block, *arguments, use_reentrant=False, preserve_rng_state=False)
            if needs_grad
            else _block(*arguments)
        )
        first += block.shape[1]
    return torch.cat(outputs, 1)


def _block(q: Tensor, k: Tensor, v: Tensor, before: Tensor, reach: int, scale: float) -> Tensor:
    """Queries that follow ``before`` [B] tokens, against the first ``reach`` keys, which are all they can see."""
    last_seen = before[:, None] + torch.arange(q.shape[1], device=q.device)
    mask = torch.arange(reach, device=q.device) <= last_seen[..., None]
    return _attend(q, k[:, :reach], v[:, :reach], scale, mask[:, None])


def _documents(
    q: Tensor, k: Tensor, v: Tensor, scale: float, initial_state: SoftmaxState | None, cu_seqlens: Tensor
) -> Tensor:
    """Each packed document by itself. Reads the offsets on the host: once a call on CUDA, and never in a full trace."""
    lengths: Sequence[int] = cu_seqlens.diff().tolist()
    outputs = []
    for n, parts in enumerate(zip(*(x.split(lengths, 1) for x in (q, k, v)), strict=True)):
        if lengths[n]:
            state = None if initial_state is None else SoftmaxState(*(leaf[n : n + 1] for leaf in initial_state))
            outputs.append(forward(*parts, scale=scale, initial_state=state, cu_seqlens=None, return_state=False)[0])
    return torch.cat(outputs, 1)


def new_pool(state: SoftmaxState, slots: int, capacity: int | None = None) -> SoftmaxState:
    """A pool of ``slots`` empty States of ``capacity`` tokens each, and one row more, which idle rows write to."""
    if capacity is None or capacity < 1:
        raise ValueError(f"a pool of attention States needs a capacity in tokens of at least 1, got {capacity}")
    k, v = (x.new_zeros(slots + 1, capacity, *x.shape[2:]) for x in (state.k, state.v))
    return SoftmaxState(k, v, state.count.new_zeros(slots + 1))


def step_(q: Tensor, k: Tensor, v: Tensor, pool: SoftmaxState, slots: Tensor, *, scale: float) -> Tensor:
    """One token a row: q [B, Hq, D], k [B, H, D], v [B, H, V], slots int32 [B] -> o [B, Hq, V]; pool in place."""
    rows, capacity = pool_rows(pool.count, slots), pool.k.shape[1]
    count = pool.count.index_select(0, rows)
    reach, equal = capacity, False
    if values_are_checked(count) and count.numel():
        least, most = (int(n) for n in count.aminmax())
        reach, equal = most + 1, least == most
        if reach > capacity:
            full = int(slots[count.argmax()])
            raise ValueError(
                f"softmax_step_: slot {full} is full, it holds {capacity} tokens, the pool's capacity; "
                "make the pool with a larger capacity"
            )
    place = count.clamp(max=capacity - 1).long()
    for leaf, x in ((pool.k, k), (pool.v, v)):
        leaf.flatten(0, 1).index_copy_(0, rows * capacity + place, x.to(leaf.dtype))
    # Idle rows count nothing, so that the row that is no slot stays at 0.
    pool.count.index_copy_(0, rows, (count + (slots >= 0)).clamp(max=capacity).to(count.dtype))
    if equal and len(rows) == 1:
        row = int(rows)
        keys, values = (x[row : row + 1, :reach] for x in (pool.k, pool.v))
    else:
        keys, values = (x[:, :reach].index_select(0, rows) for x in (pool.k, pool.v))
    mask = None if equal else (torch.arange(reach, device=q.device) <= place[:, None])[:, None, None]
    return _attend(q[:, None], keys, values, scale, mask, causal=False)[:, 0]


def take(pool: SoftmaxState, slots: Tensor) -> SoftmaxState:
    """The States in ``slots`` int [B] of a pool, copied; their capacity is the longest's count, read on the host."""
    slots = slots.long()
    count = pool.count[slots]
    longest = int(count.max()) if count.numel() else 0
    return SoftmaxState(pool.k[slots, :longest], pool.v[slots, :longest], count)


def put_(pool: SoftmaxState, slots: Tensor, state: SoftmaxState) -> None:
    """Write the States ``state`` [B, ...] into ``slots`` int [B] of a pool.

    Raises:
        ValueError: a State holds more tokens than a slot can (checked on the CPU, and within `checked`).
    """
    slots, capacity = slots.long(), pool.k.shape[1]
    if values_are_checked(state.count) and state.count.numel() and int(state.count.max()) > capacity:
        raise ValueError(
            f"a State of {int(state.count.max())} tokens does not fit a pool whose capacity is {capacity} tokens"
        )
    for leaf, rows in ((pool.k, state.k), (pool.v, state.v)):
        # Zeros beyond the State: what the slot held before must not be read again.
        kept = rows[:, :capacity].to(leaf.dtype)
        leaf[slots] = F.pad(kept, (0, 0, 0, 0, 0, capacity - kept.shape[1]))
    pool.count[slots] = state.count.clamp(max=capacity)
