"""Based's gated convolution layer, BaseConv: projections with bias around `short_conv`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linattn.core.config import require_positive
from linattn.core.shapes import Segment
from linattn.mixers.shortconv import MIXER, ShortConvState, chunked, short_conv, short_conv_step_
from linattn.nn import Linear


@dataclass(frozen=True)
class ShortConvConfig:
    """BaseConv of Based (arXiv 2402.18668): y = out_proj(SiLU(conv(u1)) * u2), u1 and u2 the halves of in_proj(x)."""

    expand: int = 4
    """in_proj is d_model -> expand * d_model; the convolution has half as many channels. Even."""
    kernel: int = 3
    """Taps of each channel's filter, the current token's included."""

    def __post_init__(self) -> None:
        require_positive(self)

    def build(self, d_model: int, layer: int, n_layers: int) -> ShortConvLayer:
        """The layer; its place in the model does not matter."""
        return ShortConvLayer(self, d_model)


class ShortConv(nn.Module):
    """The filters: weight [channels, kernel], tap kernel-1 on the current token. A Conv1d's weight[:, 0], no bias."""

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, kernel))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The default of a depthwise torch.nn.Conv1d: uniform within kernel ** -0.5."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"{self.weight.shape[0]}, kernel={self.weight.shape[1]}"


class ShortConvLayer(nn.Module):
    """in_proj: d_model -> 2 * channels (first half convolved, second the gate); out_proj: channels -> d_model."""

    mixer = MIXER

    def __init__(self, config: ShortConvConfig, d_model: int):
        super().__init__()
        if config.expand < 2 or config.expand % 2:
            raise ValueError(f"expand is split into two halves and must be even, at least 2, got {config.expand}")
        self.config = config
        channels = config.expand // 2 * d_model
        self.in_proj = Linear(d_model, 2 * channels)
        self.conv = ShortConv(channels, config.kernel)
        self.out_proj = Linear(channels, d_model)

    def inputs(self, x: Tensor) -> dict[str, Any]:
        """The op's arguments, x and gate [..., channels], of x [..., d_model]."""
        u, gate = self.in_proj(x).chunk(2, -1)
        return {"x": u, "weight": self.conv.weight, "gate": gate, "activation": "silu"}

    def forward(
        self, x: Tensor, state: ShortConvState | None, segment: Segment, return_state: bool = True
    ) -> tuple[Tensor, ShortConvState | None]:
        """x [B, T, d_model] -> y [B, T, d_model] and the State."""
        inputs = self.inputs(x)
        state = segment.before(MIXER, inputs, state)
        y, state = short_conv(**inputs, initial_state=state, cu_seqlens=segment.cu_seqlens, return_state=return_state)
        return self.out_proj(y), state

    def identity(self, documents: int) -> ShortConvState:
        """The State that has read nothing."""
        weight = self.conv.weight.detach()
        return chunked.identity(documents, weight.shape[1], weight.shape[0], weight)

    @torch.no_grad()
    def step_(self, x: Tensor, pool: ShortConvState, slots: Tensor, positions: Tensor) -> Tensor:
        """One token a row: x [B, d_model] -> y [B, d_model]; the pool in place."""
        return self.out_proj(short_conv_step_(**self.inputs(x), pool=pool, slots=slots))
