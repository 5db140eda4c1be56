"""TransNormerLLM as OpenNLPLab publishes it: TNL1 and TNL2 (385M, 1B, 3B, 7B) and the gated TNL3 (15B).

Rows of qkvu_proj are q, k, v, u, as here. The decays are no tensors of the file: the published code makes them from
the number of heads and of layers, and so do the models here (mixers/lightning/slopes.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from linattn.models import TransNormerConfig
from linattn.models.published.fields import Shapes, check_layers, flags, refuse_others, size

DROPPED = (r".*metrics.*",)

PREFIX, LAYERS = "model.", "layers."

SUPPORTED = {"norm_type": "simplermsnorm", "bias": False}


def claims(config: Mapping[str, Any]) -> bool:
    """A configuration of Metaseq's field names."""
    return "decoder_embed_dim" in config and "decoder_layers" in config


def read(config: Mapping[str, Any], shapes: Shapes) -> TransNormerConfig:
    """The model of a config.json beside tensors of these shapes.

    Raises:
        ValueError: a field that is missing, no size, or asks for what the models here do not have.
    """
    refuse_others(config, SUPPORTED)
    if config.get("linear_act_fun", "silu") not in ("silu", "swish"):
        raise ValueError(f"config.json: linear_act_fun is {config['linear_act_fun']!r}; only silu, or swish, is read")
    n_layers, n_heads = size(config, "decoder_layers"), size(config, "decoder_attention_heads")
    check_layers(n_layers, shapes, LAYERS)
    d_model = size(config, "decoder_embed_dim")
    hidden = size(config, "hidden_dim", d_model)
    if hidden % n_heads:
        raise ValueError(f"config.json: hidden_dim {hidden} is not a multiple of decoder_attention_heads {n_heads}")
    lrpe = flags(config, "linear_use_lrpe_list")
    if len(lrpe) != n_layers:
        raise ValueError(f"config.json: linear_use_lrpe_list has {len(lrpe)} entries for {n_layers} layers")
    no_scale = config.get("no_scale_embedding")
    if not isinstance(no_scale, bool):
        raise ValueError(f"config.json: no_scale_embedding is {no_scale!r}; it must be true or false")
    gated = any(name.endswith(".token_mixer.qkv_proj.weight") for name in shapes)
    return TransNormerConfig(
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        head_dim=hidden // n_heads,
        d_hidden=d_model if config.get("glu_dim") == -1 else size(config, "glu_dim"),
        vocab_size=size(config, "vocab_size"),
        lrpe_layers=tuple(i for i, used in enumerate(lrpe) if used),
        form="tnl3" if gated else "tnl",
        gate_dim=size(config, "gate_dim") if gated else TransNormerConfig.gate_dim,
        scale_embedding=not no_scale,
    )


def published(name: str) -> str:
    """The published name of the tensor called ``name`` here, without the leading "model."."""
    if name == "embedding.weight":
        return "embed_tokens.weight"
    _, layer, part, rest = name.split(".", 3)
    return f"{LAYERS}{layer}.{ {'mixer': 'token_mixer', 'mlp': 'channel_mixer'}[part] }.{rest}"
