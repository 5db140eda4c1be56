"""The configuration of a linattn model as transformers keeps it: config.json with our own dials under ``model``.

pytest tests/hf/test_hf_save.py
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, cast

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from linattn.core.config import from_data, to_data
from linattn.models import BasedConfig, DecoderConfig, ModelConfig
from linattn.models.decoder import SoftmaxConfig, WindowConfig

STUB = "modeling_linattn"
"""The module that `LinattnForCausalLM.save_pretrained` writes beside the weights, for ``trust_remote_code=True``."""


@strict
class LinattnConfig(PreTrainedConfig):
    """Any of linattn's models: ``LinattnConfig(model=BasedConfig(d_model=256, ...))``.

    Args:
        model: a BasedConfig, JRTConfig, TransNormerConfig or TransformerConfig, or its data as in config.json, whose
            key ``type`` names the class. None is BasedConfig(), the 360M model.
        use_cache: whether a call outside training returns a `LinattnCache` unless told otherwise.

    transformers' own names (hidden_size, num_hidden_layers, layer_types, ...) are read from ``model`` and cannot be
    set. `ValueError` for a dial that the class does not have, or of a wrong type.
    """

    model_type: ClassVar[str] = "linattn"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    model: Any = None
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.model = to_data(_model_config(self.model))
        super().__post_init__(**kwargs)
        # After super: a loaded file's entries come back with the folder's name in front, which must not be saved again.
        self.auto_map = {
            "AutoConfig": f"{STUB}.LinattnConfig",
            "AutoModelForCausalLM": f"{STUB}.LinattnForCausalLM",
        }

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: see `LinattnForCausalLM.register_for_auto_class`."""

    def model_config(self) -> ModelConfig:
        """The dials as linattn's own dataclass."""
        return _model_config(self.model)

    def decoder_config(self) -> DecoderConfig:
        """What `linattn.models.Decoder` is built from."""
        return self.model_config().decoder()

    @property
    def layer_types(self) -> list[str]:
        """A name a layer, of those that transformers knows; every layer of constant state is "linear_attention".

        Short convolutions too: "conv" is on the list, but transformers rewrites it for models outside its own tree.
        """
        kinds = {SoftmaxConfig: "full_attention", WindowConfig: "sliding_attention"}
        return [kinds.get(cast(Any, type(mixer)), "linear_attention") for mixer in self.decoder_config().mixers]

    @property
    def sliding_window(self) -> int | None:
        """Keys that a window layer sees, itself included; None for models without such layers."""
        return next((m.window for m in self.decoder_config().mixers if isinstance(m, WindowConfig)), None)

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the head is the embedding's table; there is then one tensor, not two that are tied."""
        return self.decoder_config().tie_embeddings

    @property
    def prefix_length(self) -> int:
        """JRT-RNN: the longest prefix, in tokens, read without causality; 0 for all other models."""
        return self.decoder_config().prefix_length

    @property
    def vocab_size(self) -> int:
        """Token ids."""
        return self.model["vocab_size"]

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream, d_model."""
        return self.model["d_model"]

    @property
    def intermediate_size(self) -> int:
        """Width of the MLP, d_hidden."""
        return self.model["d_hidden"]

    @property
    def num_hidden_layers(self) -> int:
        """Blocks, n_layers."""
        return self.model["n_layers"]

    @property
    def num_attention_heads(self) -> int:
        """Heads, n_heads."""
        return self.model["n_heads"]

    @property
    def num_key_value_heads(self) -> int:
        """Heads of keys and values."""
        return self.model.get("n_kv_heads") or self.model["n_heads"]


def _model_config(model: Any) -> ModelConfig:
    if model is None:
        return BasedConfig()
    if dataclasses.is_dataclass(model):
        model = to_data(model)
    if not isinstance(model, dict) or "type" not in model:
        raise ValueError(
            'LinattnConfig.model must be a BasedConfig or its kin, or their data with the key "type", '
            f"for example {{'type': 'BasedConfig', 'd_model': 256}}; got {model!r}"
        )
    return from_data(cast(Any, ModelConfig), model, where="LinattnConfig.model")
