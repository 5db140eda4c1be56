"""Taylor linear attention by its definition: quadratic in T, any dtype, made to be read and to be right.

    w_ij = 1 + s + s^2/2,  s = scale q_i . k_j,  j <= i        (Based, arXiv 2402.18668, section 3.1)
    y_i  = sum_j w_ij v_j / sum_j w_ij                          (no division when ``normalize`` is False)

The State is sum_j phi(k_j) v_j^T and sum_j phi(k_j), phi the map with phi(q) . phi(k) = 1 + q.k + (q.k)^2/2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def features_273(x: Tensor) -> Tensor:
    """phi with every product x_i x_j: [..., F] -> [..., 1 + F + F^2]. The published form; twice the State it needs."""
    products = x[..., :, None] * x[..., None, :] / math.sqrt(2)
    return torch.cat([torch.ones_like(x[..., :1]), x, products.flatten(-2)], -1)


def features_153(x: Tensor) -> Tensor:
    """phi with each product once: [..., F] -> [..., 1 + F + F(F+1)/2], products in the order of triu_indices."""
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    products = x[..., i] * x[..., j]
    products = torch.where(i == j, products / math.sqrt(2), products)
    return torch.cat([torch.ones_like(x[..., :1]), x, products], -1)


def taylor_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    normalize: bool = True,
    initial_state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """q [B, T, Hq, F], k [B, T, Hk, F], v [B, T, Hv, V] -> (y [B, T, H, V], (S [B, Hs, P, V], z [B, Hs, P]))."""
    T, n_state = q.shape[1], max(k.shape[2], v.shape[2])
    n_out = max(q.shape[2], n_state)
    k, v = (x.repeat_interleave(n_state // x.shape[2], 2) for x in (k, v))
    q = q.repeat_interleave(n_out // q.shape[2], 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    fk = features_153(k)
    S = torch.einsum("bthp,bthv->bhpv", fk, v)
    z = fk.sum(1)
    group = n_out // n_state
    s = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(group, 2))
    w = torch.where(torch.ones(T, T, device=q.device).tril().bool(), 1 + s + s * s / 2, 0)
    y = torch.einsum("bhij,bjhv->bihv", w, v.repeat_interleave(group, 2))
    total = w.sum(-1).transpose(1, 2)
    if initial_state is not None:
        S0, z0 = initial_state
        fq = features_153(q)
        y = y + torch.einsum("bthp,bhpv->bthv", fq, S0.repeat_interleave(group, 1))
        total = total + torch.einsum("bthp,bhp->bth", fq, z0.repeat_interleave(group, 1))
        S, z = S + S0, z + z0
    return (y / total[..., None] if normalize else y), (S, z)
