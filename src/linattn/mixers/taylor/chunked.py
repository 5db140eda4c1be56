"""Taylor linear attention, backend "torch": chunks of C tokens, O(T), any device, ordinary differentiable torch.

Inside a chunk the weights come from the scores (1 + s + s^2/2, always positive); what came before is read from the
State through the features. Everything is computed in the sum dtype (fp32; float64 for float64), whatever the inputs'.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from linattn.core.chunks import plan_chunks, run_chunks, sum_chunks
from linattn.core.mixer import map_state
from linattn.core.numerics import sum_dtype
from linattn.core.pool import pool_rows
from linattn.core.shapes import match_heads

CHUNK = 128
"""Tokens a chunk: at F 16, V 64 the scores then cost half of what reading and adding to the State does."""


class TaylorState(NamedTuple):
    """What Taylor linear attention remembers: sums over the tokens read, in fp32 (float64 for float64 inputs).

    S: [N, H, P, V], sum of phi(k) v^T.   z: [N, H, P], sum of phi(k).   P = 1 + F + F(F+1)/2, order of `features`.
    """

    S: Tensor
    z: Tensor


def n_features(feature_dim: int) -> int:
    """P, the length of phi(x) for x of ``feature_dim``: 153 for 16."""
    return 1 + feature_dim + feature_dim * (feature_dim + 1) // 2


def features(x: Tensor) -> Tensor:
    """phi(x), [..., F] -> [..., P], with phi(q) . phi(k) = 1 + q.k + (q.k)^2/2.

    Order: 1; x_0 .. x_{F-1}; then x_i x_j for i <= j, row by row, the squares over sqrt(2).
    """
    dim = x.shape[-1]
    i, j = torch.triu_indices(dim, dim, device=x.device)
    halved = torch.cat([i.new_zeros(1 + dim, dtype=torch.bool), i == j])
    coefficients = torch.ones(len(halved), device=x.device, dtype=x.dtype).masked_fill(halved, 1 / math.sqrt(2))
    # Slices, not x[..., i] * x[..., j]: half the time forward, a third backward.
    products = (column * x[..., n:] for n, column in enumerate(x.split(1, -1)))
    return torch.cat([torch.ones_like(x[..., :1]), x, *products], -1) * coefficients


def identity(batch: int, heads: int, feature_dim: int, value_dim: int, like: Tensor) -> TaylorState:
    """The State that has read nothing, on ``like``'s device, for inputs of its dtype."""
    dtype = sum_dtype(like.dtype)
    P = n_features(feature_dim)
    S = torch.zeros(batch, heads, P, value_dim, device=like.device, dtype=dtype)
    return TaylorState(S, torch.zeros(batch, heads, P, device=like.device, dtype=dtype))


def combine(earlier: TaylorState, later: TaylorState) -> TaylorState:
    """The State of both texts: sums add."""
    return map_state(torch.add, earlier, later)


def _summarize_chunks(k: Tensor, v: Tensor, mask: Tensor, lengths: Tensor) -> TaylorState:
    """k [m, R, H, C, F], v [m, R, H, C, V] -> sums over C. Padding counts for nothing though phi(0) is not 0."""
    fk = features(k)
    real = mask.to(v.dtype)
    S = fk.transpose(-1, -2) @ v.masked_fill(~mask[..., None], 0)
    return TaylorState(S, (real.unsqueeze(-2).expand(*v.shape[:3], 1, -1) @ fk).squeeze(-2))


def summarize(k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None, lengths: Tensor | None = None) -> TaylorState:
    """The State of k [B, T, Hk, F], v [B, T, Hv, V] read from nothing; ``lengths`` [B] leaves out what lies beyond."""
    heads = max(k.shape[2], v.shape[2])
    dtype = sum_dtype(k.dtype)
    k, v = match_heads(k, heads).to(dtype), match_heads(v, heads).to(dtype)
    plan = plan_chunks(k.shape[0], k.shape[1], CHUNK, cu_seqlens, k.device)
    if lengths is not None:
        plan = plan.limited(lengths)
    rows = k.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    zero = identity(rows, heads, k.shape[-1], v.shape[-1], k)
    return sum_chunks(plan, (k, v), _summarize_chunks, combine, zero)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    normalize: bool,
    initial_state: TaylorState | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, TaylorState | None]:
    """`taylor_attention` on checked arguments."""
    dtype, out_dtype = sum_dtype(q.dtype), v.dtype
    n_state = max(k.shape[2], v.shape[2])
    n_out = max(q.shape[2], n_state)
    group = n_out // n_state
    q = match_heads(q, n_out).to(dtype) * scale
    k, v = match_heads(k, n_state).to(dtype), match_heads(v, n_state).to(dtype)
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial_state is None:
        initial_state = identity(rows, n_state, k.shape[-1], v.shape[-1], k)
    future = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1).repeat(group, 1)
    half = torch.full((), 0.5, dtype=dtype, device=q.device)

    def outputs(before: TaylorState, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
        # A group's queries stand below one another, so that its keys, values and State are read once.
        heads = q.shape[:3]
        q = q.unflatten(2, (n_state, group)).flatten(3, 4).flatten(0, 2)
        k, v = k.flatten(0, 2), v.flatten(0, 2)
        S, z = (leaf.flatten(0, 2) for leaf in before)
        # 1 + s + s^2/2 = ((1 + s)^2 + 1) / 2: one pass over the scores where the sum would take four.
        s = torch.baddbmm(half.new_ones(1, 1, 1), q, k.transpose(1, 2))
        # Filled, not multiplied by 0: the square of a large score overflows, and infinity times 0 is NaN.
        w = torch.addcmul(half, s, s, value=0.5).masked_fill_(future, 0)
        fq = features(q)
        y = torch.baddbmm(w @ v, fq, S)
        if normalize:
            y = y / torch.baddbmm(w.sum(-1, keepdim=True), fq, z[..., None])
        return y.to(out_dtype).unflatten(0, (*heads[:2], n_state)).unflatten(3, (group, CHUNK)).flatten(2, 3)

    def summarize_chunks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, lengths: Tensor) -> TaylorState:
        return _summarize_chunks(k, v, mask, lengths)

    plan = plan_chunks(q.shape[0], q.shape[1], CHUNK, cu_seqlens, q.device)
    return run_chunks(plan, (q, k, v), summarize_chunks, combine, outputs, initial_state, return_state)


def step_(
    q: Tensor, k: Tensor, v: Tensor, pool: TaylorState, slots: Tensor, *, scale: float, normalize: bool
) -> Tensor:
    """One token a row: q [B, Hq, F], k [B, Hk, F], v [B, Hv, V], slots int32 [B] -> y [B, H, V]; pool in place."""
    rows = pool_rows(pool.S, slots)
    dtype, out_dtype = pool.S.dtype, v.dtype
    n_state = pool.S.shape[1]
    q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    fq = features(match_heads(q, max(q.shape[2], n_state))[:, 0].to(dtype) * scale).unflatten(1, (n_state, -1))
    fk = features(match_heads(k, n_state)[:, 0].to(dtype))
    v = match_heads(v, n_state)[:, 0].to(dtype)
    S = pool.S.index_select(0, rows).addcmul_(fk[..., None], v[..., None, :])
    z = pool.z.index_select(0, rows).add_(fk)
    pool.S.index_copy_(0, rows, S)
    pool.z.index_copy_(0, rows, z)
    y = fq @ S
    if normalize:
        y = y / (fq @ z[..., None])
    return y.flatten(1, 2).to(out_dtype)
