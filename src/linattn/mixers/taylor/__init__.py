"""Taylor linear attention (Based): weights 1 + s + s^2/2, a State of 153 features by V a head.

The mixer of arXiv 2402.18668; README.md in this folder has the recurrence and its costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from linattn.core.dispatch import Backend, anything, checked_step, choose, describe, remembered
from linattn.core.mixer import Mixer
from linattn.core.numerics import sum_dtype
from linattn.core.pool import new_pool, put_, take
from linattn.core.shapes import (
    check_attention,
    check_cu_seqlens,
    check_scale,
    check_state,
    check_step,
    count_heads,
    document_count,
)
from linattn.mixers.taylor import chunked, operators
from linattn.mixers.taylor.chunked import TaylorState, combine, features, n_features
from linattn.mixers.taylor.reference import taylor_reference

__all__ = [
    "BACKENDS",
    "MIXER",
    "TaylorState",
    "combine",
    "features",
    "n_features",
    "new_pool",
    "put_",
    "summarize",
    "take",
    "taylor_attention",
    "taylor_step_",
]

BACKENDS = (
    Backend("cuda", operators.refuses_cuda, operators.forward_cuda, partial(operators.step_by, "cuda")),
    Backend("triton", operators.refuses, operators.forward, partial(operators.step_by, "triton")),
    Backend("torch", anything, chunked.forward, chunked.step_),
)


def taylor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    normalize: bool = True,
    initial_state: TaylorState | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, TaylorState | None]:
    """Causal linear attention with the second-order Taylor map of exp (Based, arXiv 2402.18668, eq. 1 to 3).

    y_i = sum_{j<=i} w_ij v_j / sum_{j<=i} w_ij,  w = 1 + s + s^2/2,  s = scale q_i . k_j

    Inputs must be finite: a NaN or an infinity, once read, stays in the State. Weights grow with the square of a score
    and their sum with the text, so that fp16 outputs, which end at 65,504, can overflow with ``normalize=False``.

    Args:
        q: [B, T, Hq, F]. k: [B, T, Hk, F]. v: [B, T, Hv, V]. q and k may have fewer heads than v, and k and v fewer
            than q; each count divides the largest.
        scale: put on q; F ** -0.5 unless given.
        normalize: divide by the sum of weights. The State keeps that sum either way.
        initial_state: the State of what came before, N = B rows (one a document when packed).
        cu_seqlens: int32 [N+1], documents packed in one row; each is read from its own State.
        return_state: False saves the work where nobody reads on.
        backend: a name obeys or raises; None takes the first that can run the call.

    Returns:
        y [B, T, H, V] in v's dtype, H the largest head count, and the State after the last token of each document
        (None when not asked for). Differentiable in q, k, v and the initial State, also from the final State.

    Raises:
        ValueError: a shape, dtype or value that does not fit, with the value and the fix.
    """
    key, given = ("taylor_attention", normalize, backend), (q, k, v, cu_seqlens)
    chosen = remembered(BACKENDS, key, given, lambda: _backend_for(*given, normalize, backend))
    check_scale("taylor_attention", scale)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q.shape[0], q.shape[1])
    if initial_state is not None:
        rows, H, P = document_count(q.shape[0], cu_seqlens), max(k.shape[2], v.shape[2]), n_features(q.shape[-1])
        shapes = {"S": (rows, H, P, v.shape[-1]), "z": (rows, H, P)}
        check_state("taylor_attention", initial_state, shapes, q.device, sum_dtype(q.dtype))
    return chosen.forward(
        q,
        k,
        v,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        normalize=normalize,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        return_state=return_state,
    )


def _backend_for(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, normalize: bool, wanted: str | None
) -> Backend:
    check_attention("taylor_attention", q, k, v)
    if cu_seqlens is not None:  # before it is described; the caller checks the values, which no signature holds
        check_cu_seqlens(cu_seqlens, q.shape[0], q.shape[1])
    call = describe("taylor_attention", {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens}, normalize=normalize)
    return choose(BACKENDS, call, wanted)


def summarize(
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    backend: str | None = None,
) -> TaylorState:
    """The State of k [B, T, Hk, F], v [B, T, Hv, V] read from nothing; ``lengths`` [N] leaves out what lies beyond.

    Differentiable in k and v.
    """
    call = describe("taylor_attention", {"q": k, "k": k, "v": v, "cu_seqlens": cu_seqlens})
    chosen = choose(BACKENDS, call, backend).name
    if chosen == "torch":
        return chunked.summarize(k, v, cu_seqlens, lengths)
    return operators.summarize(k, v, cu_seqlens, lengths, sweeps=chosen)


@torch.no_grad()
def taylor_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pool: TaylorState,
    slots: Tensor,
    *,
    scale: float | None = None,
    normalize: bool = True,
    backend: str | None = None,
) -> Tensor:
    """One token a row: q [B, Hq, F], k [B, Hk, F], v [B, Hv, V], slots int32 [B] -> y [B, H, V].

    The pool's States in ``slots`` are rewritten in place; a slot of -1 is an idle row, whose output means nothing.
    No gradient.

    Raises:
        ValueError: inputs or slots that do not fit the pool, with the value and the fix.
    """

    def room() -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        if q.shape[2] != k.shape[2]:
            raise ValueError(f"taylor_step_: q and k must have one head dim, got {q.shape[2]} and {k.shape[2]}")
        heads, P, dtype = count_heads("taylor_step_", q, k, v).state, n_features(k.shape[2]), sum_dtype(q.dtype)
        return {"S": ((heads, P, v.shape[2]), dtype), "z": ((heads, P), dtype)}

    def find() -> Backend:
        check_step("taylor_step_", {"q": q, "k": k, "v": v}, slots, pool, TaylorState, room)
        return choose(BACKENDS, operators.describe_step("taylor_step_", q, k, v, pool), backend)

    key = (backend, operators.bytes_off(pool))
    step = checked_step("taylor_step_", BACKENDS, key, (q, k, v), pool, slots, find)
    check_scale("taylor_step_", scale)
    return step(q, k, v, pool, slots, scale=q.shape[-1] ** -0.5 if scale is None else scale, normalize=normalize)


def _reference(inputs: Mapping[str, Any], initial_state: TaylorState | None = None) -> tuple[Tensor, TaylorState]:
    y, state = taylor_reference(**inputs, initial_state=initial_state)
    return y, TaylorState(*state)


def _identity(inputs: Mapping[str, Any], documents: int) -> TaylorState:
    k, v = inputs["k"], inputs["v"]
    return chunked.identity(documents, max(k.shape[2], v.shape[2]), k.shape[-1], v.shape[-1], k)


MIXER = Mixer(
    name="taylor",
    axes={"q": "BTHF", "k": "BTHF", "v": "BTHV"},
    state_axes={"S": "NHPV", "z": "NHP"},
    reference=_reference,
    forward=lambda inputs, **kw: taylor_attention(**inputs, **kw),
    identity=_identity,
    summarize=lambda inputs, cu_seqlens=None: summarize(inputs["k"], inputs["v"], cu_seqlens),
    combine=combine,
    new_pool=new_pool,
    step_=lambda inputs, pool, slots, **kw: taylor_step_(**inputs, pool=pool, slots=slots, **kw),
    take=take,
    put_=put_,
    backends=tuple(b.name for b in BACKENDS),
)
