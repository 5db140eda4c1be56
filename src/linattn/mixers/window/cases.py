"""Named shapes for window attention, with where they come from: tests, benchmarks and tuning all read this list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class WindowCase:
    """One shape. Inputs are N(0, 1)."""

    batch: int
    length: int
    heads: int
    head_dim: int
    window: int
    source: str
    value_dim: int | None = None
    kv_heads: int | None = None
    scale: float | None = None

    @property
    def name(self) -> str:
        """b16-h16-t2048-d64-w129, and what is unusual."""
        name = f"b{self.batch}-h{self.heads}-t{self.length}-d{self.head_dim}-w{self.window}"
        name += f"-v{self.value_dim}" if self.value_dim else ""
        name += f"-kv{self.kv_heads}" if self.kv_heads else ""
        return name + (f"-s{self.scale:g}" if self.scale is not None else "")

    def draw(self, *, length: int, batch: int, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
        """Keyword arguments of `window_attention`."""
        generator = torch.Generator().manual_seed(seed)
        kv_heads = self.kv_heads or self.heads
        shapes = {
            "q": (self.heads, self.head_dim),
            "k": (kv_heads, self.head_dim),
            "v": (kv_heads, self.value_dim or self.head_dim),
        }
        tensors = {
            n: torch.randn(batch, length, *shape, generator=generator, dtype=torch.float64).to(device, dtype)
            for n, shape in shapes.items()
        }
        return {**tensors, "window": self.window, "scale": self.scale}


SMALL = (
    WindowCase(2, 130, 3, 4, 5, "smallest with every axis different", value_dim=6),
    WindowCase(2, 130, 3, 4, 1, "self alone: a State of no rows"),
    WindowCase(2, 130, 3, 4, 2, "self and one before, a scale of one's own", scale=1.5),
    WindowCase(2, 130, 2, 8, 64, "Based's window 64, two heads"),
    WindowCase(2, 130, 2, 4, 129, "Based 360M's window: FlashAttention's (128, 0)"),
    WindowCase(2, 130, 6, 4, 5, "grouped queries: k and v have fewer heads", value_dim=3, kv_heads=2),
)
"""For the laws on a CPU."""

REAL = (
    WindowCase(16, 2048, 16, 64, 129, "Based 360M (based-360m.yaml: window_size 256)"),
    WindowCase(16, 8192, 16, 64, 129, "Based 360M, long"),
    WindowCase(16, 32768, 16, 64, 129, "Based 360M, JRT Table 5's longest"),
    WindowCase(32, 2048, 16, 64, 129, "Based 360M, a training micro-batch"),
    WindowCase(4, 16384, 16, 64, 129, "long training"),
    WindowCase(16, 2048, 16, 64, 65, "Based 360M, the paper's window 64 (window_size 128)"),
    WindowCase(16, 2048, 16, 112, 129, "Based 1.3B (based-1b.yaml)"),
    WindowCase(16, 8192, 16, 112, 129, "Based 1.3B, long"),
)
"""For the bench and the GPU."""
