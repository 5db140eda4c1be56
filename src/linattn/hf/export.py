"""A trained model as a folder that AutoModelForCausalLM and AutoTokenizer read: safetensors and config.json.

linattn export runs/debug-cpu exports/debug-cpu
"""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig

from linattn.data import Tokenizer
from linattn.hf.modeling import LinattnForCausalLM
from linattn.hf.tokenizer import hf_tokenizer
from linattn.models import Decoder, ModelConfig


def export_pretrained(
    model: Decoder,
    config: ModelConfig,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    max_shard_size: str | int = "5GB",
) -> None:
    """Write ``model`` and its tokenizer into ``folder`` as transformers would.

    Args:
        model: in the dtype to be stored.
        config: what it was built from.
        folder: made if need be; files of these names in it are replaced.
        tokenizer: None writes none.
        max_shard_size: where one file of weights ends and the next begins.

    Raises:
        ValueError: ``config`` is another model's, or the tokenizer has ids that the model lacks.
    """
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model {config.vocab_size}: it is another model's"
        )
    wrapped = LinattnForCausalLM.from_decoder(model, config)
    if tokenizer is not None:
        ids = {"eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.eos, "bos_token_id": tokenizer.bos}
        wrapped.generation_config = GenerationConfig(**ids)
        hf_tokenizer(tokenizer).save_pretrained(folder)
    wrapped.save_pretrained(folder, max_shard_size=max_shard_size)
