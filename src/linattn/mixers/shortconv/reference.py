"""Short causal convolution by its definition, tap by tap, any dtype, made to be read and to be right.

    y_t = act(bias + sum_j weight_j x_{t-(w-1)+j}) gate_t,   j = 0 .. w-1, channel by channel, x = 0 before the text

The State is the last w-1 inputs, right-aligned, zeros where there were fewer, and how many are real.
"""

from __future__ import annotations

import torch
from torch import Tensor


def short_conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    activation: str | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """x [B, T, D], weight [D, w], bias [D], gate [B, T, D] -> (y [B, T, D], (x [B, w-1, D], count int32 [B]))."""
    B, T, D = x.shape
    past = weight.shape[1] - 1
    if initial_state is None:
        initial_state = x.new_zeros(B, past, D), torch.zeros(B, dtype=torch.int32, device=x.device)
    x = torch.cat([initial_state[0], x], 1)
    y = torch.zeros_like(x[:, past:])
    for j in range(past + 1):
        y = y + weight[:, j] * x[:, j : j + T]
    if bias is not None:
        y = y + bias
    if activation == "silu":
        y = y * torch.sigmoid(y)
    if gate is not None:
        y = y * gate
    return y, (x[:, T:], (initial_state[1] + T).clamp(max=past))
