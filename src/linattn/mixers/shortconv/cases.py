"""Named shapes for short convolutions, with where they come from: tests, benchmarks and tuning all read this list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ShortConvCase:
    """One shape. Inputs are N(0, 1)."""

    batch: int
    length: int
    channels: int
    taps: int
    source: str
    bias: bool = False
    gate: bool = False
    activation: str | None = None

    @property
    def name(self) -> str:
        """b16-t2048-d2048-w3-silu-gate."""
        name = f"b{self.batch}-t{self.length}-d{self.channels}-w{self.taps}"
        name += "-bias" if self.bias else ""
        name += f"-{self.activation}" if self.activation else ""
        return name + ("-gate" if self.gate else "")

    def draw(self, *, length: int, batch: int, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
        """Keyword arguments of `short_conv`."""
        generator = torch.Generator().manual_seed(seed)
        shapes: dict[str, tuple[int, ...]] = {
            "x": (batch, length, self.channels),
            "weight": (self.channels, self.taps),
        }
        if self.bias:
            shapes["bias"] = (self.channels,)
        if self.gate:
            shapes["gate"] = (batch, length, self.channels)
        tensors = {
            n: torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)
            for n, shape in shapes.items()
        }
        return {**tensors, "activation": self.activation}


SMALL = (
    ShortConvCase(2, 130, 5, 3, "Based's BaseConv, five channels", gate=True, activation="silu"),
    ShortConvCase(2, 130, 5, 3, "the filter alone"),
    ShortConvCase(2, 130, 5, 4, "Mamba's: four taps, a bias, no gate", bias=True, activation="silu"),
    ShortConvCase(2, 130, 5, 1, "one tap: a State of no rows", bias=True, gate=True),
    ShortConvCase(2, 130, 5, 2, "one input before, gated without an activation", gate=True),
)
"""For the laws on a CPU."""

REAL = (
    ShortConvCase(16, 2048, 2048, 3, "Based 360M (based-360m.yaml)", gate=True, activation="silu"),
    ShortConvCase(32, 2048, 2048, 3, "Based 360M, a training micro-batch", gate=True, activation="silu"),
    ShortConvCase(4, 16384, 2048, 3, "long training", gate=True, activation="silu"),
    ShortConvCase(16, 2048, 3584, 3, "Based 1.3B (based-1b.yaml)", gate=True, activation="silu"),
)
"""For the bench and the GPU."""
