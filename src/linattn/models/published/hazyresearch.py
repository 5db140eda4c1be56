"""Based, JRT-RNN and the attention baseline as hazyresearch publishes them: GPT-2 configurations with extras.

``_target_`` in these files names Python classes to import. Nothing is imported: the two lists of layers say what each
layer is. All three keep value before gate in fc1, and q, k, v rows in Wqkv, as the models here do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from linattn.models import BasedConfig, JRTConfig, ModelConfig, TransformerConfig
from linattn.models.published.fields import Shapes, check_layers, flags, nested, refuse_others, size

DROPPED = (r".*metrics.*", r"(.*\.)?decay\.decay", r".*\.inv_freq")
"""Training counters, the decay that the released code builds and does not use, and rotary tables."""

PREFIX, LAYERS = "", "transformer.layers."

SUPPORTED = {
    "rms_norm": True,
    "prenorm": True,
    "parallel_block": False,
    "layer_norm_epsilon": 1e-5,
    "rotary_emb_base": 10000,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}

MULTIPLES = (256, 128)
"""What the hidden width of the SwiGLU was rounded up to: 256, and 128 in attn-1b, whose config.json does not say so."""


def claims(config: Mapping[str, Any]) -> bool:
    """A GPT-2 configuration."""
    return "n_embd" in config and "n_layer" in config


def read(config: Mapping[str, Any], shapes: Shapes) -> ModelConfig:
    """The model of a config.json beside tensors of these shapes.

    Raises:
        ValueError: a field that is missing, no size, or asks for what the models here do not have.
    """
    if config.get("activation_function") != "swiglu":
        raise ValueError(
            f"config.json: activation_function is {config.get('activation_function')!r}; the hazyresearch models have "
            "'swiglu' (a plain GPT-2 loads through transformers)"
        )
    refuse_others(config, SUPPORTED)
    check_layers(size(config, "n_layer"), shapes, LAYERS)
    if config.get("alt_mixer_layers") is None:
        return _attention(config, shapes)
    return _based(config, shapes)


def published(name: str) -> str:
    """The published name of the tensor called ``name`` here."""
    top = {
        "embedding.weight": "transformer.embeddings.word_embeddings.weight",
        "norm.weight": "transformer.ln_f.weight",
    }
    if name in top:
        return top[name]
    _, layer, rest = name.split(".", 2)
    inner = {
        "mixer_norm.weight": "norm1.weight",
        "mlp_norm.weight": "norm2.weight",
        "mixer.conv.weight": "mixer.conv.conv.weight",
    }
    return f"{LAYERS}{layer}.{inner.get(rest, rest)}"


def _attention(config: Mapping[str, Any], shapes: Shapes) -> TransformerConfig:
    d_model = size(config, "n_embd")
    fraction = config.get("rotary_emb_fraction")
    if not isinstance(fraction, int | float) or not 0 <= fraction <= 1:
        raise ValueError(f"config.json: rotary_emb_fraction is {fraction!r}; it must be a number of 0 to 1")
    return TransformerConfig(
        d_model=d_model,
        n_layers=size(config, "n_layer"),
        n_heads=size(config, "n_head"),
        n_kv_heads=_n_kv_heads(config),
        rotary_fraction=float(fraction),
        d_hidden=_d_hidden(size(config, "n_inner", 8 * d_model // 3), shapes),
        vocab_size=size(config, "vocab_size"),
    )


def _n_kv_heads(config: Mapping[str, Any]) -> int | None:
    name = next((n for n in ("num_head_kv", "n_head_kv") if config.get(n) is not None), None)
    return None if name is None else size(config, name)


def _based(config: Mapping[str, Any], shapes: Shapes) -> BasedConfig:
    refuse_others(config, {"rotary_emb_fraction": 1})
    linear, window, conv = (nested(config, name) for name in ("alt_mixer", "alt_mixer_2", "mixer"))
    window_layers = flags(config, "alt_mixer_2_layers")
    n_heads, feature_dim = size(config, "n_head"), size(linear, "feature_dim")
    _check_linear(linear, n_heads, feature_dim)
    sizes: dict[str, Any] = {
        "d_model": size(config, "n_embd"),
        "n_layers": size(config, "n_layer"),
        "n_heads": n_heads,
        "feature_dim": feature_dim,
        # The code halves it, and FlashAttention's window of (128, 0) does not count the token itself.
        "window": size(window, "window_size") // 2 + 1,
        # A layer in both lists is a window layer: the published code looks there first.
        "linear_layers": tuple(i for i in flags(config, "alt_mixer_layers") if i not in window_layers),
        "window_layers": tuple(window_layers),
        "d_hidden": _d_hidden(size(config, "n_inner"), shapes),
        "conv_expand": size(conv, "expand_proj", 4),
        # Published files say kernel_sizes, which the published code ignores.
        "conv_kernel": size(conv, "kernel_size", 3),
        "vocab_size": size(config, "vocab_size"),
    }
    if any(name.endswith(".proj_k_enc.weight") for name in shapes):
        return JRTConfig(**sizes, prefix_length=size(linear, "enc_length", size(config, "enc_length", 1024)))
    return BasedConfig(**sizes)


def _check_linear(linear: Mapping[str, Any], n_heads: int, feature_dim: int) -> None:
    if size(linear, "num_heads") != n_heads:
        raise ValueError(
            f"config.json: alt_mixer.num_heads is {linear['num_heads']} and n_head {n_heads}; here linear attention "
            "and windows have equally many heads"
        )
    refuse_others(linear, {"feature_name": "taylor_exp"})
    feature_map = linear.get("feature_map")
    if feature_map is None:
        return
    target = str(nested(linear, "feature_map").get("_target_", "TaylorExp"))
    if target.rpartition(".")[2] != "TaylorExp" or feature_map.get("input_dim", feature_dim) != feature_dim:
        raise ValueError(
            f"config.json: alt_mixer.feature_map is {feature_map!r}; only TaylorExp of {feature_dim} is read"
        )


def _d_hidden(inner: int, shapes: Shapes) -> int:
    rounded = [-(-inner // multiple) * multiple for multiple in MULTIPLES]
    rows = shapes.get(LAYERS + "0.mlp.fc1.weight", (0,))[:1]
    return next((n for n in rounded if rows == (2 * n,)), inner if rows == (2 * inner,) else rounded[0])
