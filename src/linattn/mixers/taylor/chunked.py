"""Taylor linear attention, backend "torch": chunks of C tokens, O(T), any device, ordinary differentiable torch.

Inside a chunk the weights come from the scores (1 + s + s^2/2, always positive); what came before is read from the
State through the features. Everything is computed in the sum dtype (fp32; float64 for float64), whatever the inputs'.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from linattn.core.chunks import plan_chunks, run_chunks, sum_chunks, summary_size
from linattn.core.mixer import map_state
from linattn.core.numerics import full_precision, sum_dtype
from linattn.core.pool import pool_rows
from linattn.core.shapes import document_count, match_heads

CHUNK = 128
"""Tokens a chunk: at F 16, V 64 the scores then cost half of what reading and adding to the State does."""


class TaylorState(NamedTuple):
    """What Taylor linear attention remembers: sums over the tokens read, in fp32 (float64 for float64 inputs).

    S: [N, H, P, V], sum of phi(k) v^T.   z: [N, H, P], sum of phi(k).   P = 1 + F + F(F+1)/2, order of `features`.
    """

    S: Tensor
    z: Tensor


def empty_state(like: Tensor, rows: int, heads: int, P: int, V: int) -> TaylorState:
    """S [rows, heads, P, V] and z [rows, heads, P] in fp32 on ``like``'s device, whatever memory holds there."""
    sizes = rows, heads, P
    return TaylorState(like.new_empty(*sizes, V, dtype=torch.float32), like.new_empty(sizes, dtype=torch.float32))


def n_features(feature_dim: int) -> int:
    """P, the length of phi(x) for x of ``feature_dim``: 153 for 16."""
    return 1 + feature_dim + feature_dim * (feature_dim + 1) // 2


def features(x: Tensor) -> Tensor:
    """phi(x), [..., F] -> [..., P], with phi(q) . phi(k) = 1 + q.k + (q.k)^2/2.

    Order: 1; x_0 .. x_{F-1}; then x_i x_j for i <= j, row by row, the squares over sqrt(2).
    """
    return _apply(_feature_maps(x.shape[-1], x), _with_one(x))


def _feature_maps(dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Two [1 + F, P] whose products with (1, x) multiply to phi(x), in ``like``'s dtype and on its device."""
    i, j = torch.triu_indices(dim + 1, dim + 1, device=like.device)
    one = torch.eye(dim + 1, device=like.device, dtype=like.dtype)
    halved = torch.ones(len(i), device=like.device, dtype=like.dtype).masked_fill((i == j) & (i > 0), 1 / math.sqrt(2))
    return one.index_select(1, i), one.index_select(1, j) * halved


def _apply(maps: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    """phi of (1, x) [..., 1 + F]: exact, since each sum has one term; a third of the time of columns times slices."""
    left, right = (x.reshape(-1, x.shape[-1]) @ m for m in maps)
    phi = left * right if torch.is_grad_enabled() else left.mul_(right)
    return phi.view(*x.shape[:-1], phi.shape[-1])


def _with_one(x: Tensor) -> Tensor:
    """(1, x): in q and k it makes 1 + s of the scores, in v it sums z."""
    return torch.cat([x.new_ones(()).expand(*x.shape[:-1], 1), x], -1)


def identity(batch: int, heads: int, feature_dim: int, value_dim: int, like: Tensor) -> TaylorState:
    """The State that has read nothing, on ``like``'s device, for inputs of its dtype."""
    dtype = sum_dtype(like.dtype)
    P = n_features(feature_dim)
    S = torch.zeros(batch, heads, P, value_dim, device=like.device, dtype=dtype)
    return TaylorState(S, torch.zeros(batch, heads, P, device=like.device, dtype=dtype))


def combine(earlier: TaylorState, later: TaylorState) -> TaylorState:
    """The State of both texts: sums add."""
    return map_state(torch.add, earlier, later)


class _Sums(NamedTuple):
    """A State in one piece, [..., P, V + 1]: values begin with a one, whose sum is z."""

    S: Tensor


def _sums(state: TaylorState) -> _Sums:
    return _Sums(torch.cat([state.z[..., None], state.S], -1))


def _state(sums: _Sums) -> TaylorState:
    return TaylorState(sums.S[..., 1:].contiguous(), sums.S[..., 0].contiguous())


def _fold(before: _Sums, added: _Sums) -> list[_Sums]:
    states = [before]
    for chunk in added.S.unbind():
        states.append(_Sums(states[-1].S + chunk))
    return states


def _summarize_chunks(maps: tuple[Tensor, Tensor], k: Tensor, v: Tensor, mask: Tensor | None) -> _Sums:
    """(1, k) [m, R, H, C, 1 + F], (1, v) [m, R, H, C, 1 + V] -> sums over C; padding counts for nothing."""
    return _Sums(_apply(maps, k).transpose(-1, -2) @ (v if mask is None else v.masked_fill(~mask[..., None], 0)))


def summarize(k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None, lengths: Tensor | None = None) -> TaylorState:
    """The State of k [B, T, Hk, F], v [B, T, Hv, V] read from nothing; ``lengths`` [B] leaves out what lies beyond."""
    heads = max(k.shape[2], v.shape[2])
    dtype = sum_dtype(k.dtype)
    with full_precision(k):
        k, v = match_heads(k, heads).to(dtype), match_heads(v, heads).to(dtype)
        maps = _feature_maps(k.shape[-1], k)

        def summarize_chunks(k: Tensor, v: Tensor, mask: Tensor | None, lengths: Tensor | None) -> _Sums:
            return _summarize_chunks(maps, k, v, mask)

        plan = plan_chunks(k.shape[0], k.shape[1], summary_size(k.shape[1], CHUNK, cu_seqlens), cu_seqlens, k.device)
        if lengths is not None:
            plan = plan.limited(lengths)
        zero = _sums(identity(document_count(k.shape[0], cu_seqlens), heads, k.shape[-1], v.shape[-1], k))
        return _state(sum_chunks(plan, (k, v), summarize_chunks, _add, zero, _fold, _with_one))


def _add(earlier: _Sums, later: _Sums) -> _Sums:
    return _Sums(earlier.S + later.S)


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
    if initial_state is None:
        initial_state = identity(document_count(q.shape[0], cu_seqlens), n_state, k.shape[-1], v.shape[-1], k)
    maps, half = _feature_maps(k.shape[-1], k), k.new_full((), 0.5)

    def outputs(before: _Sums, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor:
        # A group's queries stand below one another, so that its keys, values and State are read once.
        heads, C = q.shape[:2], q.shape[3]
        q = q.unflatten(2, (n_state, group)).flatten(3, 4).flatten(0, 2)
        k, v, S = (x.flatten(0, 2) for x in (k, v, before.S))
        # Before the scores, so that they and the features, the largest of all, are not there together.
        y = _apply(maps, q) @ S
        # 1 + s + s^2/2 = ((1 + s)^2 + 1) / 2, and 1 + s is what (1, q) . (1, k) gives.
        s = (q @ k.transpose(1, 2)).unflatten(1, (group, C))
        # Cut off, not multiplied by 0: the square of a large score overflows, and infinity times 0 is NaN.
        y = torch.baddbmm(y, torch.addcmul(half, s, s, value=0.5).tril_().flatten(1, 2), v)
        y = y[..., 1:] / y[..., :1] if normalize else y[..., 1:]
        return y.to(out_dtype).unflatten(0, (*heads, n_state)).unflatten(3, (group, C)).flatten(2, 3)

    def summarize_chunks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lengths: Tensor | None) -> _Sums:
        return _summarize_chunks(maps, k, v, mask)

    plan = plan_chunks(q.shape[0], q.shape[1], CHUNK, cu_seqlens, q.device)
    with full_precision(q):
        y, sums = run_chunks(
            plan, (q, k, v), summarize_chunks, _add, outputs, _sums(initial_state), return_state, _fold, _with_one
        )
    return y, None if sums is None else _state(sums)


def step_(
    q: Tensor, k: Tensor, v: Tensor, pool: TaylorState, slots: Tensor, *, scale: float, normalize: bool
) -> Tensor:
    """One token a row: q [B, Hq, F], k [B, Hk, F], v [B, Hv, V], slots int32 [B] -> y [B, H, V]; pool in place."""
    rows = pool_rows(pool.S, slots)
    dtype, out_dtype = pool.S.dtype, v.dtype
    n_state = pool.S.shape[1]
    q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    q, k = match_heads(q, max(q.shape[2], n_state))[:, 0].to(dtype) * scale, match_heads(k, n_state)[:, 0].to(dtype)
    fq, fk = features(torch.cat([q, k], 1)).split([q.shape[1], n_state], 1)
    fq = fq.unflatten(1, (n_state, -1))
    v = match_heads(v, n_state)[:, 0].to(dtype)
    S = pool.S.index_select(0, rows).addcmul_(fk[..., None], v[..., None, :])
    z = pool.z.index_select(0, rows).add_(fk)
    pool.S.index_copy_(0, rows, S)
    pool.z.index_copy_(0, rows, z)
    y = fq @ S
    if normalize:
        y = y / (fq @ z[..., None])
    return y.flatten(1, 2).to(out_dtype)
