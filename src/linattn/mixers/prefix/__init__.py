"""Prefix linear attention (JRT-RNN): the first M tokens are also read without causality, by keys of their own.

It has nothing of its own but this composition: the prefix is a State, and Taylor attention begins from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from linattn.core.mixer import Mixer
from linattn.core.shapes import check_attention, check_cu_seqlens, document_count, values_are_checked
from linattn.mixers import taylor
from linattn.mixers.prefix.reference import prefix_reference
from linattn.mixers.taylor import TaylorState, taylor_attention
from linattn.mixers.taylor.reference import taylor_reference

__all__ = ["MIXER", "USES", "prefix_attention", "summarize_prefix"]

USES = ("taylor",)


def summarize_prefix(
    k_prefix: Tensor,
    v_prefix: Tensor,
    *,
    prefix_lengths: Tensor | None = None,
    cu_prefix: Tensor | None = None,
    backend: str | None = None,
) -> TaylorState:
    """The State of a prefix: k_prefix [B, M, H, F], v_prefix [B, M, H, V], or packed [1, sum M, ...] with cu_prefix.

    prefix_lengths int [B] (or [N]) leaves out what lies beyond each row's own length. The order of tokens is lost.

    Raises:
        ValueError: shapes that do not fit, or a length beyond M.
    """
    check_attention("prefix_attention", k_prefix, k_prefix, v_prefix)
    B, M = k_prefix.shape[:2]
    if cu_prefix is not None:
        check_cu_seqlens(cu_prefix, B, M, "cu_prefix")
    if prefix_lengths is not None:
        _check_lengths(prefix_lengths, document_count(B, cu_prefix), M, cu_prefix)
    return taylor.summarize(k_prefix, v_prefix, cu_prefix, prefix_lengths, backend=backend)


def _check_lengths(lengths: Tensor, rows: int, tokens: int, cu_prefix: Tensor | None) -> None:
    """Each row's length lies within the prefix that the tensors hold for it."""
    if not isinstance(lengths, Tensor):
        raise ValueError(f"prefix_lengths must be an int tensor [{rows}], got {lengths!r}: wrap it in torch.tensor")
    if lengths.shape != (rows,) or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"prefix_lengths must be int32 or int64 [{rows}], got {lengths.dtype} {list(lengths.shape)}")
    if values_are_checked(lengths):
        most = [tokens] * rows if cu_prefix is None else cu_prefix.diff().tolist()
        for n, (length, held) in enumerate(zip(lengths.tolist(), most, strict=True)):
            if not 0 <= length <= held:
                raise ValueError(f"prefix_lengths must lie in 0 to {held} in row {n}, its prefix, got {length}")


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    *,
    prefix_lengths: Tensor | None = None,
    cu_prefix: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
    return_state: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, TaylorState | None]:
    """Taylor attention whose every position also reads a whole prefix (JRT-RNN, arXiv 2407.05483, equation 3).

    Args:
        q, k, v: as in `taylor_attention`, all the tokens, the prefix's among them.
        k_prefix: [B, M, Hk, F], the encoder's keys of the first M tokens. v_prefix: [B, M, Hv, V].
        prefix_lengths: int [B] (packed: [N]), the real prefix of each row; None: all of M.
        cu_prefix: int32 [N+1], the packed prefixes [1, sum M, ...] of packed documents.
        scale, normalize, cu_seqlens, return_state, backend: as in `taylor_attention`. The normaliser is joint.

    Returns:
        y [B, T, H, V] and the State of prefix and tokens, which is Taylor's: go on with `taylor_attention` from it.

    Raises:
        ValueError: a shape, dtype or value that does not fit, with the value and the fix.
    """
    for name, x in (("q", q), ("k_prefix", k_prefix)):
        if x.ndim != 4:
            raise ValueError(f"prefix_attention: {name} must be [B, T, H, D], got {list(x.shape)}")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q.shape[0], q.shape[1])
    if cu_prefix is not None:
        check_cu_seqlens(cu_prefix, k_prefix.shape[0], k_prefix.shape[1], "cu_prefix")
    rows = document_count(q.shape[0], cu_seqlens)
    given = document_count(k_prefix.shape[0], cu_prefix)
    if rows != given:
        raise ValueError(f"prefix_attention: {rows} rows of tokens, but prefixes for {given}; give each row its own")
    state = summarize_prefix(k_prefix, v_prefix, prefix_lengths=prefix_lengths, cu_prefix=cu_prefix, backend=backend)
    return taylor_attention(
        q,
        k,
        v,
        scale=scale,
        normalize=normalize,
        initial_state=state,
        cu_seqlens=cu_seqlens,
        return_state=return_state,
        backend=backend,
    )


_PREFIX = ("k_prefix", "v_prefix", "prefix_lengths", "cu_prefix")


def _own(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {n: x for n, x in inputs.items() if n not in _PREFIX}


def _given(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {n: inputs[n] for n in _PREFIX if n in inputs}


def _forward(
    inputs: Mapping[str, Any], initial_state: TaylorState | None = None, **kw: Any
) -> tuple[Tensor, TaylorState | None]:
    if "k_prefix" in inputs:
        if initial_state is not None:
            raise ValueError("a prefix is read first: a call with an initial State cannot have one")
        return prefix_attention(**inputs, **kw)
    return taylor_attention(**inputs, initial_state=initial_state, **kw)


def _reference(inputs: Mapping[str, Any], initial_state: TaylorState | None = None) -> tuple[Tensor, TaylorState]:
    if "k_prefix" in inputs:
        y, state = prefix_reference(**inputs)
    else:
        y, state = taylor_reference(**inputs, initial_state=initial_state)
    return y, TaylorState(*state)


def _summarize(inputs: Mapping[str, Any], cu_seqlens: Tensor | None = None) -> TaylorState:
    own = taylor.summarize(inputs["k"], inputs["v"], cu_seqlens)
    return taylor.combine(summarize_prefix(**_given(inputs)), own) if "k_prefix" in inputs else own


MIXER = Mixer(
    name="prefix",
    axes={
        **taylor.MIXER.axes,
        "k_prefix": "BMHF",
        "v_prefix": "BMHV",
        "prefix_lengths": "B",
    },
    state_axes=taylor.MIXER.state_axes,
    reference=_reference,
    forward=_forward,
    identity=taylor.MIXER.identity,
    summarize=_summarize,
    combine=taylor.combine,
    new_pool=taylor.new_pool,
    step_=lambda inputs, pool, slots, **kw: taylor.taylor_step_(**_own(inputs), pool=pool, slots=slots, **kw),
    take=taylor.take,
    put_=taylor.put_,
    once=frozenset(_PREFIX),
    backends=taylor.MIXER.backends,
)
