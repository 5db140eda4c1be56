"""Named shapes for Taylor attention, with where they come from: tests, benchmarks and tuning all read this list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class TaylorCase:
    """One shape. Inputs are N(0, 1), strided views of one packed tensor where ``packed_qkv``."""

    batch: int
    length: int
    heads: int
    feature_dim: int
    value_dim: int
    source: str
    q_heads: int | None = None
    k_heads: int | None = None
    v_heads: int | None = None
    normalize: bool = True

    @property
    def name(self) -> str:
        """b16-h16-t2048-f16-v64, and what is unusual."""
        name = f"b{self.batch}-h{self.heads}-t{self.length}-f{self.feature_dim}-v{self.value_dim}"
        for letter, count in (("q", self.q_heads), ("k", self.k_heads), ("v", self.v_heads)):
            name += f"-{letter}{count}" if count else ""
        return name + ("" if self.normalize else "-sum")

    def draw(self, *, length: int, batch: int, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
        """Keyword arguments of `taylor_attention`."""
        generator = torch.Generator().manual_seed(seed)
        shapes = {
            "q": (self.q_heads or self.heads, self.feature_dim),
            "k": (self.k_heads or self.heads, self.feature_dim),
            "v": (self.v_heads or self.heads, self.value_dim),
        }
        tensors = {
            n: torch.randn(batch, length, *shape, generator=generator, dtype=torch.float64).to(device, dtype)
            for n, shape in shapes.items()
        }
        return {**tensors, "normalize": self.normalize}


SMALL = (
    TaylorCase(2, 130, 3, 4, 5, "smallest with every axis different"),
    TaylorCase(2, 130, 2, 16, 64, "Based 360M, two of its heads"),
    TaylorCase(2, 130, 2, 4, 6, "un-normalised sums (ThunderKittens' form)", normalize=False),
    TaylorCase(2, 130, 4, 4, 5, "grouped queries: k and v have fewer heads", k_heads=2, v_heads=2),
    TaylorCase(2, 130, 4, 4, 5, "grouped values: q and k have fewer heads", q_heads=2, k_heads=2),
)
"""For the laws on a CPU."""

REAL = (
    TaylorCase(16, 2048, 16, 16, 64, "Based 360M (based-360m.yaml), JRT Table 5"),
    TaylorCase(16, 8192, 16, 16, 64, "JRT Table 5"),
    TaylorCase(16, 32768, 16, 16, 64, "JRT Table 5"),
    TaylorCase(2, 16384, 16, 16, 64, "JRT Table 5, batch sweep"),
    TaylorCase(32, 2048, 16, 16, 64, "Based 360M, a training micro-batch"),
    TaylorCase(4, 16384, 16, 16, 64, "long training"),
    TaylorCase(16, 8192, 16, 16, 112, "Based 1.3B (based-1b.yaml)"),
)
"""For the bench and the GPU."""
