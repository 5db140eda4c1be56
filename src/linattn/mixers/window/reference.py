"""Sliding-window softmax attention by its definition: quadratic in T, any dtype, made to be read and to be right.

    y_i = sum_j softmax_j(scale q_i . k_j) v_j,   i - W < j <= i        (Longformer, arXiv 2004.05150, causal)

The State is the last W-1 keys and values, right-aligned, zeros where there were fewer, and how many are real.
"""

from __future__ import annotations

import torch
from torch import Tensor


def window_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """q [B, T, Hq, D], k [B, T, H, D], v [B, T, H, V] -> (y [B, T, Hq, V], (k, v [B, W-1, H, D or V], count [B]))."""
    B, T, past = q.shape[0], q.shape[1], window - 1
    if initial_state is None:
        count = torch.zeros(B, dtype=torch.int32, device=q.device)
        initial_state = k.new_zeros(B, past, *k.shape[2:]), v.new_zeros(B, past, *v.shape[2:]), count
    k = torch.cat([initial_state[0], k], 1)
    v = torch.cat([initial_state[1], v], 1)
    count = initial_state[2]
    i = torch.arange(T, device=q.device)[:, None] + past
    j = torch.arange(past + T, device=q.device)
    near = (j <= i) & (j > i - window)
    real = j >= past - count[:, None]
    group = q.shape[2] // k.shape[2]
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    s = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(group, 2))
    s = s.masked_fill(~(near & real[:, None, None]), float("-inf"))
    y = torch.einsum("bhij,bjhv->bihv", s.softmax(-1), v.repeat_interleave(group, 2))
    return y, (k[:, T:], v[:, T:], (count + T).clamp(max=past))
