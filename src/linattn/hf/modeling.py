"""`LinattnForCausalLM`: `linattn.models.Decoder` behind the interface that transformers expects of a causal model.

All that is particular to a model is in its Decoder; this file translates calls. See docs/transformers.md.

    pytest tests/hf
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from linattn.hf.cache import LinattnCache, check_cache
from linattn.hf.configuration import STUB, LinattnConfig
from linattn.hf.generation import LinattnGenerationMixin
from linattn.hf.inputs import document_lengths, given_prefix, packed_documents, padding_mask
from linattn.models import Decoder, ModelConfig, ModelState, build_model

logger = logging.get_logger(__name__)

_STUB_TEXT = '''"""The model is in the package linattn: pip install 'linattn[hf]'."""
from linattn.hf import LinattnConfig, LinattnForCausalLM
'''


class LinattnForCausalLM(PreTrainedModel, LinattnGenerationMixin):
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
        """Read tokens int64 [B, T], or the vectors that stand for them.

        Args:
            input_ids: int64 [B, T].
            inputs_embeds: [B, T, d_model] in their place, as `get_input_embeddings` returns them.
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
            output_hidden_states: whether to return [B, T, d_model] before each block, which is the residual stream
                (fp32 where the weights are 16-bit), and then the final norm's output; None: as the configuration says.
            output_attentions: refused.

        Raises:
            ValueError: arguments that do not fit one another, with the fix.
        """
        _check(input_ids, inputs_embeds, self.config.hidden_size, past_key_values, output_attentions)
        given = cast(Tensor, input_ids if inputs_embeds is None else inputs_embeds)
        documents = self._documents(given, attention_mask, position_ids, prefix_length, past_key_values)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        cache = past_key_values
        if cache is None and use_cache and documents["cu_seqlens"] is None:
            cache = LinattnCache()
        hidden, hidden_states = self._read(given, documents, cache, bool(output_hidden_states))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.logits(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
        return CausalLMOutputWithPast(
            loss=loss, logits=cast(Any, logits), past_key_values=cache, hidden_states=cast(Any, hidden_states)
        )

    def _documents(
        self,
        given: Tensor,
        attention_mask: Any,
        position_ids: Tensor | None,
        prefix_length: int | Tensor | None,
        cache: LinattnCache | None,
    ) -> dict[str, Tensor | None]:
        """Which of the tokens or vectors ``given`` [B, T, ...] are real, and whose: arguments of `Decoder.forward`."""
        read = 0 if cache is None else cache.get_seq_length()
        mask = padding_mask(attention_mask, given, read)
        cu_seqlens = None
        if position_ids is not None and given.shape[1] > 1:
            cu_seqlens = packed_documents(position_ids, given.shape[:2], mask, cache is not None)  # pyright: ignore[reportCallIssue]
        prefix = self._prefix_lengths(prefix_length, cache, document_lengths(given, mask, cu_seqlens))
        return {"mask": mask, "cu_seqlens": cu_seqlens, "prefix_lengths": prefix}

    def _read(
        self, given: Tensor, documents: dict[str, Tensor | None], cache: LinattnCache | None, record: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """hidden [B, T, d_model] of ``given`` [B, T, ...], and if ``record`` its hidden states. The cache goes on."""
        out = self.model(
            given if documents["cu_seqlens"] is None else given.flatten(0, 1)[None],
            **documents,
            state=None if cache is None else cache.state,
            logits="none",
            return_state=cache is not None,
            return_hidden_states=record,
        )
        if cache is not None:
            cache.advance(cast(ModelState, out.state), given.shape[1])
        hidden = out.hidden.view(*given.shape[:2], -1)
        return hidden, None if out.hidden_states is None else tuple(x.view(hidden.shape) for x in out.hidden_states)

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


def _check(input_ids: Any, inputs_embeds: Any, width: int, cache: Any, attentions: Any) -> None:
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds")
    if input_ids is not None and input_ids.is_floating_point():
        raise ValueError(f"input_ids must be int64 [B, T], got {input_ids.dtype}; give vectors as inputs_embeds")
    if inputs_embeds is not None and (
        inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != width or not inputs_embeds.is_floating_point()
    ):
        raise ValueError(
            f"inputs_embeds must be vectors [B, T, {width}], as model.get_input_embeddings() returns them; got "
            f"{inputs_embeds.dtype} {list(inputs_embeds.shape)}"
        )
    if attentions:
        raise ValueError("output_attentions is not supported: most layers of these models have no attention matrix")
    if cache is not None:
        check_cache(cache)
