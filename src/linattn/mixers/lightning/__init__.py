"""Lightning attention (Lightning Attention-2, TransNormerLLM): linear attention whose past decays, head by head.

The mixer of arXiv 2401.04658 and 2307.14995; README.md in this folder has the recurrence and its costs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from linattn.core.dispatch import Backend, anything, checked_step, choose, describe, remembered
from linattn.core.mixer import Mixer
from linattn.core.numerics import sum_dtype
from linattn.core.pool import new_pool, put_, take
from linattn.core.shapes import (
    Heads,
    check_attention,
    check_cu_seqlens,
    check_scale,
    check_state,
    check_step,
    count_heads,
    document_count,
    values_are_checked,
)
from linattn.mixers.lightning import chunked, operators
from linattn.mixers.lightning.chunked import LightningState, combine, summarize
from linattn.mixers.lightning.reference import lightning_reference
from linattn.mixers.lightning.slopes import alibi_slopes, minimax_log_decay, paper_log_decay, tnl_log_decay

__all__ = [
    "BACKENDS",
    "MIXER",
    "LightningState",
    "alibi_slopes",
    "combine",
    "lightning_attention",
    "lightning_step_",
    "minimax_log_decay",
    "new_pool",
    "paper_log_decay",
    "put_",
    "summarize",
    "take",
    "tnl_log_decay",
]

BACKENDS = (
    Backend("triton", operators.refuses, operators.forward, operators.step_),
    Backend("torch", anything, chunked.forward, chunked.step_),
)


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float = 1.0,
    initial_state: LightningState | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, LightningState | None]:
    """Causal linear attention with one constant decay a head (Lightning Attention-2, arXiv 2401.04658).

    S_t = exp(log_decay) S_{t-1} + k_t v_t^T,   o_t = scale q_t S_t

    No divisor: a norm follows in the layer. Token t reads itself undecayed; the State after t has t undecayed.

    Args:
        q: [B, T, Hq, D]. k: [B, T, Hk, D]. v: [B, T, Hv, V]. q and k may have fewer heads than v, and k and v fewer
            than q; each count divides the largest.
        log_decay: [H], float32 or float64, one entry a State head: the natural log of what a token leaves of the past,
            finite and <= 0. Peers' slopes are positive: log_decay = -slope.
        scale: put on q; 1 in every published model.
        initial_state: the State of what came before, N = B rows (one a document when packed).
        cu_seqlens: int32 [N+1], documents packed in one row; each is read from its own State.
        return_state: False saves the work where nobody reads on.
        backend: a name obeys or raises; None takes the first that can run the call.

    Returns:
        o [B, T, max(Hq, H), V] in v's dtype, and the State after the last token of each document (None when not asked
        for). Differentiable in q, k, v, log_decay and the initial State, also from the final State.

    Raises:
        ValueError: a shape, dtype or value that does not fit, with the value and the fix.
    """
    _check_log_decay("lightning_attention", log_decay, q)
    check_scale("lightning_attention", scale)
    given = (q, k, v, log_decay, cu_seqlens)
    chosen = remembered(BACKENDS, ("lightning_attention", backend), given, lambda: _backend_for(*given, backend))
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q.shape[0], q.shape[1])
    if initial_state is not None:
        rows, heads = document_count(q.shape[0], cu_seqlens), log_decay.shape[0]
        shapes = {"log_decay": (rows, heads), "S": (rows, heads, q.shape[-1], v.shape[-1])}
        check_state("lightning_attention", initial_state, shapes, q.device, sum_dtype(q.dtype))
    return chosen.forward(
        q,
        k,
        v,
        log_decay,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        return_state=return_state,
    )


@torch.no_grad()
def lightning_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    pool: LightningState,
    slots: Tensor,
    *,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """One token a row: q [B, Hq, D], k [B, Hk, D], v [B, Hv, V], slots int32 [B] -> o [B, H, V].

    The pool's States in ``slots`` are rewritten in place; a slot of -1 is an idle row, whose output means nothing.
    No gradient.

    Raises:
        ValueError: inputs or slots that do not fit the pool, with the value and the fix.
    """
    _check_log_decay("lightning_step_", log_decay, q)

    def room() -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        if q.shape[2] != k.shape[2]:
            raise ValueError(f"lightning_step_: q and k must have one head dim, got {q.shape[2]} and {k.shape[2]}")
        heads, dtype = count_heads("lightning_step_", q, k, v, log_decay.shape[0]), sum_dtype(q.dtype)
        _check_entries("lightning_step_", heads)
        return {"S": ((heads.state, k.shape[2], v.shape[2]), dtype), "log_decay": ((heads.state,), dtype)}

    def find() -> Backend:
        check_step("lightning_step_", {"q": q, "k": k, "v": v}, slots, pool, LightningState, room)
        return choose(BACKENDS, describe("lightning_step_", {"q": q, "k": k, "v": v, "log_decay": log_decay}), backend)

    step = checked_step("lightning_step_", BACKENDS, (backend,), (q, k, v, log_decay), pool, slots, find)
    check_scale("lightning_step_", scale)
    return step(q, k, v, log_decay, pool, slots, scale=scale)


def _backend_for(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, cu_seqlens: Tensor | None, wanted: str | None
) -> Backend:
    _check_entries("lightning_attention", check_attention("lightning_attention", q, k, v, log_decay.shape[0]))
    if cu_seqlens is not None:  # before it is described; the caller checks the values, which no signature holds
        check_cu_seqlens(cu_seqlens, q.shape[0], q.shape[1])
    tensors = {"q": q, "k": k, "v": v, "log_decay": log_decay, "cu_seqlens": cu_seqlens}
    call = describe("lightning_attention", tensors, decay_grad=torch.is_grad_enabled() and log_decay.requires_grad)
    return choose(BACKENDS, call, wanted)


def _check_entries(op: str, heads: Heads) -> None:
    most = max(heads.q, heads.k, heads.v)
    if heads.state > most:
        raise ValueError(
            f"{op}: log_decay has {heads.state} entries, but q, k and v have no more than {most} heads; "
            "it needs one a head of the State"
        )


def _check_log_decay(op: str, log_decay: Tensor, q: Tensor) -> None:
    if not isinstance(log_decay, Tensor):
        raise ValueError(f"{op}: log_decay must be a tensor [H], one entry a head, got {log_decay!r}")
    if log_decay.ndim != 1 or log_decay.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{op}: log_decay must be float32 or float64 of shape [H], got {log_decay.dtype} {list(log_decay.shape)}"
        )
    if log_decay.device != q.device:
        raise ValueError(f"{op}: log_decay is on {log_decay.device}, q on {q.device}")
    if values_are_checked(log_decay) and log_decay.numel():
        lowest, highest = (float(x) for x in log_decay.detach().aminmax())
        if -math.inf < lowest and highest <= 0:
            return
        wrong = (~((log_decay <= 0) & log_decay.isfinite())).nonzero()
        h = int(wrong[0])
        raise ValueError(
            f"{op}: log_decay must be finite and <= 0, entry {h} is {float(log_decay.detach()[h])}; "
            "if these are slopes as other libraries have them, which are positive, negate them"
        )


def _reference(inputs: Mapping[str, Any], initial_state: LightningState | None = None) -> tuple[Tensor, LightningState]:
    o, state = lightning_reference(**inputs, initial_state=initial_state)
    return o, LightningState(*state)


def _identity(inputs: Mapping[str, Any], documents: int) -> LightningState:
    k, v = inputs["k"], inputs["v"]
    return chunked.identity(documents, inputs["log_decay"].shape[0], k.shape[-1], v.shape[-1], k)


MIXER = Mixer(
    name="lightning",
    axes={"q": "BTHD", "k": "BTHD", "v": "BTHV", "log_decay": "H"},
    state_axes={"log_decay": "NH", "S": "NHDV"},
    reference=_reference,
    forward=lambda inputs, **kw: lightning_attention(**inputs, **kw),
    identity=_identity,
    summarize=lambda inputs, cu_seqlens=None: summarize(inputs["k"], inputs["v"], inputs["log_decay"], cu_seqlens),
    combine=combine,
    new_pool=new_pool,
    step_=lambda inputs, pool, slots, **kw: lightning_step_(**inputs, pool=pool, slots=slots, **kw),
    take=take,
    put_=put_,
    backends=tuple(b.name for b in BACKENDS),
)
