"""Sliding-window attention, backend "torch": O(T W), any device, ordinary differentiable torch.

Chunks of C >= W-1 tokens, each behind the W-1 keys before it (of its document, or of the State); inside a chunk,
pieces of 64 queries meet the 64 + W-1 keys they can see. Scores and softmax are fp32 (float64 for float64).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linattn.core.chunks import Plan, cut, join, plan_chunks
from linattn.core.numerics import full_precision, sum_dtype
from linattn.core.pool import pool_rows
from linattn.core.tails import append_count, append_tail, last_count, last_rows, ring_of_tail, tail_of_ring

QUERIES = 64
"""Queries a piece: at W 129 a piece sees 192 keys; 32 is as fast forward and slower backward, 128 slower in both."""

MIN_CHUNK = 128
"""Tokens a chunk, at least."""

BLOCK_SCORES = {"cpu": 3 * 2**16, "other": 2**25}
"""Scores that exist at a time, about: 768 KiB in fp32 stay in a core's cache, 128 MiB keep another device busy.

At W 129 that is four chunks of four heads. A short call finds all that a block takes cold: with 2 MiB of scores 1,024
tokens took 12 MB beside their inputs (5 now), and each cost 40% more than a token of a long text.
"""


class WindowState(NamedTuple):
    """What a window remembers: the last W-1 keys and values, in the inputs' dtype, right-aligned, else zeros.

    k: [N, W-1, H, D], rotated.   v: [N, W-1, H, V].   count: int32 [N], how many rows are real: min(tokens, W-1).
    """

    k: Tensor
    v: Tensor
    count: Tensor


class WindowPool(NamedTuple):
    """A ring a slot: token t since the slot was filled lies at place t % W.

    k: [slots + 1, W, H, D].   v: [slots + 1, W, H, V].   tokens: int64 [slots + 1], tokens the ring has taken.
    """

    k: Tensor
    v: Tensor
    tokens: Tensor


def identity(batch: int, window: int, k_shape: tuple[int, int], v_shape: tuple[int, int], like: Tensor) -> WindowState:
    """The State that has read nothing, with ``like``'s device and dtype; ``k_shape`` is (H, D), ``v_shape`` (H, V)."""
    k = like.new_zeros(batch, window - 1, *k_shape)
    v = like.new_zeros(batch, window - 1, *v_shape)
    return WindowState(k, v, torch.zeros(batch, dtype=torch.int32, device=like.device))


def combine(earlier: WindowState, later: WindowState) -> WindowState:
    """The State of both texts: ``earlier`` shifted out by what ``later`` has read."""
    k = append_tail(earlier.k, later.k, later.count)
    v = append_tail(earlier.v, later.v, later.count)
    return WindowState(k, v, append_count(earlier.count, later.count, later.k.shape[later.count.ndim]))


def summarize(k: Tensor, v: Tensor, window: int, cu_seqlens: Tensor | None = None) -> WindowState:
    """The State of k [B, T, H, D], v [B, T, H, V] read from nothing."""
    rows = window - 1
    return WindowState(last_rows(k, rows, cu_seqlens), last_rows(v, rows, cu_seqlens), last_count(k, rows, cu_seqlens))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    scale: float,
    initial_state: WindowState | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, WindowState | None]:
    """`window_attention` on checked arguments."""
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    before = initial_state
    if before is None:
        before = identity(rows, window, (k.shape[2], k.shape[3]), (v.shape[2], v.shape[3]), k)
    before = before._replace(k=before.k.to(k.dtype), v=before.v.to(v.dtype))
    size = max(MIN_CHUNK, -(-(window - 1) // QUERIES) * QUERIES)
    plan = plan_chunks(q.shape[0], q.shape[1], size, cu_seqlens, q.device)
    with full_precision(q):
        y = join(_blocks(plan, q, k, v, before, scale), plan)
    if not return_state:
        return y, None
    read = summarize(k, v, window, cu_seqlens)
    return y, read if initial_state is None else combine(before, read)


def _blocks(plan: Plan, q: Tensor, k: Tensor, v: Tensor, before: WindowState, scale: float) -> list[Tensor]:
    """The outputs [chunks, R, Hq, C, V] of each block of chunks; scores exist for one piece of one block at a time."""
    past, dtype = before.k.shape[1], sum_dtype(q.dtype)
    scores = q.shape[0] * q.shape[2] * QUERIES * (QUERIES + past)
    block = max(1, BLOCK_SCORES["cpu" if q.device.type == "cpu" else "other"] // max(1, scores))
    never, group = _never(past, dtype, q.device), q.shape[2] // k.shape[2]
    if group > 1:
        never = never.repeat(group, 1)
    # Keys of a State have the layout of a chunk: [N, H, W-1, D].
    states = before.k.transpose(1, 2), before.v.transpose(1, 2)
    carries = [state[:1] if plan.fresh is not None else state for state in states]
    ys = []
    q_blocks, *kv_blocks = (cut(x, plan).split(block) for x in (q, k, v))
    for n, queries in enumerate(q_blocks):
        chunks = slice(n * block, n * block + queries.shape[0])
        document = None if plan.document is None else plan.document[chunks]
        seen = []
        for i, (blocks, state) in enumerate(zip(kv_blocks, states, strict=True)):
            chunk = blocks[n]
            tails = chunk[..., plan.size - past :, :]
            ahead = torch.cat([carries[i][None], tails[:-1]])
            if document is not None and plan.fresh is not None:
                ahead = torch.where(plan.fresh[chunks, :, None, None, None], state[document][:, None], ahead)
            seen.append(torch.cat([ahead, chunk], -2).to(dtype))
            carries[i] = tails[-1]
        missing = None
        if document is not None and plan.fresh is not None:
            missing = torch.where(plan.fresh[chunks], past - before.count.long()[document][:, None], 0)
        elif n == 0:
            missing = (past - before.count)[None]
        ys.append(_attend(queries.to(dtype).contiguous(), seen[0], seen[1], never, missing, scale).to(v.dtype))
    return ys


def _never(past: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[QUERIES, QUERIES + W-1], -inf on the keys of a piece that a query does not see though all are real, else 0.

    Added to the scores: filling them under a mask takes five times as long.
    """
    far = torch.full((QUERIES, QUERIES + past), float("-inf"), dtype=dtype, device=device)
    return far.tril(-1) + far.triu(past + 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, never: Tensor, missing: Tensor | None, scale: float) -> Tensor:
    """q [m, R, Hq, C, D] on k, v [m, R, H, W-1 + C, D or V]; ``missing`` [<= m, R] first rows are not real."""
    m, rows, heads, seen, dim = k.shape
    past, keys, values = seen - q.shape[3], k.flatten(0, 2), v.flatten(0, 2)
    hidden = None
    if missing is not None:
        unreal = torch.arange(seen, device=q.device) < missing[..., None, None]
        unreal = F.pad(unreal, (0, 0, 0, 0, 0, 0, 0, m - len(missing))).expand(m, rows, heads, seen)
        hidden = torch.zeros_like(unreal, dtype=q.dtype).masked_fill(unreal, float("-inf")).view(-1, 1, seen)
    ys = []
    for i, piece in enumerate(q.split(QUERIES, -2)):
        ends = slice(i * QUERIES, (i + 1) * QUERIES + past)
        # A group's queries stand below one another, so that its keys and values are read once.
        piece = piece.reshape(len(keys), len(never), dim)
        s = torch.baddbmm(never, piece, keys[:, ends].transpose(1, 2), alpha=scale)
        if hidden is not None:
            s = s + hidden[..., ends]
        y = torch.bmm(s.softmax(-1), values[:, ends])
        ys.append(y.view(*q.shape[:3], QUERIES, v.shape[-1]).permute(1, 0, 3, 2, 4))
    return torch.cat(ys, 2).permute(1, 0, 3, 2, 4)


def new_pool(state: WindowState, slots: int, capacity: int | None = None) -> WindowPool:
    """A pool of ``slots`` empty rings for States like ``state``, and one more, which idle rows of a batch write to."""

    def ring(rows: Tensor) -> Tensor:
        return rows.new_zeros(slots + 1, rows.shape[1] + 1, *rows.shape[2:])

    return WindowPool(ring(state.k), ring(state.v), torch.zeros(slots + 1, dtype=torch.int64, device=state.k.device))


def step_(q: Tensor, k: Tensor, v: Tensor, pool: WindowPool, slots: Tensor, *, scale: float) -> Tensor:
    """One token a row: q [B, Hq, D], k [B, H, D], v [B, H, V], slots int32 [B] -> y [B, Hq, V]; pool in place."""
    rows = pool_rows(pool.tokens, slots)
    dtype, window = sum_dtype(q.dtype), pool.k.shape[1]
    read = pool.tokens.index_select(0, rows)
    pool.k[rows, read % window] = k.to(pool.k.dtype)
    pool.v[rows, read % window] = v.to(pool.v.dtype)
    pool.tokens.index_copy_(0, rows, read + 1)
    keys, values = (x.index_select(0, rows).transpose(1, 2).to(dtype) for x in (pool.k, pool.v))
    s = (q.to(dtype) * scale).unflatten(1, (k.shape[1], -1)) @ keys.transpose(-1, -2)
    empty = torch.arange(window, device=q.device) > read[:, None]
    w = s.masked_fill(empty[:, None, None], float("-inf")).softmax(-1)
    return (w @ values).flatten(1, 2).to(v.dtype)


def take(pool: WindowPool, slots: Tensor) -> WindowState:
    """The States in ``slots`` int [B] of a pool, copied."""
    slots = slots.long()
    read = pool.tokens[slots]
    count = read.clamp(max=pool.k.shape[1] - 1).to(torch.int32)
    return WindowState(tail_of_ring(pool.k[slots], read), tail_of_ring(pool.v[slots], read), count)


def put_(pool: WindowPool, slots: Tensor, state: WindowState) -> None:
    """Write the States ``state`` [B, ...] into ``slots`` int [B] of a pool."""
    slots = slots.long()
    pool.k[slots] = ring_of_tail(state.k, state.count).to(pool.k.dtype)
    pool.v[slots] = ring_of_tail(state.v, state.count).to(pool.v.dtype)
    pool.tokens[slots] = state.count.long()
