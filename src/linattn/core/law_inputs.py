"""An op's keyword arguments cut, continued, packed and permuted by the axes that its mixer names; see laws.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linattn.core.mixer import Mixer, map_state


def double(inputs: dict[str, Any]) -> dict[str, Any]:
    """Floating-point tensors in float64."""
    return {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in inputs.items()}


def double_state(state: Any) -> Any:
    """A State in float64, its counts as they are."""
    return None if state is None else map_state(lambda x: x.double() if x.is_floating_point() else x, state)


def cut(mixer: Mixer, inputs: dict[str, Any], a: int, b: int) -> dict[str, Any]:
    """Tokens a to b; what belongs to the first segment alone goes only with it."""
    kept = {n: x for n, x in inputs.items() if a == 0 or n not in mixer.once}
    return {n: x[:, a:b] if isinstance(x, Tensor) and "T" in mixer.axes.get(n, "") else x for n, x in kept.items()}


def continued(mixer: Mixer, inputs: dict[str, Any]) -> dict[str, Any]:
    """Without what belongs to the first segment alone."""
    return {n: x for n, x in inputs.items() if n not in mixer.once}


def token_of(mixer: Mixer, inputs: dict[str, Any], t: int) -> dict[str, Any]:
    """Token t of every row, as `step_` takes it."""
    return {n: x[:, t] if isinstance(x, Tensor) and "T" in mixer.axes.get(n, "") else x for n, x in inputs.items()}


def pad_row(mixer: Mixer, name: str, x: Any) -> Any:
    """One idle row of NaN under the others: it must neither be written to a pool nor disturb them."""
    if not isinstance(x, Tensor) or "T" not in mixer.axes.get(name, ""):
        return x
    return torch.cat([x, torch.full_like(x[:1], float("nan"))])


def pack(mixer: Mixer, documents: list[dict[str, Any]], device: str) -> tuple[dict[str, Any], Tensor]:
    """Documents, each a batch of one row, behind one another in one row, and their cu_seqlens."""
    packed = dict(documents[0])
    for name, axes in mixer.axes.items():
        if name in packed and isinstance(packed[name], Tensor) and "B" in axes:
            packed[name] = torch.cat([d[name] for d in documents], 1 if axes[1:2] in ("T", "M") else 0)
            if axes[1:2] == "M":
                packed["cu_prefix"] = _offsets([d[name].shape[1] for d in documents], device)
    tokens = next(n for n, axes in mixer.axes.items() if "T" in axes and n in packed)
    return packed, _offsets([d[tokens].shape[1] for d in documents], device)


def unpack(mixer: Mixer, packed: dict[str, Any], documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The documents again, cut from the packed tensors, so that gradients reach those."""
    parts = [{n: x for n, x in packed.items() if n != "cu_prefix"} for _ in documents]
    for name, axes in mixer.axes.items():
        if name in packed and isinstance(packed[name], Tensor) and "B" in axes:
            axis = 1 if axes[1:2] in ("T", "M") else 0
            pieces = packed[name].split([d[name].shape[axis] for d in documents], axis)
            for part, piece in zip(parts, pieces, strict=True):
                part[name] = piece
    return parts


def _offsets(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def permute(x: Any, axes: str, letter: str, order: Tensor) -> Any:
    """Reordered along the axis of this letter; what has none as it is."""
    return x.index_select(axes.index(letter), order) if isinstance(x, Tensor) and letter in axes else x
