"""Root-mean-square norms, with and without a learned weight. No mean is subtracted and nothing has a bias.

pytest tests/test_nn.py -k norm
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linattn.core.numerics import sum_dtype


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis.

    Args:
        x: [..., D].
        weight: [D] or None, which is a weight of ones. Its dtype does not decide the result's.
        eps: added to the mean square, in units of x squared.

    Returns:
        [..., D] in x's dtype; computed in float32 (float64 if x is), the weight included, and rounded once.

    Raises:
        ValueError: the weight is not of shape [D].

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467), equation 4.
    """
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"the weight has shape {list(weight.shape)}; x {list(x.shape)} needs [{x.shape[-1]}]")
    dtype = sum_dtype(x.dtype)
    y = F.rms_norm(x.to(dtype), x.shape[-1:], None if weight is None else weight.to(dtype), eps)
    return y.to(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` over the last axis with a learned weight [dim], ones at first; x [..., dim] to [..., dim].

    The norm of Based and of the attention baseline, with the eps of their published configurations.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to ones."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., dim]; a last axis other than dim is a ValueError."""
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class SimpleRMSNorm(nn.Module):
    """`rms_norm` over the last axis without parameters; x [..., dim] to [..., dim].

    The norm of TransNormerLLM (arXiv 2307.14995, section 3.1), in the block and after the attention.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., dim]; a last axis other than dim is a ValueError."""
        if x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {list(x.shape)}; this norm is over a last axis of {self.dim}")
        return rms_norm(x, None, self.eps)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"{self.dim}, eps={self.eps}"


def make_norm(kind: Literal["rms", "simple"], dim: int, eps: float | None = None) -> RMSNorm | SimpleRMSNorm:
    """The norm that a configuration names: "rms" has a weight, "simple" has none.

    Without eps each keeps its own default, 1e-5 and 1e-6. Another kind is a ValueError.
    """
    if kind == "rms":
        return RMSNorm(dim, 1e-5 if eps is None else eps)
    if kind == "simple":
        return SimpleRMSNorm(dim, 1e-6 if eps is None else eps)
    raise ValueError(f"norm {kind!r} is not one of ['rms', 'simple']")
