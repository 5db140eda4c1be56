"""The state of a whole model: what every layer keeps of the tokens it has read, and how many they were."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from linattn.core.mixer import map_state, state_bytes


class ModelState(NamedTuple):
    """What a model remembers of N documents.

    tokens: int64 [N], how many it has read. layers: one State a layer, each with N rows.
    """

    tokens: Tensor
    layers: tuple[Any, ...]


def model_state_bytes(state: ModelState) -> int:
    """Bytes that a model's state holds, all layers, all rows."""
    return state_bytes((state.tokens,)) + sum(state_bytes(layer) for layer in state.layers)


def map_model_state(function: Any, *states: ModelState) -> ModelState:
    """``function`` of every tensor of the states, leaf by leaf."""
    layers = zip(*(s.layers for s in states), strict=True)
    return ModelState(function(*(s.tokens for s in states)), tuple(map_state(function, *leaf) for leaf in layers))
