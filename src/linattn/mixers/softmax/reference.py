"""Causal softmax attention by its definition: quadratic in T, any dtype, made to be read and to be right.

    o_i = sum_j p_ij v_j,   p_i = softmax over j <= i of scale q_i . k_j,   scale = D^-0.5

The State is every key and value read, left-aligned and zero beyond ``count``, which is how many they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def softmax_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """q [B, T, Hq, D], k [B, T, H, D], v [B, T, H, V] -> (o [B, T, Hq, V], (k [B, L, H, D], v [B, L, H, V], [B]))."""
    B, T = q.shape[:2]
    group = q.shape[2] // k.shape[2]
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    capacity = T + (0 if initial_state is None else initial_state[0].shape[1])
    outputs, states = [], []
    for b in range(B):
        keys, values, before = k[b], v[b], 0
        if initial_state is not None:
            before = int(initial_state[2][b])
            keys, values = (
                torch.cat([old[b, :before], new]) for old, new in zip(initial_state, (keys, values), strict=False)
            )
        s = torch.einsum("ihd,jhd->hij", q[b], keys.repeat_interleave(group, 1))
        seen = torch.arange(before + T) <= before + torch.arange(T)[:, None]
        p = s.masked_fill(~seen.to(s.device), -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hij,jhv->ihv", p, values.repeat_interleave(group, 1)))
        states.append([F.pad(x, (0, 0, 0, 0, 0, capacity - len(x))) for x in (keys, values)])
    count = torch.full((B,), T, dtype=torch.int32, device=q.device)
    if initial_state is not None:
        count = count + initial_state[2]
    stacked_k, stacked_v = (torch.stack(x) for x in zip(*states, strict=True))
    return torch.stack(outputs), (stacked_k, stacked_v, count)
