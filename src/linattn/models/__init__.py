"""The decoder skeleton and the published models built on it."""

from __future__ import annotations

from collections.abc import Callable

from linattn.models.based import BasedConfig, based_1b, based_360m
from linattn.models.decoder import Decoder, DecoderConfig, Output
from linattn.models.jrt import JRTConfig, jrt_1b, jrt_360m
from linattn.models.state import ModelState, map_model_state, model_state_bytes
from linattn.models.transformer import TransformerConfig, transformer_1b, transformer_1b_fast, transformer_360m
from linattn.models.transnormer import (
    TransNormerConfig,
    tnl3_15b,
    transnormer_1b,
    transnormer_3b,
    transnormer_7b,
    transnormer_385m,
)

__all__ = [
    "PUBLISHED",
    "BasedConfig",
    "Decoder",
    "DecoderConfig",
    "JRTConfig",
    "ModelConfig",
    "ModelState",
    "Output",
    "TransNormerConfig",
    "TransformerConfig",
    "build_model",
    "map_model_state",
    "model_state_bytes",
]

ModelConfig = BasedConfig | JRTConfig | TransNormerConfig | TransformerConfig

PUBLISHED: dict[str, Callable[[], ModelConfig]] = {
    f.__name__: f
    for f in (
        based_360m,
        based_1b,
        jrt_360m,
        jrt_1b,
        transformer_360m,
        transformer_1b,
        transformer_1b_fast,
        transnormer_385m,
        transnormer_1b,
        transnormer_3b,
        transnormer_7b,
        tnl3_15b,
    )
}
"""The published sizes by name."""


def build_model(config: ModelConfig) -> Decoder:
    """The model of a configuration, with fresh weights; inside ``with torch.device("meta")`` with none."""
    return Decoder(config.decoder())
