"""Named shapes for softmax attention, with where they come from: tests, benchmarks and tuning all read this list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class SoftmaxCase:
    """One shape. Inputs are N(0, 1)."""

    batch: int
    length: int
    heads: int
    key_dim: int
    source: str
    value_dim: int | None = None
    kv_heads: int | None = None

    @property
    def name(self) -> str:
        """b16-h16-t2048-d64, and what is unusual."""
        name = f"b{self.batch}-h{self.heads}-t{self.length}-d{self.key_dim}"
        name += f"-v{self.value_dim}" if self.value_dim else ""
        return name + (f"-kv{self.kv_heads}" if self.kv_heads else "")

    def draw(self, *, length: int, batch: int, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
        """Keyword arguments of `softmax_attention`."""
        generator = torch.Generator().manual_seed(seed)
        kv_heads = self.kv_heads or self.heads
        shapes = {
            "q": (self.heads, self.key_dim),
            "k": (kv_heads, self.key_dim),
            "v": (kv_heads, self.value_dim or self.key_dim),
        }
        return {
            n: torch.randn(batch, length, *shape, generator=generator, dtype=torch.float64).to(device, dtype)
            for n, shape in shapes.items()
        }


SMALL = (
    SoftmaxCase(2, 130, 3, 4, "smallest"),
    SoftmaxCase(2, 130, 3, 4, "values wider than keys", value_dim=5),
    SoftmaxCase(2, 130, 2, 70, "the 1.3B attention baseline's heads, two of them: 70 is no multiple of 8"),
    SoftmaxCase(2, 130, 4, 8, "grouped queries", kv_heads=2),
    SoftmaxCase(2, 130, 4, 8, "one key and value head", kv_heads=1),
)
"""For the laws on a CPU."""

REAL = (
    SoftmaxCase(16, 2048, 16, 64, "attention baseline 360M of the Based release"),
    SoftmaxCase(8, 2048, 24, 70, "attention baseline 1.3B of the Based release"),
    SoftmaxCase(4, 8192, 32, 128, "beside lightning attention's b4-h32-t8192-d128"),
    SoftmaxCase(4, 32768, 32, 128, "beside lightning attention's b4-h32-t32768-d128"),
)
"""For the bench and the GPU."""
