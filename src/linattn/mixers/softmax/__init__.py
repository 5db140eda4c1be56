"""Causal softmax attention: the baseline, as a mixer whose State is every key and value, and grows.

README.md in this folder has its costs; the other mixers are measured against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from linattn.core.dispatch import Backend, anything, checked_step, choose, describe
from linattn.core.mixer import Mixer
from linattn.core.shapes import (
    check_attention,
    check_cu_seqlens,
    check_scale,
    check_shared_kv,
    check_state,
    check_step,
    document_count,
)
from linattn.mixers.softmax import chunked
from linattn.mixers.softmax.chunked import SoftmaxState, combine, new_pool, put_, summarize, take
from linattn.mixers.softmax.reference import softmax_reference

__all__ = [
    "BACKENDS",
    "MIXER",
    "SoftmaxState",
    "combine",
    "new_pool",
    "put_",
    "softmax_attention",
    "softmax_step_",
    "summarize",
    "take",
]

BACKENDS = (Backend("torch", anything, chunked.forward, chunked.step_),)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    initial_state: SoftmaxState | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, SoftmaxState | None]:
    """Causal softmax attention (Vaswani et al. 2017, arXiv 1706.03762), with the State that every mixer has.

    o_i = sum_{j<=i} p_ij v_j,  p_i = softmax_j(scale q_i . k_j)

    Args:
        q: [B, T, Hq, D]. k: [B, T, H, D]. v: [B, T, H, V]. H divides Hq.
        scale: put on q; D ** -0.5 unless given.
        initial_state: the State of what came before, N = B rows (one a document when packed), of any capacity L.
        cu_seqlens: int32 [N+1], documents packed in one row; each is read from its own State.
        return_state: False saves the copies where nobody reads on.
        backend: a name obeys or raises; None takes the first that can run the call.

    Returns:
        o [B, T, Hq, V] in v's dtype, and the State after the last token of each document (None when not asked for), of
        capacity L + T; packed, L + the longest document, but L + T in a trace, which cannot look. Differentiable in q,
        k, v and the initial State, also from the final State; only once, as torch's fused attention is.

    Raises:
        ValueError: a shape, dtype or value that does not fit, with the value and the fix.
    """
    check_attention("softmax_attention", q, k, v)
    check_shared_kv("softmax_attention", q, k, v)
    check_scale("softmax_attention", scale)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q.shape[0], q.shape[1])
    if initial_state is not None:
        if not isinstance(initial_state, SoftmaxState):
            raise ValueError(f"softmax_attention: initial_state must be a SoftmaxState, got {type(initial_state)}")
        rows, capacity = document_count(q.shape[0], cu_seqlens), initial_state.k.shape[1]
        shapes = {"k": (rows, capacity, *k.shape[2:]), "v": (rows, capacity, *v.shape[2:]), "count": (rows,)}
        check_state("softmax_attention", initial_state, shapes, q.device, k.dtype, capacity)
    call = describe("softmax_attention", {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens})
    return choose(BACKENDS, call, backend).forward(
        q,
        k,
        v,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        return_state=return_state,
    )


@torch.no_grad()
def softmax_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pool: SoftmaxState,
    slots: Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """One token a row: q [B, Hq, D], k [B, H, D], v [B, H, V], slots int32 [B] -> o [B, Hq, V].

    The token is written to the pool's ``slots`` in place; a slot of -1 is an idle row, whose output means nothing.
    No gradient.

    Raises:
        ValueError: a slot is full (checked on the CPU, and within `checked`; elsewhere its last token is overwritten),
            or inputs or slots do not fit the pool.
    """

    def room() -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        check_shared_kv("softmax_step_", q, k, v)
        capacity = pool.k.shape[1]
        k_row, v_row = (capacity, *k.shape[1:]), (capacity, *v.shape[1:])
        return {"k": (k_row, k.dtype), "v": (v_row, v.dtype), "count": ((), torch.int32)}

    def find() -> Backend:
        check_step("softmax_step_", {"q": q, "k": k, "v": v}, slots, pool, SoftmaxState, room)
        return choose(BACKENDS, describe("softmax_step_", {"q": q, "k": k, "v": v}), backend)

    step = checked_step("softmax_step_", BACKENDS, (backend,), (q, k, v), pool, slots, find)
    check_scale("softmax_step_", scale)
    return step(q, k, v, pool, slots, scale=q.shape[-1] ** -0.5 if scale is None else scale)


def _reference(inputs: Mapping[str, Any], initial_state: SoftmaxState | None = None) -> tuple[Tensor, SoftmaxState]:
    o, state = softmax_reference(**inputs, initial_state=initial_state)
    return o, SoftmaxState(*state)


def _identity(inputs: Mapping[str, Any], documents: int) -> SoftmaxState:
    k, v = inputs["k"], inputs["v"]
    return chunked.identity(documents, k.shape[2], k.shape[-1], v.shape[-1], k)


MIXER = Mixer(
    name="softmax",
    axes={"q": "BTHD", "k": "BTHD", "v": "BTHV"},
    state_axes={"k": "NLHD", "v": "NLHV", "count": "N"},
    reference=_reference,
    forward=lambda inputs, **kw: softmax_attention(**inputs, **kw),
    identity=_identity,
    summarize=lambda inputs, cu_seqlens=None: summarize(inputs["k"], inputs["v"], cu_seqlens),
    combine=combine,
    new_pool=new_pool,
    step_=lambda inputs, pool, slots, **kw: softmax_step_(**inputs, pool=pool, slots=slots, **kw),
    take=take,
    put_=put_,
    backends=tuple(b.name for b in BACKENDS),
)
