"""`LinattnForCausalLM`: `linattn.models.Decoder` behind the interface that transformers expects of a causal model.

All that is particular to a model is in its Decoder; this file translates calls. See docs/transformers.md.

    pytest tests/hf
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from linattn.hf.cache import LinattnCache
from linattn.hf.configuration import STUB, LinattnConfig
from linattn.hf.inputs import document_lengths, given_prefix, packed_documents, padding_mask
from linattn.models import Decoder, ModelConfig, build_model

logger = logging.get_logger(__name__)

_STUB_TEXT = '''"""The model is in the package linattn: pip install 'linattn[hf]'."""
from linattn.hf import LinattnConfig, LinattnForCausalLM
'''


class LinattnForCausalLM(PreTrainedModel, GenerationMixin):
    """A linattn model for transformers: generate, pipeline, Trainer and PEFT take it as any other causal model.

    ``model`` is the `Decoder`; everything of linattn (generate, snapshots, evaluation) works on it directly.
    """

    config_class = LinattnConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _is_stateful = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers' own form)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_context_parallel = False
    _fsdp_plan = {"model.blocks.*": "free_full_weight"}  # noqa: RUF012

    def __init__(self, config: LinattnConfig):
        super().__init__(config)
        self.model = build_model(config.model_config())
        if not self.model.embedding.weight.is_meta:
            for module in self.model.modules():
                module._is_hf_initialized = True  # pyright: ignore  (the Decoder has drawn its weights)
        self.post_init()

    @classmethod
    def from_decoder(cls, model: Decoder, config: ModelConfig) -> LinattnForCausalLM:
        """Wrap a model that there is already; the weights are shared, not copied.

        Raises:
            ValueError: ``config`` is another model's.
        """
        if config.decoder() != model.config:
            raise ValueError("from_decoder: config is not the configuration that this model was built from")
        with torch.device("meta"):
            wrapped = cls(LinattnConfig(model=config))
        wrapped.model = model
        wrapped.config.dtype = model.embedding.weight.dtype
        return wrapped.train(model.training)

    def _init_weights(self, module: nn.Module) -> None:
        """Draw weights that a checkpoint lacks (transformers warns of them), and rebuild what no checkpoint holds."""
        reset = getattr(module, "reset_buffers", None)
        if callable(reset):
            reset()
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=self.model.config.init_std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif module not in (self, self.model) and hasattr(module, "reset_parameters"):
            cast(Any, module).reset_parameters()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.model.embedding = cast(Any, value)

    def get_output_embeddings(self) -> None:
        """None: the head is not a Linear. With tied embeddings it has no weight of its own."""
        return

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """Refused, but for the size there is."""
        if new_num_tokens not in (None, self.config.vocab_size):
            raise ValueError(
                f"this model has {self.config.vocab_size} tokens and cannot be resized to {new_num_tokens}; build it "
                "with that vocab_size and copy the weights"
            )
        return self.model.embedding

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether training recomputes each block in the backward pass."""
        return self.model.checkpoint_blocks

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, every_n_layers: int = 1
    ) -> None:
        # The Decoder checkpoints its blocks itself, never re-entrantly.
        if every_n_layers != 1:
            raise ValueError(f"every_n_layers={every_n_layers}: linattn models checkpoint every block; leave it out")
        self.model.checkpoint_blocks = enable

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LinattnCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        prefix_length: int | Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Read tokens int64 [B, T].

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, T] or [B, columns read + T], 0 on pads, wherever they are; or a dict of masks by layer
                type. Padding is exact. The logits of pads mean nothing.
            position_ids: int64 [B, T], and needed only to pack documents: where they begin anew at 0, so does the
                State. Otherwise the model counts for itself.
            past_key_values: what was read before; it is rewritten.
            labels: int64 [B, T], -100 ignored; shifted here, as in all of transformers.
            use_cache: whether to return a cache; None: outside training, if the configuration says so.
            logits_to_keep: how many last positions get logits (0: all), or which.
            prefix_length: JRT-RNN alone: how many first tokens are read without causality, an int or int64 [B]. None
                is min(the model's, the prompt) in a call with an empty cache (what generate does), and 0 in any
                other: there the tokens to be predicted are part of the input, and a prefix would show them.
            num_items_in_batch: the Trainer's; the loss is summed and divided by it.
            inputs_embeds, output_attentions, output_hidden_states: refused.

        Raises:
            ValueError: arguments that do not fit one another, with the fix.
        """
        tokens = _checked(input_ids, inputs_embeds, past_key_values, output_attentions, output_hidden_states)
        cache = past_key_values
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        read = 0 if cache is None else cache.get_seq_length()
        mask = padding_mask(attention_mask, tokens, read)
        cu_seqlens = None
        if position_ids is not None and tokens.shape[1] > 1:
            cu_seqlens = packed_documents(position_ids, tokens.shape, mask, read)  # pyright: ignore[reportCallIssue]
            use_cache = use_cache and cu_seqlens is None
        keep = use_cache or cache is not None
        prefix = self._prefix_lengths(prefix_length, cache, document_lengths(tokens, mask, cu_seqlens))
        out = self.model(
            tokens if cu_seqlens is None else tokens.reshape(1, -1),
            state=None if cache is None else cache.state,
            mask=mask,
            cu_seqlens=cu_seqlens,
            prefix_lengths=prefix,
            logits="none",
            return_state=keep,
        )
        if keep:
            cache = LinattnCache() if cache is None else cache
            cache.advance(out.state, tokens.shape[1])
        hidden = out.hidden.view(*tokens.shape, -1)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.logits(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
        return CausalLMOutputWithPast(loss=loss, logits=cast(Any, logits), past_key_values=cache if keep else None)

    def _prefix_lengths(self, given: int | Tensor | None, cache: LinattnCache | None, lengths: Tensor) -> Tensor | None:
        longest = self.model.config.prefix_length
        nothing = given is None or (isinstance(given, int) and given == 0)
        if not longest:
            if not nothing:
                raise ValueError("prefix_length given, but this model has no prefix layers; leave it out")
            return None
        if cache is not None and cache.get_seq_length():
            if not nothing:
                raise ValueError(
                    "prefix_length belongs to the start of a text, and this call goes on from a cache; leave it out"
                )
            return None
        if given is not None:
            return given_prefix(given, lengths, longest)
        if cache is not None:
            return lengths.clamp(max=longest)
        logger.warning_once(
            "A prefix model was called without prefix_length and without a cache: it reads the text causally, "
            "prefix_length=0. generate chooses the prefix by itself; in training and scoring give prefix_length, at "
            "most the tokens before the first that is to be predicted."
        )
        return None

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """transformers' own, less prefix_length once the cache holds something."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)  # pyright: ignore
        cache = inputs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            inputs.pop("prefix_length", None)
        return inputs

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        # The whole prompt is known here and nowhere later: chunks must not each take a prefix of their own, and
        # without a cache the tokens written so far must not become part of it.
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        started = cache is not None and cache.get_seq_length() > 0
        longest = self.model.config.prefix_length
        if started and model_kwargs.get("prefix_length") is not None:
            raise ValueError("generate: prefix_length belongs to the start of a text, and the cache goes on from one")
        if longest and not started and model_kwargs.get("prefix_length") is None:
            model_kwargs["prefix_length"] = document_lengths(input_ids, mask, None).clamp(max=longest)
        if cache is not None and started and generation_config.prefill_chunk_size is not None:
            # transformers 5.17 would read the whole history again.
            width = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
            new = input_ids[:, cache.get_seq_length() :] if width == input_ids.shape[1] else input_ids
            return self._go_on(new, mask, cache, generation_config.prefill_chunk_size)
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)  # pyright: ignore

    def _go_on(self, tokens: Tensor, mask: Tensor | None, cache: LinattnCache, chunk: int) -> Any:
        pieces = tokens.split(chunk, 1)
        masks = [None] * len(pieces) if mask is None else mask[:, -tokens.shape[1] :].split(chunk, 1)
        out = None
        for piece, real in zip(pieces, masks, strict=True):
            out = self(piece, attention_mask=real, past_key_values=cache, logits_to_keep=1, return_dict=True)
        return out

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        # transformers' dynamic, static and offloaded caches are all this one: nothing in it grows but softmax keys.
        if generation_config.cache_implementation == "quantized":
            raise ValueError(
                "cache_implementation='quantized': States are sums in fp32 and not quantized; leave it out"
            )
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            _check_cache(cache)
            cache._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = LinattnCache()

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModelForCausalLM") -> None:
        """Nothing: transformers would copy this source file into every folder; `save_pretrained` writes the stub."""

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, save_directory: Any, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """transformers' own, and a two-line module for ``trust_remote_code=True``."""
        if is_main_process:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            (Path(save_directory) / f"{STUB}.py").write_text(_STUB_TEXT, encoding="utf-8")
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)


def _checked(input_ids: Any, inputs_embeds: Any, cache: Any, attentions: Any, hidden_states: Any) -> Tensor:
    if inputs_embeds is not None or input_ids is None:
        raise ValueError("linattn models read input_ids; inputs_embeds is not supported")
    if attentions or hidden_states:
        raise ValueError(
            "output_attentions and output_hidden_states are not supported: these models have no attention matrix; "
            "for hidden states put forward hooks on model.model.blocks"
        )
    if cache is not None:
        _check_cache(cache)
    return input_ids


def _check_cache(cache: Any) -> None:
    if not isinstance(cache, LinattnCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}; linattn models keep States: give a "
            "linattn.hf.LinattnCache(), or use_cache=True and none"
        )
