"""Sliding-window softmax attention: the last W keys, self included, and a State of W-1 keys and values a head.

Based's exact local half (arXiv 2402.18668, section 4); README.md in this folder has the recurrence and its costs.
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
from linattn.mixers.window import chunked, operators
from linattn.mixers.window.chunked import WindowPool, WindowState, combine, new_pool, put_, summarize, take
from linattn.mixers.window.reference import window_reference

__all__ = [
    "BACKENDS",
    "MIXER",
    "WindowPool",
    "WindowState",
    "combine",
    "new_pool",
    "put_",
    "summarize",
    "take",
    "window_attention",
    "window_step_",
]

BACKENDS = (
    Backend("triton", operators.refuses, operators.forward, operators.step_),
    Backend("torch", anything, chunked.forward, chunked.step_),
)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    scale: float | None = None,
    initial_state: WindowState | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, WindowState | None]:
    """Causal softmax attention over the last ``window`` keys, self included.

    y_i = sum_j softmax_j(scale q_i . k_j) v_j,  i - window < j <= i

    FlashAttention counts what lies before: its ``window_size=(128, 0)`` is 129 here.

    Args:
        q: [B, T, Hq, D]. k: [B, T, H, D]. v: [B, T, H, V]. H divides Hq. Rotate q and k before.
        window: W, in keys, at least 1.
        scale: put on q; D ** -0.5 unless given.
        initial_state: the State of what came before, N = B rows (one a document when packed).
        cu_seqlens: int32 [N+1], documents packed in one row; each is read from its own State.
        return_state: False saves the work where nobody reads on.
        backend: a name obeys or raises; None takes the first that can run the call.

    Returns:
        y [B, T, Hq, V] in v's dtype, and the State after the last token of each document (None when not asked for).
        Differentiable in q, k, v and the initial State, also from the final State.

    Raises:
        ValueError: a shape, dtype or value that does not fit, with the value and the fix.
    """
    heads = check_attention("window_attention", q, k, v)
    check_shared_kv("window_attention", q, k, v)
    _check_window("window_attention", window)
    check_scale("window_attention", scale)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q.shape[0], q.shape[1])
    if initial_state is not None:
        rows = document_count(q.shape[0], cu_seqlens)
        past = (rows, window - 1, heads.k)
        shapes = {"k": (*past, k.shape[-1]), "v": (*past, v.shape[-1]), "count": (rows,)}
        check_state("window_attention", initial_state, shapes, q.device, k.dtype, window - 1)
    call = describe("window_attention", {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens}, window=window)
    return choose(BACKENDS, call, backend).forward(
        q,
        k,
        v,
        window=window,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        return_state=return_state,
    )


@torch.no_grad()
def window_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pool: WindowPool,
    slots: Tensor,
    *,
    window: int,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """One token a row: q [B, Hq, D], k [B, H, D], v [B, H, V], slots int32 [B] -> y [B, Hq, V].

    The pool's rings in ``slots`` are rewritten in place; a slot of -1 is an idle row, whose output means nothing.
    No gradient.

    Raises:
        ValueError: the pool was made for another window, or inputs or slots do not fit it.
    """
    _check_window("window_step_", window)
    check_scale("window_step_", scale)

    def room() -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        check_shared_kv("window_step_", q, k, v)
        if pool.k.shape[1] != window:
            raise ValueError(f"window_step_: the pool's rings hold {pool.k.shape[1]} tokens, the window is {window}")
        k_row, v_row = (window, *k.shape[1:]), (window, *v.shape[1:])
        return {"k": (k_row, k.dtype), "v": (v_row, v.dtype), "tokens": ((), torch.int64)}

    def find() -> Backend:
        check_step("window_step_", {"q": q, "k": k, "v": v}, slots, pool, WindowPool, room)
        return choose(BACKENDS, describe("window_step_", {"q": q, "k": k, "v": v}, window=window), backend)

    step = checked_step("window_step_", BACKENDS, (backend, window), (q, k, v), pool, slots, find)
    return step(q, k, v, pool, slots, scale=q.shape[-1] ** -0.5 if scale is None else scale)


def _check_window(op: str, window: int) -> None:
    if isinstance(window, bool) or not isinstance(window, (int, torch.SymInt)):
        raise ValueError(f"{op}: window must be an int, the number of keys seen, got {window!r}")
    if window < 1:
        raise ValueError(f"{op}: window counts keys, self included: at least 1, got {window}")


def _reference(inputs: Mapping[str, Any], initial_state: WindowState | None = None) -> tuple[Tensor, WindowState]:
    y, state = window_reference(**inputs, initial_state=initial_state)
    return y, WindowState(*state)


def _identity(inputs: Mapping[str, Any], documents: int) -> WindowState:
    k, v = inputs["k"], inputs["v"]
    return chunked.identity(documents, inputs["window"], k.shape[2:], v.shape[2:], k)


MIXER = Mixer(
    name="window",
    axes={"q": "BTHD", "k": "BTHD", "v": "BTHV"},
    state_axes={"k": "NWHD", "v": "NWHV", "count": "N"},
    reference=_reference,
    forward=lambda inputs, **kw: window_attention(**inputs, **kw),
    identity=_identity,
    summarize=lambda inputs, cu_seqlens=None: summarize(inputs["k"], inputs["v"], inputs["window"], cu_seqlens),
    combine=combine,
    new_pool=new_pool,
    step_=lambda inputs, pool, slots, **kw: window_step_(**inputs, pool=pool, slots=slots, **kw),
    take=take,
    put_=put_,
    backends=tuple(b.name for b in BACKENDS),
)
