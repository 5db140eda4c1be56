"""TransNormerLLM (arXiv 2307.14995) on Lightning Attention-2: one decay a head, no softmax anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from linattn.core.config import require_positive
from linattn.mixers.lightning.layer import LightningConfig
from linattn.models.decoder import DecoderConfig


@dataclass(frozen=True)
class TransNormerConfig:
    """TransNormerLLM's dials. The defaults are 385M: 24 layers, 399.0M parameters with its 64,000 tokens tied."""

    d_model: int = 1024
    """Width of the residual stream."""
    n_layers: int = 24
    """Blocks, each lightning attention and an SGLU."""
    n_heads: int = 8
    """Heads, of head_dim each."""
    head_dim: int = 128
    """Dim of q, k and v a head."""
    d_hidden: int = 2816
    """Width of the SGLU."""
    vocab_size: int = 64000
    """Token ids."""
    lrpe_layers: tuple[int, ...] = (0,)
    """Layers, from 0, whose q and k are turned by LRPE, which doubles their dim."""
    form: Literal["tnl", "tnl3"] = "tnl"
    """tnl: gated by u, a fourth projection. tnl3 (15B): gated by sigmoid(low-rank(x)), SiLU on v too."""
    gate_dim: int = 16
    """Rank of tnl3's gate."""
    slopes: Literal["tnl", "paper", "minimax"] = "tnl"
    """Which formula gives the decays; all published weights are tnl."""
    scale_embedding: bool = True
    """Whether embeddings are multiplied by sqrt(d_model); the TNL2 checkpoints are not."""

    def __post_init__(self) -> None:
        require_positive(self)

    def decoder(self) -> DecoderConfig:
        """The skeleton's configuration."""
        for i in self.lrpe_layers:
            if not 0 <= i < self.n_layers:
                raise ValueError(f"lrpe_layers names layer {i}, but the model has layers 0 to {self.n_layers - 1}")
        mixers = tuple(
            LightningConfig(
                n_heads=self.n_heads,
                head_dim=self.head_dim,
                lrpe=i in self.lrpe_layers,
                form=self.form,
                gate_dim=self.gate_dim,
                slopes=self.slopes,
            )
            for i in range(self.n_layers)
        )
        return DecoderConfig(
            d_model=self.d_model,
            mixers=mixers,
            d_hidden=self.d_hidden,
            vocab_size=self.vocab_size,
            mlp="sglu",
            norm="simple",
            norm_eps=1e-6,
            scale_embedding=self.scale_embedding,
            init_depth_scaled=False,
        )


def transnormer_385m() -> TransNormerConfig:
    """385M: 399.0M parameters, tied."""
    return TransNormerConfig()


def transnormer_1b() -> TransNormerConfig:
    """1B: 1.0203B parameters."""
    return TransNormerConfig(d_model=2048, n_layers=16, n_heads=16, d_hidden=5632)


def transnormer_3b() -> TransNormerConfig:
    """TNL2-3B."""
    return TransNormerConfig(d_model=2560, n_layers=32, n_heads=20, d_hidden=6912, scale_embedding=False)


def transnormer_7b() -> TransNormerConfig:
    """7B: 30 layers of 32 heads."""
    return TransNormerConfig(d_model=4096, n_layers=30, n_heads=32, d_hidden=11008)


def tnl3_15b() -> TransNormerConfig:
    """TNL3-15B, the gated form: 42 layers of 40 heads, 14.83B parameters."""
    return TransNormerConfig(
        d_model=5120, n_layers=42, n_heads=40, d_hidden=15360, vocab_size=100280, form="tnl3", gate_dim=16
    )
