"""Error measures and the dtype of sums.

Errors here are relative to the reference's root mean square over one unit (a document and head, say), not over the
whole tensor: one wrong head among many must not be diluted by the right ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

TORCH_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest relative error of a torch backend against its float64 reference; other backends get twice this."""


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of ``dtype`` are summed: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def relative_error(got: Tensor, want: Tensor, keep: tuple[int, ...] = ()) -> float:
    """The largest relative error over the units that the axes ``keep`` index.

    For each index over ``keep``: rms(got - want) / rms(want), root mean squares over all other axes, in float64.
    A unit whose reference is all zero is held to the absolute rms error. NaN anywhere gives infinity; so does a
    difference of shape.
    """
    if got.shape != want.shape:
        return float("inf")
    if want.numel() == 0:
        return 0.0
    got, want = got.detach().double(), want.detach().double().to(got.device)
    axes = [a for a in range(want.ndim) if a not in {k % want.ndim for k in keep}]
    difference = (got - want).square()
    scale = want.square()
    if axes:
        difference, scale = difference.mean(axes), scale.mean(axes)
    error = torch.where(scale > 0, difference / scale, difference).sqrt()
    if not torch.isfinite(error).all():
        return float("inf")
    return float(error.max())
