"""JRT-RNN (arXiv 2407.05483): Based whose Taylor layers also read the first tokens without causality."""

from __future__ import annotations

from dataclasses import dataclass, replace

from linattn.mixers.prefix.layer import PrefixConfig
from linattn.models.based import BasedConfig, based_1b
from linattn.models.decoder import DecoderConfig
from linattn.nn import padded_vocab


@dataclass(frozen=True)
class JRTConfig(BasedConfig):
    """JRT-RNN's dials: Based's and the prefix. The defaults are the 360M model: 26 layers, 356.6M parameters."""

    n_layers: int = 26
    """Blocks; one short convolution less than Based's 360M."""
    prefix_length: int = 1024
    """The longest prefix, in tokens, that is read without causality."""

    @property
    def mask_id(self) -> int:
        """The token that hides a prefix token in training: the last padded row, 50,263 for GPT-2's vocabulary."""
        return padded_vocab(self.vocab_size) - 1

    def linear(self) -> PrefixConfig:
        """The prefix linear attention layer."""
        return PrefixConfig(self.n_heads, self.feature_dim, self.normalize, self.prefix_length)

    def decoder(self) -> DecoderConfig:
        """The skeleton's configuration."""
        if self.mask_id < self.vocab_size:
            raise ValueError(
                f"vocab_size {self.vocab_size} is a multiple of 8 and leaves no padded row for the mask token; "
                f"give vocab_size {self.vocab_size + 1}"
            )
        return replace(super().decoder(), prefix_length=self.prefix_length, reserved_ids=(self.mask_id,))


def jrt_360m() -> JRTConfig:
    """JRT-360M-30B: 26 layers, 356.6M parameters."""
    return JRTConfig()


def jrt_1b() -> JRTConfig:
    """JRT-1B-50B: 36 layers, 1.375B parameters."""
    b = based_1b()
    return JRTConfig(
        d_model=b.d_model,
        n_layers=b.n_layers,
        linear_layers=b.linear_layers,
        window_layers=b.window_layers,
        d_hidden=b.d_hidden,
    )
