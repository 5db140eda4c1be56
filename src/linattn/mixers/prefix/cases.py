"""Named shapes for prefix attention, with where they come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from linattn.mixers.taylor.cases import TaylorCase


@dataclass(frozen=True)
class PrefixCase:
    """A Taylor shape and a prefix of ``prefix`` tokens; ``ragged`` gives each row a length of its own."""

    tokens: TaylorCase
    prefix: int
    source: str
    ragged: bool = False

    @property
    def name(self) -> str:
        """b16-h16-t32768-f16-v64-m16384, ending in r where lengths differ."""
        return f"{self.tokens.name}-m{self.prefix}{'r' if self.ragged else ''}"

    def draw(self, *, length: int, batch: int, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
        """Keyword arguments of `prefix_attention`."""
        options = {"batch": batch, "dtype": dtype, "device": device}
        inputs = self.tokens.draw(length=length, seed=seed, **options)
        given = self.tokens.draw(length=self.prefix, seed=seed + 1000, **options)
        inputs |= {"k_prefix": given["k"], "v_prefix": given["v"]}
        if self.ragged:
            lengths = torch.arange(batch, device=device) * 7 + 3 + seed
            inputs["prefix_lengths"] = lengths % (self.prefix + 1)
        return inputs


_small = TaylorCase(2, 130, 3, 4, 5, "smallest with every axis different")

SMALL = (
    PrefixCase(_small, 20, "a prefix shorter than a chunk"),
    PrefixCase(_small, 131, "longer than a chunk, each row its own length, one of them 0 or all", ragged=True),
    PrefixCase(TaylorCase(2, 130, 2, 16, 64, "JRT 360M", normalize=False), 65, "un-normalised"),
)
"""For the laws on a CPU."""

REAL = (
    PrefixCase(TaylorCase(16, 32768, 16, 16, 64, "JRT Table 5"), 16384, "JRT Table 5"),
    PrefixCase(TaylorCase(16, 2048, 16, 16, 64, "JRT 360M"), 1024, "jrt-360m-30b.yaml"),
)
"""For the bench and the GPU."""
