"""The attention baseline's layer: one projection to q, k and v, rotary positions, `softmax_attention`, one out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linattn.core.config import require_positive
from linattn.core.shapes import Segment
from linattn.mixers.softmax import MIXER, SoftmaxState, chunked, softmax_attention, softmax_step_
from linattn.nn import Linear, Rotary


@dataclass(frozen=True)
class SoftmaxConfig:
    """Causal softmax attention with rotary positions; the published baselines rotate half of each head."""

    n_heads: int = 16
    """Query heads."""
    n_kv_heads: int | None = None
    """Key and value heads, a divisor of n_heads; as many as n_heads unless given."""
    head_dim: int | None = None
    """Dim of a head; d_model / n_heads unless given. The published 1.3B has 70 (1680 / 24)."""
    rotary_fraction: float = 1.0
    """Share of each head that is rotated; 0 for none. The published baselines have 0.5."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""
    bias: bool = False
    """Whether the two projections have one."""

    def __post_init__(self) -> None:
        require_positive(self)

    def build(self, d_model: int, layer: int, n_layers: int) -> SoftmaxLayer:
        """The layer; its place in the model does not matter."""
        return SoftmaxLayer(self, d_model)


class SoftmaxLayer(nn.Module):
    """Wqkv: d_model -> rows of q, then k, then v, each head by head; out_proj back to d_model."""

    mixer = MIXER

    def __init__(self, config: SoftmaxConfig, d_model: int):
        super().__init__()
        self.config = config
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_heads if config.n_kv_heads is None else config.n_kv_heads
        if self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads {self.n_kv_heads} does not divide n_heads {self.n_heads}")
        if config.head_dim is None and d_model % config.n_heads:
            raise ValueError(f"d_model {d_model} is not a multiple of n_heads {config.n_heads}; give head_dim")
        self.head_dim = d_model // config.n_heads if config.head_dim is None else config.head_dim
        width = self.n_heads * self.head_dim
        self.Wqkv = Linear(d_model, width + 2 * self.n_kv_heads * self.head_dim, bias=config.bias)
        self.out_proj = Linear(width, d_model, bias=config.bias)
        self.rotary = None
        if config.rotary_fraction:
            self.rotary = Rotary(self.head_dim, config.rotary_base, config.rotary_fraction)

    def heads(self, x: Tensor, positions: Tensor) -> dict[str, Any]:
        """q [..., H, D], k and v [..., H_kv, D] of x [..., d_model], q and k rotated to ``positions``."""
        counts = [self.n_heads, self.n_kv_heads, self.n_kv_heads]
        q, k, v = self.Wqkv(x).unflatten(-1, (-1, self.head_dim)).split(counts, -2)
        if self.rotary is not None:
            q, k = self.rotary(q, k, positions)
        return {"q": q, "k": k, "v": v}

    def forward(
        self, x: Tensor, state: SoftmaxState | None, segment: Segment, return_state: bool = True
    ) -> tuple[Tensor, SoftmaxState | None]:
        """x [B, T, d_model] -> y [B, T, d_model] and the State."""
        inputs = self.heads(x, segment.positions)
        state = segment.before(MIXER, inputs, state)
        o, state = softmax_attention(
            **inputs, initial_state=state, cu_seqlens=segment.cu_seqlens, return_state=return_state
        )
        return self.out_proj(o.flatten(-2)), state

    def identity(self, documents: int) -> SoftmaxState:
        """The State that has read nothing."""
        return chunked.identity(documents, self.n_kv_heads, self.head_dim, self.head_dim, self.out_proj.weight)

    @torch.no_grad()
    def step_(self, x: Tensor, pool: SoftmaxState, slots: Tensor, positions: Tensor) -> Tensor:
        """One token a row: x [B, d_model], positions int64 [B] -> y [B, d_model]; the pool in place."""
        o = softmax_step_(**self.heads(x, positions), pool=pool, slots=slots)
        return self.out_proj(o.flatten(-2))
