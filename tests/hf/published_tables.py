"""The published checkpoints as their authors wrote them: config.json, and the name and shape of every tensor.

Written from the descriptions of the released files alone. Sizes are arguments, so that a test can have a tiny one.
"""

import math

GPT2_EXTRAS = {
    "model_type": "gpt2",
    "activation_function": "swiglu",
    "layer_norm_epsilon": 1e-05,
    "initializer_range": 0.02,
    "n_positions": 2048,
    "max_position_embeddings": 0,
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_dropout_add_ln": True,
    "use_flash_attn": True,
    "qkv_proj_bias": False,
    "out_proj_bias": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "special_initializer": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "tie_word_embeddings": True,
}
MIXERS = "based.models.mixers."


def rounded(n, multiple):
    return math.ceil(n / multiple) * multiple


def based_config(d=1024, layers=27, heads=16, linear=(1, 6, 11, 16, 21), window=(2, 7, 12, 17, 22), feature_dim=16,
                 window_size=256, vocab=50257):  # fmt: skip
    return {
        **GPT2_EXTRAS,
        "n_embd": d,
        "n_layer": layers,
        "n_head": heads,
        "n_inner": 2 * d,
        "vocab_size": vocab,
        "pad_vocab_size_multiple": 8,
        "rotary_emb_fraction": 1,
        "mixer": {
            "_target_": MIXERS + "convolution.BaseConv",
            "l_max": 2048,
            "use_bias": True,
            "expand_proj": 4,
            "kernel_sizes": [5],  # the published code ignores it
        },
        "alt_mixer": {
            "_target_": MIXERS + "linear_attention.LinearAttention",
            "l_max": 2048,
            "feature_dim": feature_dim,
            "num_heads": heads,
            "parallel_implementation": "fla_parallel",
            "feature_map": {"_target_": MIXERS + "linear_attention.TaylorExp", "input_dim": feature_dim},
        },
        "alt_mixer_2": {
            "_target_": MIXERS + "slide_attention.SlidingAttention",
            "causal": True,
            "window_size": window_size,
            "num_heads": 12,  # the published code overwrites it with n_head
            "layer_idx": layers - 1,
        },
        "alt_mixer_layers": list(linear),
        "alt_mixer_2_layers": list(window),
    }


def jrt_config(enc_length=1024, **sizes):
    config = based_config(**sizes)
    config["alt_mixer"] = {
        "_target_": "src.models.mixers.prefix_linear_attention.PrefixLinearAttention",
        "feature_dim": config["alt_mixer"]["feature_dim"],
        "num_heads": config["n_head"],
        "feature_name": "taylor_exp",
        "num_key_value_heads": config["n_head"],
        "enc_length": enc_length,
        "dec_length": enc_length,
        "implementation": "fla_parallel",
        "use_mask": True,
    }
    return config


def attention_config(d=1024, layers=24, heads=16, vocab=50257):
    return {
        **GPT2_EXTRAS,
        "n_embd": d,
        "n_layer": layers,
        "n_head": heads,
        "n_inner": None,
        "vocab_size": vocab,
        "pad_vocab_size_multiple": 16,
        "rotary_emb_fraction": 0.5,
    }


def transnormer_config(d=1024, layers=24, heads=8, glu=2816, vocab=64000, scaled=True, gate=None):
    config = {
        "model_type": "transnormer",
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "vocab_size": vocab,
        "use_cache": True,
        "init_std": 0.02,
        "decoder_embed_dim": d,
        "decoder_layers": layers,
        "decoder_attention_heads": heads,
        "no_scale_embedding": not scaled,
        "add_bos_token": False,
        "norm_type": "simplermsnorm",
        "linear_use_lrpe_list": [1] + [0] * (layers - 1),
        "hidden_dim": d,
        "linear_act_fun": "swish",
        "glu_dim": glu,
        "bias": False,
    }
    return config if gate is None else {**config, "gate_dim": gate}


def gpt_ends(config, d):
    rows = rounded(config["vocab_size"], config["pad_vocab_size_multiple"])
    return {
        "transformer.embeddings.word_embeddings.weight": (rows, d),
        "transformer.ln_f.weight": (d,),
        "lm_head.weight": (rows, d),
    }


def gpt_block(at, d, hidden):
    return {
        at + "norm1.weight": (d,),
        at + "norm2.weight": (d,),
        at + "mlp.fc1.weight": (2 * hidden, d),
        at + "mlp.fc2.weight": (d, hidden),
        at + "mixer.out_proj.weight": (d, d),
    }


def based_shapes(config, jrt=False):
    d, features = config["n_embd"], config["alt_mixer"]["num_heads"] * config["alt_mixer"]["feature_dim"]
    shapes = gpt_ends(config, d)
    for i in range(config["n_layer"]):
        at = f"transformer.layers.{i}."
        shapes |= gpt_block(at, d, rounded(config["n_inner"], 256))
        at += "mixer."
        if i in config["alt_mixer_2_layers"]:
            shapes |= {at + "Wqkv.weight": (3 * d, d)}
        elif i in config["alt_mixer_layers"]:
            shapes |= {at + "proj_q.weight": (features, d), at + "proj_k.weight": (features, d)}
            shapes |= {at + "proj_v.weight": (d, d)}
            shapes |= {at + "proj_k_enc.weight": (features, d), at + "proj_v_enc.weight": (d, d)} if jrt else {}
        else:
            shapes |= {at + "in_proj.weight": (4 * d, d), at + "in_proj.bias": (4 * d,)}
            shapes |= {at + "conv.conv.weight": (2 * d, 1, 3)}
            shapes |= {at + "out_proj.weight": (d, 2 * d), at + "out_proj.bias": (d,)}
    return shapes


def jrt_shapes(config):
    return based_shapes(config, jrt=True)


def attention_shapes(config, multiple=256):
    d = config["n_embd"]
    shapes = gpt_ends(config, d)
    for i in range(config["n_layer"]):
        at = f"transformer.layers.{i}."
        shapes |= gpt_block(at, d, rounded(int(8 * d / 3), multiple)) | {at + "mixer.Wqkv.weight": (3 * d, d)}
    return shapes


def transnormer_shapes(config):
    d, hidden, glu, gate = (config.get(n) for n in ("decoder_embed_dim", "hidden_dim", "glu_dim", "gate_dim"))
    heads = config["decoder_attention_heads"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], d), "lm_head.weight": (config["vocab_size"], d)}
    for i in range(config["decoder_layers"]):
        at = f"model.layers.{i}.token_mixer."
        if gate is None:
            shapes |= {at + "qkvu_proj.weight": (4 * hidden, d)}
        else:
            shapes |= {at + "qkv_proj.weight": (3 * hidden, d)}
            shapes |= {at + "output_gate.0.weight": (gate, d), at + "output_gate.1.weight": (hidden, gate)}
        if config["linear_use_lrpe_list"][i]:
            shapes |= {at + "lrpe.theta": (heads, 1, hidden // heads)}
        shapes |= {at + "out_proj.weight": (d, hidden)}
        at = f"model.layers.{i}.channel_mixer."
        shapes |= {at + "l1.weight": (glu, d), at + "l2.weight": (glu, d), at + "l3.weight": (d, glu)}
    return shapes


BASED_1B = {"d": 1792, "layers": 36, "linear": (1, 6, 11, 16, 21, 27, 33), "window": (2, 7, 12, 17, 22, 28, 34)}

RELEASED = {
    "hazyresearch/based-360m": ("based_360m", based_config(), based_shapes),
    "hazyresearch/based-1b": ("based_1b", based_config(**BASED_1B), based_shapes),
    "hazyresearch/based-1b-50b": ("based_1b", based_config(**BASED_1B), based_shapes),
    "hazyresearch/JRT-360M-30B": ("jrt_360m", jrt_config(layers=26), jrt_shapes),
    "hazyresearch/JRT-1B-50B": ("jrt_1b", jrt_config(**BASED_1B), jrt_shapes),
    "hazyresearch/attn-360m": ("transformer_360m", attention_config(), attention_shapes),
    "hazyresearch/attn-1b": (
        "transformer_1b",
        attention_config(d=1680, layers=36, heads=24),
        lambda config: attention_shapes(config, multiple=128),
    ),
    "hazyresearch/attn-1b-50bn": (
        "transformer_1b",
        attention_config(d=1680, layers=36, heads=24),
        lambda config: attention_shapes(config, multiple=128),
    ),
    "OpenNLPLab/TransNormerLLM-385M": ("transnormer_385m", transnormer_config(), transnormer_shapes),
    "OpenNLPLab/TransNormerLLM-1B": (
        "transnormer_1b",
        transnormer_config(d=2048, layers=16, heads=16, glu=5632),
        transnormer_shapes,
    ),
    "OpenNLPLab/TransNormerLLM-7B": (
        "transnormer_7b",
        transnormer_config(d=4096, layers=30, heads=32, glu=11008),
        transnormer_shapes,
    ),
    "TNL2-3B-300B": (
        "transnormer_3b",
        transnormer_config(d=2560, layers=32, heads=20, glu=6912, scaled=False),
        transnormer_shapes,
    ),
    "TNL3-15B": (
        "tnl3_15b",
        transnormer_config(d=5120, layers=42, heads=40, glu=15360, vocab=100280, gate=16),
        transnormer_shapes,
    ),
}
"""Released names, the published size they are here, their config.json and their shape table."""
