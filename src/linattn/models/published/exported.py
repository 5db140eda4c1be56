"""What `linattn export` writes for transformers: config.json with our own dials under ``model``, our own names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from linattn.core.config import from_data
from linattn.models import ModelConfig
from linattn.models.published.fields import Shapes, check_layers, nested, size

DROPPED = ()

PREFIX, LAYERS = "model.", "blocks."


def claims(config: Mapping[str, Any]) -> bool:
    """A configuration of `linattn.hf`."""
    return config.get("model_type") == "linattn"


def read(config: Mapping[str, Any], shapes: Shapes) -> ModelConfig:
    """The model of a config.json beside tensors of these shapes.

    Raises:
        ValueError: a dial that the model does not have, of a wrong type, or no size.
    """
    dials = nested(config, "model")
    for name, value in dials.items():
        if isinstance(value, int) and not isinstance(value, bool):
            size(dials, name)
    model = from_data(cast(Any, ModelConfig), dials, where="config.json: model")
    check_layers(model.n_layers, shapes, LAYERS)
    return model


def published(name: str) -> str:
    """The name of the tensor called ``name`` here: the same, behind `PREFIX`."""
    return name
