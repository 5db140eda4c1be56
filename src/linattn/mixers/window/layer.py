"""Based's sliding-window attention layer: rotary positions and projections around `window_attention`. No bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linattn.core.config import require_positive
from linattn.core.shapes import Segment
from linattn.mixers.window import MIXER, WindowState, chunked, window_attention, window_step_
from linattn.nn import Linear, Rotary


@dataclass(frozen=True)
class WindowConfig:
    """Sliding-window attention with rotary positions (arXiv 2402.18668)."""

    n_heads: int = 16
    """Heads of q, k and v alike."""
    window: int = 129
    """Keys that a token sees, itself included. A published Based configuration's ``window_size`` 256 is 129 here: it is
    halved, and FlashAttention's (128, 0) counts the 128 before the token."""
    head_dim: int | None = None
    """Dim of a head; d_model / n_heads unless given."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""
    rotary_fraction: float = 1.0
    """Part of each head that is rotated."""

    def __post_init__(self) -> None:
        require_positive(self)

    def build(self, d_model: int, layer: int, n_layers: int) -> WindowLayer:
        """The layer; its place in the model does not matter."""
        return WindowLayer(self, d_model)


class WindowLayer(nn.Module):
    """Wqkv: d_model -> 3 * n_heads * head_dim (q rows, then k, then v; each head by head); out_proj back."""

    mixer = MIXER

    def __init__(self, config: WindowConfig, d_model: int):
        super().__init__()
        if config.head_dim is None and d_model % config.n_heads:
            raise ValueError(f"d_model {d_model} is not a multiple of n_heads {config.n_heads}: give head_dim")
        self.config = config
        self.head_dim = config.head_dim or d_model // config.n_heads
        width = config.n_heads * self.head_dim
        self.rotary = Rotary(self.head_dim, config.rotary_base, config.rotary_fraction)
        self.Wqkv = Linear(d_model, 3 * width, bias=False)
        self.out_proj = Linear(width, d_model, bias=False)

    def heads(self, x: Tensor, positions: Tensor) -> dict[str, Any]:
        """q, k, v [..., H, D] of x [..., d_model], q and k rotated by positions [...]."""
        q, k, v = self.Wqkv(x).unflatten(-1, (3, self.config.n_heads, self.head_dim)).unbind(-3)
        q, k = self.rotary(q, k, positions)
        return {"q": q, "k": k, "v": v}

    def forward(
        self, x: Tensor, state: WindowState | None, segment: Segment, return_state: bool = True
    ) -> tuple[Tensor, WindowState | None]:
        """x [B, T, d_model] -> y [B, T, d_model] and the State."""
        inputs = {**self.heads(x, segment.positions), "window": self.config.window}
        state = segment.before(MIXER, inputs, state)
        y, state = window_attention(
            **inputs, initial_state=state, cu_seqlens=segment.cu_seqlens, return_state=return_state
        )
        return self.out_proj(y.flatten(-2)), state

    def identity(self, documents: int) -> WindowState:
        """The State that has read nothing."""
        shape = self.config.n_heads, self.head_dim
        return chunked.identity(documents, self.config.window, shape, shape, self.Wqkv.weight.detach())

    @torch.no_grad()
    def step_(self, x: Tensor, pool: chunked.WindowPool, slots: Tensor, positions: Tensor) -> Tensor:
        """One token a row: x [B, d_model], positions int64 [B] -> y [B, d_model]; the pool in place."""
        y = window_step_(**self.heads(x, positions), pool=pool, slots=slots, window=self.config.window)
        return self.out_proj(y.flatten(-2))
