"""Other ways of ours to decode, measured beside the plain one: pools that trade a rewriting of S for something else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from linattn.core.mixer import Mixer
from linattn.mixers.taylor import MIXER as TAYLOR
from linattn.mixers.taylor import pools


class Variant(NamedTuple):
    """A mixer with a pool of its own. period: steps after which a slot has done all that it does."""

    mixer: Mixer
    period: int


def variants_of(op: str, dtype: torch.dtype) -> dict[str, Variant]:
    """The other ways of an op to decode inputs of ``dtype``, by the name that records give them."""
    if op != "taylor":
        return {}
    return {
        "linattn, deferred fold": _deferred(dtype, copy=False),
        "linattn, deferred fold and 16-bit copy": _deferred(dtype, copy=True),
    }


def _deferred(dtype: torch.dtype, copy: bool) -> Variant:
    def new_pool(state: Any, slots: int, capacity: int | None = None) -> Any:
        return pools.new_deferred_pool(state, slots, dtype, copy=copy)

    mixer = replace(
        TAYLOR,
        new_pool=new_pool,
        step_=_step_deferred_,
        take=pools.take_deferred,
        put_=pools.put_deferred_,
        backends=tuple(backend.name for backend in pools.BACKENDS),
    )
    return Variant(mixer, pools.RECENT)


def _step_deferred_(inputs: dict[str, Any], pool: Any, slots: torch.Tensor, **options: Any) -> torch.Tensor:
    return pools.taylor_step_deferred_(**inputs, pool=pool, slots=slots, **options)
