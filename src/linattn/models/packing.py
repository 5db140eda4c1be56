"""Padding as a packed row: real tokens one document behind another, the pads a last document that nobody reads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from linattn.models.state import ModelState, map_model_state


class Packing(NamedTuple):
    """A padded batch [B, T] as one row [1, B*T]: real tokens row by row, then all pads as document B."""

    order: Tensor
    """int64 [B*T]: which token of the flattened batch stands at each place."""
    place: Tensor
    """int64 [B*T]: where each token of the flattened batch went."""
    cu_seqlens: Tensor
    """int32 [B+2]."""


def pack(mask: Tensor) -> Packing:
    """Pack by mask bool [B, T], True on real tokens: left, right and middle padding alike, at static shapes."""
    real = mask.flatten()
    order = torch.argsort((~real).to(torch.uint8), stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    ends = mask.sum(1).cumsum(0)
    total = torch.full_like(ends[:1], real.numel())
    return Packing(order, place, torch.cat([torch.zeros_like(total), ends, total]).to(torch.int32))


def with_pads(state: ModelState | None) -> ModelState | None:
    """One row more, for the document of pads: any State does, since nothing of that document is kept."""
    return None if state is None else map_model_state(lambda leaf: torch.cat([leaf, leaf[:1]]), state)


def without_pads(state: ModelState | None) -> ModelState | None:
    """Without the row of the document of pads."""
    return None if state is None else map_model_state(lambda leaf: leaf[:-1], state)
