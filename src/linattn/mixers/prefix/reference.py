"""Prefix linear attention by its definition (JRT-RNN, arXiv 2407.05483, equation 3), quadratic in T, any dtype.

    y_i = (sum_{j<=i} w(q_i, k_j) v_j + sum_{j<M} w(q_i, k'_j) v'_j) / (the same sums of the weights alone)

w = 1 + s + s^2/2 with s = scale q . k; one normaliser for both sums; every i sees the whole prefix (k', v').
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def prefix_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    *,
    prefix_lengths: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = True,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """q, k [B, T, H, F], v [B, T, H, V], k_prefix [B, M, H, F], v_prefix [B, M, H, V] -> (y, (S, z))."""
    T, M = q.shape[1], k_prefix.shape[1]
    by = q.shape[-1] ** -0.5 if scale is None else scale
    lengths = torch.full((q.shape[0],), M, device=q.device) if prefix_lengths is None else prefix_lengths
    real = (torch.arange(M, device=q.device) < lengths[:, None]).to(q.dtype)
    causal = torch.ones(T, T, dtype=q.dtype, device=q.device).tril()
    own = by * torch.einsum("bihf,bjhf->bhij", q, k)
    given = by * torch.einsum("bihf,bjhf->bhij", q, k_prefix)
    w_own = (1 + own + own.square() / 2) * causal
    w_given = (1 + given + given.square() / 2) * real[:, None, None]
    y = torch.einsum("bhij,bjhv->bihv", w_own, v) + torch.einsum("bhij,bjhv->bihv", w_given, v_prefix)
    if normalize:
        y = y / (w_own.sum(-1) + w_given.sum(-1)).transpose(1, 2)[..., None]
    fk, fp = _features(k), _features(k_prefix) * real[..., None, None]
    S = torch.einsum("bthp,bthv->bhpv", fk, v) + torch.einsum("bthp,bthv->bhpv", fp, v_prefix)
    return y, (S, fk.sum(1) + fp.sum(1))


def _features(x: Tensor) -> Tensor:
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    products = x[..., i] * x[..., j]
    products = torch.where(i == j, products / math.sqrt(2), products)
    return torch.cat([torch.ones_like(x[..., :1]), x, products], -1)
