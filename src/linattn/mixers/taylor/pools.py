"""Pools for decoding with less memory traffic: S is rewritten every C tokens, and may be read in 16 bits between.

A step of the plain pool reads and writes S whole. Here the last tokens of a slot stay beside it unfolded and are read
by their scores; a slot that has C of them folds them in one pass. Each slot and head counts its own. README.md's State
is what `take_deferred` and `put_deferred_` speak; bytes of S a step and entry, C = 8:

    plain 8        deferred 4 + 8/C = 5        with a 16-bit copy 2 + 10/C = 3.25
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from linattn.core.dispatch import Backend, anything, checked_step, choose
from linattn.core.numerics import sum_dtype
from linattn.core.pool import pool_rows
from linattn.core.shapes import check_scale, check_step, count_heads, match_heads
from linattn.mixers.taylor import operators
from linattn.mixers.taylor.chunked import TaylorState, features, n_features

RECENT = 8
"""Tokens kept unfolded: at F 16, V 112 in bf16 they weigh 2 KB a head beside the 69 KB of S."""


class DeferredPool(NamedTuple):
    """States whose last tokens wait beside them; the last row is no slot.

    S: [slots + 1, H, P, V] and z: [slots + 1, H, P], the sums without the waiting tokens, in the sum dtype.
    recent_k: [slots + 1, H, C, F] and recent_v: [slots + 1, H, C, V], in the inputs' dtype; count: int32
    [slots + 1, H], how many of them wait, 0 to C - 1.
    copy: S in bfloat16, or None.
    """

    S: Tensor
    z: Tensor
    recent_k: Tensor
    recent_v: Tensor
    count: Tensor
    copy: Tensor | None


def new_deferred_pool(
    state: TaylorState, slots: int, dtype: torch.dtype, *, recent: int = RECENT, copy: bool = False
) -> DeferredPool:
    """A pool of ``slots`` empty States like ``state``, for inputs of ``dtype``, on its device.

    Args:
        recent: C, the tokens between two rewritings of S; at least 2.
        copy: keep S in bfloat16 too, and read that instead: it moves outputs by 1.3e-3 of their rms after 10,000
            tokens of N(0, 1); rounding them to bfloat16 moves them by 1.7e-3. The State is summed in fp32 all the same.

    Raises:
        ValueError: a State of another dtype than such inputs have, or C below 2.
    """
    if recent < 2:
        raise ValueError(
            f"new_deferred_pool: recent must be at least 2, got {recent}; use new_pool to fold every token"
        )
    if state.S.dtype != sum_dtype(dtype):
        raise ValueError(f"new_deferred_pool: inputs of {dtype} have States of {sum_dtype(dtype)}, got {state.S.dtype}")
    heads, P, V = state.S.shape[1:]
    F = next(n for n in range(P) if n_features(n) >= P)

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(slots + 1, heads, *shape, device=state.S.device, dtype=dtype)

    return DeferredPool(
        zeros(P, V, dtype=state.S.dtype),
        zeros(P, dtype=state.S.dtype),
        zeros(recent, F, dtype=dtype),
        zeros(recent, V, dtype=dtype),
        zeros(dtype=torch.int32),
        zeros(P, V, dtype=torch.bfloat16) if copy else None,
    )


def take_deferred(pool: DeferredPool, slots: Tensor) -> TaylorState:
    """The States in ``slots`` int [B], the waiting tokens folded in; the pool keeps what it has."""
    S, z, k, v, count = (leaf.index_select(0, slots.long()) for leaf in pool[:5])
    return _folded(S, z, k, v, _before(count, k.shape[2]))


def put_deferred_(pool: DeferredPool, slots: Tensor, state: TaylorState) -> None:
    """Write the States ``state`` [B, ...] into ``slots`` int [B]; no token waits there then."""
    rows = slots.long()
    pool.S.index_copy_(0, rows, state.S.to(pool.S.dtype))
    pool.z.index_copy_(0, rows, state.z.to(pool.z.dtype))
    pool.count.index_fill_(0, rows, 0)
    if pool.copy is not None:
        pool.copy.index_copy_(0, rows, state.S.to(pool.copy.dtype))


@torch.no_grad()
def taylor_step_deferred_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pool: DeferredPool,
    slots: Tensor,
    *,
    scale: float | None = None,
    normalize: bool = True,
    backend: str | None = None,
) -> Tensor:
    """`taylor_step_` over a `DeferredPool`: q [B, Hq, F], k [B, Hk, F], v [B, Hv, V], slots int32 [B] -> y [B, H, V].

    The pool is rewritten in place; a slot of -1 is an idle row, whose output means nothing. No gradient.

    Raises:
        ValueError: inputs or slots that do not fit the pool, with the value and the fix.
    """
    op = "taylor_step_deferred_"

    def room() -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        F, V = k.shape[2], v.shape[2]
        if q.shape[2] != F:
            raise ValueError(f"{op}: q and k must have one head dim, got {q.shape[2]} and {F}")
        heads, P, dtype, C = count_heads(op, q, k, v).state, n_features(F), sum_dtype(q.dtype), pool.recent_k.shape[2]
        recent = {"recent_k": ((heads, C, F), q.dtype), "recent_v": ((heads, C, V), q.dtype)}
        leaves = {"S": ((heads, P, V), dtype), "z": ((heads, P), dtype), **recent, "count": ((heads,), torch.int32)}
        return leaves if pool.copy is None else leaves | {"copy": ((heads, P, V), torch.bfloat16)}

    def find() -> Backend:
        check_step(op, {"q": q, "k": k, "v": v}, slots, pool, DeferredPool, room)
        return choose(BACKENDS, operators.describe_step(op, q, k, v, pool), backend)

    step = checked_step(op, BACKENDS, (backend, operators.bytes_off(pool)), (q, k, v), pool, slots, find)
    check_scale(op, scale)
    return step(q, k, v, pool, slots, scale=q.shape[-1] ** -0.5 if scale is None else scale, normalize=normalize)


def _by_torch(
    q: Tensor, k: Tensor, v: Tensor, pool: DeferredPool, slots: Tensor, *, scale: float, normalize: bool
) -> Tensor:
    """The definition on any device: every row is folded, and kept where it has C tokens."""
    rows = pool_rows(pool.S, slots)
    S, z, recent_k, recent_v, count = (leaf.index_select(0, rows) for leaf in pool[:5])
    n_state, C = S.shape[1], recent_k.shape[2]
    token = torch.arange(C, device=q.device)
    here = (token == count[..., None])[..., None]
    recent_k = torch.where(here, match_heads(k[:, None], n_state)[:, 0, :, None], recent_k)
    recent_v = torch.where(here, match_heads(v[:, None], n_state)[:, 0, :, None], recent_v)
    full = count == C - 1
    known = _before(count + 1, C)
    folded = _folded(S, z, recent_k, recent_v, known)

    read = (
        S if pool.copy is None else torch.where(full[..., None, None], S, pool.copy.index_select(0, rows).to(S.dtype))
    )
    q = match_heads(q[:, None], max(q.shape[1], n_state))[:, 0].to(S.dtype).unflatten(1, (n_state, -1)) * scale
    s = q @ recent_k.to(S.dtype).transpose(-1, -2)
    w = (1 + s + s * s / 2).masked_fill(~known[:, :, None], 0)
    fq = features(q)
    y = fq @ read + w @ recent_v.to(S.dtype).masked_fill(~known[..., None], 0)
    if normalize:
        y = y / (fq @ z[..., None] + w.sum(-1, keepdim=True))

    S = torch.where(full[..., None, None], folded.S, S)
    pool.S.index_copy_(0, rows, S)
    pool.z.index_copy_(0, rows, torch.where(full[..., None], folded.z, z))
    pool.recent_k.index_copy_(0, rows, recent_k)
    pool.recent_v.index_copy_(0, rows, recent_v)
    pool.count.index_copy_(0, rows, torch.where(full, 0, count + 1))
    if pool.copy is not None:
        pool.copy.index_copy_(0, rows, S.to(pool.copy.dtype))
    return y.flatten(1, 2).to(v.dtype)


BACKENDS = (
    Backend("cuda", operators.refuses_cuda, partial(operators.step_deferred_by, "cuda")),
    Backend("triton", operators.refuses, partial(operators.step_deferred_by, "triton")),
    Backend("torch", anything, _by_torch),
)


def _before(count: Tensor, C: int) -> Tensor:
    """Which of C tokens are the first ``count`` [B, H]: [B, H, C]."""
    return torch.arange(C, device=count.device) < count[..., None]


def _folded(S: Tensor, z: Tensor, k: Tensor, v: Tensor, known: Tensor) -> TaylorState:
    # What lies beyond the count may be anything, infinite too: masked on both sides of the product.
    fk = features(k.to(S.dtype)).masked_fill(~known[..., None], 0)
    v = v.to(S.dtype).masked_fill(~known[..., None], 0)
    return TaylorState(S + fk.transpose(-1, -2) @ v, z + fk.sum(-2))
