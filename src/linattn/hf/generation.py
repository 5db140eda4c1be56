"""What transformers' generate must know of a linattn model: its cache, its prefix, and how to read a prompt in chunks.

pytest tests/hf/test_hf_generate.py
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import GenerationMode

from linattn.hf.cache import LinattnCache, check_cache
from linattn.hf.inputs import document_lengths


class LinattnGenerationMixin(GenerationMixin):
    """`GenerationMixin` for `LinattnForCausalLM`."""

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """transformers' own, less prefix_length once the cache holds something."""
        # generate looks for the name inputs_embeds in this signature before it takes any.
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)  # pyright: ignore
        cache = inputs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            inputs.pop("prefix_length", None)
        return inputs

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        # The whole prompt is known here and nowhere later: chunks must not each take a prefix of their own, and
        # without a cache the tokens written so far must not become part of it.
        cache, mask, embeds = (model_kwargs.get(k) for k in ("past_key_values", "attention_mask", "inputs_embeds"))
        prompt = input_ids if embeds is None else embeds
        read = 0 if cache is None else cache.get_seq_length()
        longest = self.config.prefix_length  # pyright: ignore
        if read and model_kwargs.get("prefix_length") is not None:
            raise ValueError("generate: prefix_length belongs to the start of a text, and the cache goes on from one")
        if longest and not read and model_kwargs.get("prefix_length") is None:
            model_kwargs["prefix_length"] = document_lengths(prompt, mask, None).clamp(max=longest)
        if cache is not None and generation_config.prefill_chunk_size is not None and (read or embeds is not None):
            # transformers 5.17 would read the whole history again, and cuts no inputs_embeds.
            width = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
            unread = prompt[:, read:] if embeds is not None or width == prompt.shape[1] else prompt
            return self._read_in_chunks(unread, generation_config.prefill_chunk_size, model_kwargs)
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)  # pyright: ignore

    def _read_in_chunks(self, prompt: Tensor, chunk: int, model_kwargs: dict[str, Any]) -> Any:
        cache, mask = model_kwargs["past_key_values"], model_kwargs.get("attention_mask")
        pieces = prompt.split(chunk, 1)
        masks = [None] * len(pieces) if mask is None else mask[:, -prompt.shape[1] :].split(chunk, 1)
        options = {k: model_kwargs[k] for k in ("prefix_length", "output_hidden_states") if k in model_kwargs}
        options |= {"past_key_values": cache, "logits_to_keep": 1, "return_dict": True}
        out: Any = None
        for piece, real in zip(pieces, masks, strict=True):
            tokens = {"inputs_embeds" if piece.is_floating_point() else "input_ids": piece}
            out = self(**tokens, **options, attention_mask=real)  # pyright: ignore
            options.pop("prefix_length", None)
        return out

    def _validate_generation_mode(self, generation_mode: Any, *args: Any, **kwargs: Any) -> None:
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                "assisted decoding and prompt lookup take back tokens that were read, and the cache cannot be rolled "
                "back: a State cannot forget tokens. Leave out assistant_model, prompt_lookup_num_tokens and their kin"
            )
        super()._validate_generation_mode(generation_mode, *args, **kwargs)  # pyright: ignore

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
            check_cache(cache)
            cache._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = LinattnCache()
