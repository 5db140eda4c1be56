"""What a model costs: parameters, bytes of state, FLOPs a token. Counted on the meta device: nothing is allocated."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from linattn.core.mixer import state_bytes
from linattn.mixers.softmax.layer import SoftmaxConfig
from linattn.models.decoder import Decoder, DecoderConfig


class Costs(NamedTuple):
    """Of one model, for one sequence.

    parameters: tied weights once. weight_flops: FLOPs a token in matrix products with weights (two a parameter used).
    state_flops: FLOPs a token in reading and adding to the states in decoding; softmax layers at ``tokens`` tokens.
    state_bytes: bytes of state that do not grow. growing_bytes: bytes a token that do (key-value caches).
    kv_cache_bytes: bytes a token that the same width and depth would keep if every layer were attention.
    """

    parameters: int
    weight_flops: int
    state_flops: int
    state_bytes: int
    growing_bytes: int
    kv_cache_bytes: int


def model_costs(config: DecoderConfig, dtype: torch.dtype = torch.float32, tokens: int = 0) -> Costs:
    """Count a model's costs, weights and caches in ``dtype`` (sums in States are fp32 whatever it is)."""
    with torch.device("meta"):
        model = Decoder(config).to(dtype)
    embedding = model.embedding.weight.numel()
    parameters = sum(p.numel() for p in model.parameters())
    used = parameters if config.tie_embeddings else parameters - embedding
    item = torch.empty((), dtype=dtype).element_size()
    fixed = growing = flops = 0
    for mixer, block in zip(config.mixers, model.blocks, strict=True):
        layer: Any = block.mixer
        if isinstance(mixer, SoftmaxConfig):
            widths = [math.prod(leaf.shape[2:]) for leaf in layer.identity(1)[:2]]
            growing += sum(widths) * item
            flops += 2 * sum(widths) * tokens
        else:
            state = layer.identity(1)
            fixed += state_bytes(state)
            flops += 4 * sum(leaf.numel() for leaf in state if leaf.is_floating_point())
    cache = 2 * len(config.mixers) * config.d_model * item
    return Costs(parameters, 2 * used, flops, fixed, growing, cache)
