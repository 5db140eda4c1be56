"""Error measures and the dtype of sums.

Errors here are relative to the reference's root mean square over one unit (a document and head, say), not over the
whole tensor: one wrong head among many must not be diluted by the right ones.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

TORCH_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest relative error of a torch backend against its float64 reference; other backends get twice this."""


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of ``dtype`` are summed: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which products of x's device keep their inputs' dtype: autocast would sum in 16 bits."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def scale_floor(want: Tensor) -> float:
    """The smallest scale that a unit of ``want`` is judged by: a tenth of the whole tensor's root mean square.

    Some units are zero in exact arithmetic (the first token's weights do not depend on q), and what floating point
    leaves there is noise. Where the whole tensor is such noise, a tenth of one: inputs of the laws are N(0, 1).
    """
    whole = float(want.detach().double().square().mean().sqrt()) if want.numel() else 0.0
    return 0.1 * whole if whole > 1e-6 else 0.1


def relative_error(got: Tensor, want: Tensor, keep: tuple[int, ...] = (), floor: float | None = None) -> float:
    """The largest relative error over the units that the axes ``keep`` index.

    For each index over ``keep``: rms(got - want) / max(rms(want), floor), root mean squares over all other axes, in
    float64; ``floor`` is `scale_floor` unless given. NaN anywhere gives infinity; so does a difference of shape.
    """
    if got.shape != want.shape:
        return float("inf")
    if want.numel() == 0:
        return 0.0
    floor = scale_floor(want) if floor is None else floor
    got, want = got.detach().double(), want.detach().double().to(got.device)
    axes = [a for a in range(want.ndim) if a not in {k % want.ndim for k in keep}]
    difference, scale = (got - want).square(), want.square()
    if axes:
        difference, scale = difference.mean(axes), scale.mean(axes)
    error = difference.sqrt() / scale.sqrt().clamp(min=floor)
    return float(error.max()) if torch.isfinite(error).all() else float("inf")
