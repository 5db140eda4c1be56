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


PARTS = 8
"""Blocks of rows that a weight is cut into for one row of x: torch's batched product shares them between cores."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., D] times weight [E, D] transposed, plus bias [E]: torch's linear, and the same to rounding.

    For one to three rows in fp32 on a CPU, without gradients, the product reads the weight at the memory's speed.
    torch hands one row to a matrix-vector product that uses one core; as a batch of `PARTS` products it uses all, and
    takes 0.5 to 0.8 of the time of that one, and of W (x, x). Two or three rows go as W x, which x W^T takes twice.
    """
    rows = x.numel() // x.shape[-1]
    if not _thin(x, weight, rows):
        return F.linear(x, weight, bias)
    thin = x.reshape(rows, -1).T
    if rows == 1:
        y = torch.bmm(weight.unflatten(0, (PARTS, -1)), thin.expand(PARTS, *thin.shape))
    else:
        y = (weight @ thin).T
    y = y.reshape(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


def _thin(x: Tensor, weight: Tensor, rows: int) -> bool:
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if not (x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"):
        return False
    fits = weight.shape[0] % PARTS == 0 if rows == 1 else 0 < rows <= THIN_ROWS
    return fits and weight.numel() >= THIN_WEIGHTS


class Linear(nn.Linear):
    """torch.nn.Linear through `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return linear(input, self.weight, self.bias)
