"""Lightning attention by its definition: quadratic in T, any dtype, made to be read and to be right.

    o_i = scale sum_j exp(log_decay)^(i - j) (q_i . k_j) v_j,  j <= i        (arXiv 2401.04658, section 3.1)

No divisor. Token i reads itself undecayed. The State is (log_decay T, S_T), S_t = exp(log_decay) S_{t-1} + k_t v_t^T.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lightning_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float = 1.0,
    initial_state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """q [B, T, Hq, D], k [B, T, Hk, D], v [B, T, Hv, V], log_decay [H] -> (o [B, T, Ho, V], ([B, H], [B, H, D, V]))."""
    B, T, n_state = q.shape[0], q.shape[1], log_decay.shape[0]
    n_out = max(q.shape[2], n_state)
    group = n_out // n_state
    k, v = (x.repeat_interleave(n_state // x.shape[2], 2) for x in (k, v))
    q = q.repeat_interleave(n_out // q.shape[2], 2) * scale
    i = torch.arange(T, device=q.device)
    distance = (i[:, None] - i).clamp(min=0)
    decay = torch.exp(log_decay[:, None, None] * distance) * (i[:, None] >= i)
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(group, 2))
    scores = scores * decay.repeat_interleave(group, 0)
    o = torch.einsum("bhij,bjhv->bihv", scores, v.repeat_interleave(group, 2))
    to_end = torch.exp(log_decay * (T - 1 - i)[:, None])
    S = torch.einsum("th,bthd,bthv->bhdv", to_end, k, v)
    total = (log_decay * T).expand(B, -1)
    if initial_state is not None:
        total0, S0 = initial_state
        since = torch.exp(log_decay * (i + 1)[:, None]).repeat_interleave(group, 1)
        o = o + since[..., None] * torch.einsum("bthd,bhdv->bthv", q, S0.repeat_interleave(group, 1))
        S = S + torch.exp(log_decay * T)[:, None, None] * S0
        total = total0 + total
    return o, (total, S)
