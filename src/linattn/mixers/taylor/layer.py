"""Based's linear attention layer: projections around `taylor_attention`. No positions, no gate, no norm, no bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linattn.core.config import require_positive
from linattn.core.shapes import Segment
from linattn.mixers.taylor import MIXER, TaylorState, chunked, taylor_attention, taylor_step_
from linattn.nn import Linear


@dataclass(frozen=True)
class TaylorConfig:
    """Based's linear attention (arXiv 2402.18668): the State grows with feature_dim^2 / 2."""

    n_heads: int = 16
    """Heads; the value dim of each is d_model / n_heads."""
    feature_dim: int = 16
    """Dim of q and k a head, before the Taylor map: 8, 16, 24 and 32 keep 45, 153, 325 and 561 features."""
    normalize: bool = True
    """Divide by the sum of weights."""

    def __post_init__(self) -> None:
        require_positive(self)

    def build(self, d_model: int, layer: int, n_layers: int) -> TaylorLayer:
        """The layer; its place in the model does not matter."""
        return TaylorLayer(self, d_model)


class TaylorLayer(nn.Module):
    """q, k: d_model -> n_heads * feature_dim; v, out: d_model -> d_model."""

    mixer = MIXER

    def __init__(self, config: TaylorConfig, d_model: int):
        super().__init__()
        if d_model % config.n_heads:
            raise ValueError(f"d_model {d_model} is not a multiple of n_heads {config.n_heads}")
        self.config = config
        width = config.n_heads * config.feature_dim
        self.proj_q = Linear(d_model, width, bias=False)
        self.proj_k = Linear(d_model, width, bias=False)
        self.proj_v = Linear(d_model, d_model, bias=False)
        self.out_proj = Linear(d_model, d_model, bias=False)

    def heads(self, x: Tensor) -> dict[str, Any]:
        """q, k [..., H, F] and v [..., H, V] of x [..., d_model]."""
        n = self.config.n_heads
        q, k, v = (proj(x).unflatten(-1, (n, -1)) for proj in (self.proj_q, self.proj_k, self.proj_v))
        return {"q": q, "k": k, "v": v}

    def forward(
        self, x: Tensor, state: TaylorState | None, segment: Segment, return_state: bool = True
    ) -> tuple[Tensor, TaylorState | None]:
        """x [B, T, d_model] -> y [B, T, d_model] and the State."""
        inputs = self.heads(x)
        state = segment.before(MIXER, inputs, state)
        y, state = taylor_attention(
            **inputs,
            normalize=self.config.normalize,
            initial_state=state,
            cu_seqlens=segment.cu_seqlens,
            return_state=return_state,
        )
        return self.out_proj(y.flatten(-2)), state

    def identity(self, documents: int) -> TaylorState:
        """The State that has read nothing."""
        n, weight = self.config.n_heads, self.proj_v.weight
        return chunked.identity(documents, n, self.config.feature_dim, weight.shape[0] // n, weight)

    @torch.no_grad()
    def step_(self, x: Tensor, pool: TaylorState, slots: Tensor, positions: Tensor) -> Tensor:
        """One token a row: x [B, d_model] -> y [B, d_model]; the pool in place."""
        y = taylor_step_(**self.heads(x), pool=pool, slots=slots, normalize=self.config.normalize)
        return self.out_proj(y.flatten(-2))
