"""Linear layers that decode at the memory's speed on a CPU.

pytest tests/test_nn.py -k linear
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

THIN_ROWS = 3
"""Rows of x up to which `linear` takes the weight as the left operand on a CPU."""
THIN_WEIGHTS = 1 << 20
"""Elements a weight has at least for that; smaller ones are in the cache, and starting two threads costs more."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., D] times weight [E, D] transposed, plus bias [E]: torch's linear, and the same to rounding.

    For one to three rows in fp32 on a CPU, without gradients: as W x instead of x W^T, and never of a single column.
    torch hands one row to a matrix-vector product that uses one core: decoding the 360M models takes 105 to 127 ms a
    token that way on two cores, and 75 to 92 this way. Two rows it reads at half that speed again.
    """
    rows = x.numel() // x.shape[-1]
    if not _thin(x, weight, rows):
        return F.linear(x, weight, bias)
    thin = x.reshape(rows, -1)
    if rows == 1:
        thin = torch.cat([thin, thin])
    y = (weight @ thin.T)[:, :rows].T.reshape(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


def _thin(x: Tensor, weight: Tensor, rows: int) -> bool:
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    fp32 = x.dtype == weight.dtype == torch.float32
    return fp32 and x.device.type == "cpu" and 0 < rows <= THIN_ROWS and weight.numel() >= THIN_WEIGHTS


class Linear(nn.Linear):
    """torch.nn.Linear through `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return linear(input, self.weight, self.bias)
