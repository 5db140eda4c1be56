"""The attention baseline ("Transformer++"): what every other model here is measured against."""

from __future__ import annotations

from dataclasses import dataclass

from linattn.core.config import require_positive
from linattn.mixers.softmax.layer import SoftmaxConfig
from linattn.models.decoder import DecoderConfig


@dataclass(frozen=True)
class TransformerConfig:
    """The baseline's dials. The defaults are attn-360m: 24 layers, 359.8M parameters."""

    d_model: int = 1024
    """Width of the residual stream."""
    n_layers: int = 24
    """Blocks, each attention and an MLP."""
    n_heads: int = 16
    """Query heads; head dim is d_model / n_heads."""
    n_kv_heads: int | None = None
    """Key and value heads; None: as many as n_heads."""
    rotary_fraction: float = 0.5
    """How much of each head is rotated."""
    d_hidden: int = 2816
    """Width of the SwiGLU."""
    vocab_size: int = 50257
    """Token ids; the table is padded to a multiple of 16."""

    def __post_init__(self) -> None:
        require_positive(self)

    def decoder(self) -> DecoderConfig:
        """The skeleton's configuration."""
        mixer = SoftmaxConfig(n_heads=self.n_heads, n_kv_heads=self.n_kv_heads, rotary_fraction=self.rotary_fraction)
        return DecoderConfig(
            d_model=self.d_model,
            mixers=(mixer,) * self.n_layers,
            d_hidden=self.d_hidden,
            vocab_size=self.vocab_size,
            vocab_multiple=16,
        )


def transformer_360m() -> TransformerConfig:
    """attn-360m, as published: 359.8M parameters."""
    return TransformerConfig()


def transformer_1b() -> TransformerConfig:
    """attn-1b, as published: 36 layers, 24 heads of 70, 18 rotary frequencies 10000^(-2i/35), 1.304B parameters."""
    return TransformerConfig(d_model=1680, n_layers=36, n_heads=24, d_hidden=4480)


def transformer_1b_fast() -> TransformerConfig:
    """The same size with heads of 128, for speed comparisons: FlashAttention-2 pads 70 to 96."""
    return TransformerConfig(d_model=1664, n_layers=36, n_heads=13, d_hidden=4608)
