"""Named shapes for lightning attention, with where they come from: tests, benchmarks and tuning all read this list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from linattn.core.numerics import sum_dtype
from linattn.mixers.lightning.slopes import alibi_slopes


@dataclass(frozen=True)
class LightningCase:
    """One shape. Inputs are N(0, 1); the decay is a number for all heads, or ALiBi's slopes times ``factor``."""

    batch: int
    length: int
    heads: int
    key_dim: int
    value_dim: int
    source: str
    decay: float | Literal["alibi"] = "alibi"
    factor: float = 1.0
    q_heads: int | None = None
    k_heads: int | None = None
    v_heads: int | None = None
    state_heads: int | None = None

    @property
    def name(self) -> str:
        """b4-h32-t8192-d128, and what is unusual."""
        name = f"b{self.batch}-h{self.heads}-t{self.length}-d{self.key_dim}"
        name += f"-v{self.value_dim}" if self.value_dim != self.key_dim else ""
        for letter, count in (("q", self.q_heads), ("k", self.k_heads), ("v", self.v_heads), ("s", self.state_heads)):
            name += f"-{letter}{count}" if count else ""
        name += f"-decay{self.decay:g}" if self.decay != "alibi" else ""
        return name + (f"-x{self.factor:g}" if self.factor != 1 else "")

    def log_decay(self) -> torch.Tensor:
        """float64 [H], H the State's heads."""
        heads = self.state_heads or self.heads
        if self.decay == "alibi":
            return -alibi_slopes(heads) * self.factor
        return torch.full((heads,), -float(self.decay) * self.factor, dtype=torch.float64)

    def draw(self, *, length: int, batch: int, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
        """Keyword arguments of `lightning_attention`."""
        generator = torch.Generator().manual_seed(seed)
        shapes = {
            "q": (self.q_heads or self.heads, self.key_dim),
            "k": (self.k_heads or self.heads, self.key_dim),
            "v": (self.v_heads or self.heads, self.value_dim),
        }
        tensors = {
            n: torch.randn(batch, length, *shape, generator=generator, dtype=torch.float64).to(device, dtype)
            for n, shape in shapes.items()
        }
        return {**tensors, "log_decay": self.log_decay().to(device, sum_dtype(dtype))}


SMALL = (
    LightningCase(2, 130, 3, 4, 5, "smallest with every axis different; ALiBi for three heads"),
    LightningCase(2, 130, 2, 8, 8, "no decay: plain linear attention", decay=0.0),
    LightningCase(2, 130, 2, 8, 8, "the last layer of TransNormerLLM", factor=1e-5),
    LightningCase(2, 130, 2, 6, 4, "2 a token", decay=2.0),
    LightningCase(2, 130, 2, 4, 4, "8 a token, as in the paper's formula: gone after twelve tokens", decay=8.0),
    LightningCase(
        2, 130, 4, 4, 5, "grouped queries: k, v and State have fewer heads", k_heads=2, v_heads=2, state_heads=2
    ),
    LightningCase(2, 130, 4, 4, 5, "grouped values: q and k have fewer heads than v and State", q_heads=2, k_heads=2),
    LightningCase(2, 130, 4, 4, 5, "one key and value head, a decay for each query head", k_heads=1, v_heads=1),
)
"""For the laws on a CPU."""

REAL = (
    LightningCase(4, 2048, 32, 128, 128, "Lightning Attention-2's own benchmark"),
    LightningCase(4, 8192, 32, 128, 128, "Lightning Attention-2's own benchmark"),
    LightningCase(4, 32768, 32, 128, 128, "Lightning Attention-2's own benchmark, its longest"),
    LightningCase(1, 131072, 32, 128, 128, "one long document, TransNormerLLM 7B"),
    LightningCase(1, 524288, 16, 128, 128, "one very long document, TransNormerLLM 1B"),
    LightningCase(2, 8192, 8, 256, 128, "TransNormerLLM's first layer: LRPE doubles the keys"),
)
"""For the bench and the GPU. Decoding takes the shapes of the first, one token a row: b1 to b256, h32."""
