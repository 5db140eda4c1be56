"""Lightning attention, backend "torch": chunks of C tokens, O(T), any device, ordinary differentiable torch.

Every decay is exp(log_decay * n) with n an integer distance of at least 0, so that no factor exceeds 1 and nothing is
ever divided by a decay; the last chunk of a document uses its true length. Everything is computed in the sum dtype
(fp32; float64 for float64), whatever the inputs'.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from linattn.core.chunks import plan_chunks, run_chunks, sum_chunks, summary_size
from linattn.core.numerics import full_precision, sum_dtype
from linattn.core.pool import pool_rows
from linattn.core.shapes import document_count, match_heads

CHUNK = 128
"""Tokens a chunk: as fast as 64 (14 us a token, 4 heads of 128, one core), and half the States kept for backward."""


class LightningState(NamedTuple):
    """What lightning attention remembers, in fp32 (float64 for float64 inputs).

    log_decay: [N, H], the log of the decay carried so far: tokens read times the head's log_decay.
    S: [N, H, D, V], sum of exp(log_decay)^(tokens since) k v^T, the last token undecayed.
    """

    log_decay: Tensor
    S: Tensor


def identity(documents: int, heads: int, key_dim: int, value_dim: int, like: Tensor) -> LightningState:
    """The State that has read nothing, on ``like``'s device, for inputs of its dtype."""
    dtype = sum_dtype(like.dtype)
    S = torch.zeros(documents, heads, key_dim, value_dim, device=like.device, dtype=dtype)
    return LightningState(torch.zeros(documents, heads, device=like.device, dtype=dtype), S)


def decayed(S: Tensor, log_decay: Tensor, added: Tensor) -> Tensor:
    """exp(log_decay) S + added; S, added [..., H, D, V], log_decay [..., H].

    A slow decay is S + (expm1(log_decay) S + added). In fp32 the factor itself, close to 1, is rounded by up to 3e-8,
    each time the same way: the State of TransNormerLLM's last layer is then off by 1e-3 after 60,000 steps, and
    like this by 4e-6. A fast decay keeps exp, because S - S (1 - decay) would cancel.
    """
    return _grow(S, added, *_factors(log_decay))


def _factors(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """How much of a State, whole (1 or 0) and in part, is added to what follows; [..., H, 1, 1] each."""
    slow = log_decay > -0.5
    rest = torch.where(slow, log_decay.expm1(), log_decay.exp())
    return slow[..., None, None].to(log_decay.dtype), rest[..., None, None]


def _grow(S: Tensor, added: Tensor, slow: Tensor, rest: Tensor) -> Tensor:
    return torch.addcmul(torch.addcmul(added, S, rest), S, slow)


def combine(earlier: LightningState, later: LightningState) -> LightningState:
    """The State of both texts: the earlier one decays by what the later one carries."""
    return LightningState(earlier.log_decay + later.log_decay, decayed(earlier.S, later.log_decay, later.S))


def _to_end(log_decay: Tensor, size: int) -> Tensor:
    """[H, C], what is left of each token at the end of a chunk of C."""
    return torch.exp(log_decay[:, None] * torch.arange(size - 1, -1, -1, device=log_decay.device))


def _summarize_chunks(
    k: Tensor, v: Tensor, log_decay: Tensor, to_end: Tensor, mask: Tensor | None, lengths: Tensor | None
) -> LightningState:
    """k [m, R, H, C, D], v [m, R, H, C, V] -> the State of each chunk's real tokens, whose last is undecayed."""
    C = k.shape[3]
    if mask is None or lengths is None:
        carried, decay = (log_decay * C).expand(*k.shape[:3]), to_end
    else:
        left = (lengths[..., None] - 1 - torch.arange(C, device=k.device)).clamp(min=0)
        carried, decay = lengths[..., None] * log_decay, torch.exp(log_decay[:, None] * left[:, :, None]) * mask
    return LightningState(carried, (k * decay[..., None]).transpose(-1, -2) @ v)


def _fold(before: LightningState, added: LightningState) -> list[LightningState]:
    """`combine`, chunk after chunk, with the factors of all chunks computed at once."""
    slow, rest = _factors(added.log_decay)
    states = [before]
    for log_decay, S, *factors in zip(*(x.unbind() for x in (*added, slow, rest)), strict=True):
        last = states[-1]
        states.append(LightningState(last.log_decay + log_decay, _grow(last.S, S, *factors)))
    return states


def summarize(k: Tensor, v: Tensor, log_decay: Tensor, cu_seqlens: Tensor | None = None) -> LightningState:
    """The State of k [B, T, Hk, D], v [B, T, Hv, V] under log_decay [H], read from nothing."""
    dtype, heads = sum_dtype(k.dtype), log_decay.shape[0]
    k, v = match_heads(k, heads).to(dtype), match_heads(v, heads).to(dtype)
    log_decay = log_decay.to(dtype)
    size = summary_size(k.shape[1], CHUNK, cu_seqlens)
    to_end = _to_end(log_decay, size)

    def summarize_chunks(k: Tensor, v: Tensor, mask: Tensor | None, lengths: Tensor | None) -> LightningState:
        return _summarize_chunks(k, v, log_decay, to_end, mask, lengths)

    plan = plan_chunks(k.shape[0], k.shape[1], size, cu_seqlens, k.device)
    zero = identity(document_count(k.shape[0], cu_seqlens), heads, k.shape[-1], v.shape[-1], k)
    with full_precision(k):
        return sum_chunks(plan, (k, v), summarize_chunks, combine, zero, _fold)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    initial_state: LightningState | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, LightningState | None]:
    """`lightning_attention` on checked arguments."""
    dtype, out_dtype = sum_dtype(q.dtype), v.dtype
    n_state = log_decay.shape[0]
    n_out = max(q.shape[2], n_state)
    group = n_out // n_state
    q = match_heads(q, n_out).to(dtype)
    q = q if scale == 1.0 else q * scale
    k, v = match_heads(k, n_state).to(dtype), match_heads(v, n_state).to(dtype)
    log_decay = log_decay.to(dtype)
    if initial_state is None:
        rows = document_count(q.shape[0], cu_seqlens)
        initial_state = identity(rows, n_state, k.shape[-1], v.shape[-1], k)
    i = torch.arange(CHUNK, device=q.device)
    distance = (i[:, None] - i).clamp(min=0)
    within = torch.exp(log_decay[:, None, None] * distance).tril().unsqueeze(1)
    since = torch.exp(log_decay[:, None] * (i + 1))[:, None, :, None]
    to_end = _to_end(log_decay, CHUNK)

    def outputs(
        before: LightningState, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lengths: Tensor | None
    ) -> Tensor:
        # A group's queries stand below one another, so that its keys, values and State are read once.
        q = q.unflatten(2, (n_state, group))
        s = (q @ k.unsqueeze(3).transpose(-1, -2)) * within
        o = torch.addcmul(s @ v.unsqueeze(3), q @ before.S.unsqueeze(3), since)
        return o.flatten(2, 3).to(out_dtype)

    def summarize_chunks(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lengths: Tensor | None
    ) -> LightningState:
        return _summarize_chunks(k, v, log_decay, to_end, mask, lengths)

    plan = plan_chunks(q.shape[0], q.shape[1], CHUNK, cu_seqlens, q.device)
    with full_precision(q):
        return run_chunks(plan, (q, k, v), summarize_chunks, combine, outputs, initial_state, return_state, _fold)


def step_(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, pool: LightningState, slots: Tensor, *, scale: float
) -> Tensor:
    """One token a row: q [B, Hq, D], k [B, Hk, D], v [B, Hv, V], slots int32 [B] -> o [B, H, V]; pool in place."""
    rows = pool_rows(pool.S, slots)
    dtype, out_dtype = pool.S.dtype, v.dtype
    n_state = pool.S.shape[1]
    log_decay = log_decay.to(dtype)
    q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    q = (match_heads(q, max(q.shape[2], n_state))[:, 0].to(dtype) * scale).unflatten(1, (n_state, -1))
    k, v = (match_heads(x, n_state)[:, 0].to(dtype) for x in (k, v))
    S = decayed(pool.S.index_select(0, rows), log_decay, k[..., None] * v[..., None, :])
    pool.S.index_copy_(0, rows, S)
    pool.log_decay.index_copy_(0, rows, pool.log_decay.index_select(0, rows) + log_decay)
    return (q @ S).flatten(1, 2).to(out_dtype)
