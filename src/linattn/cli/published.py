"""A published checkpoint and its tokenizer, from a folder or from the hub, for the verbs that use and convert one."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from linattn.data import Tokenizer, load_tokenizer
from linattn.data.tokenizer import FileTokenizer
from linattn.mixers.lightning.layer import LightningLayer
from linattn.models import Decoder, ModelConfig, TransNormerConfig, build_model
from linattn.models.published import load_published
from linattn.models.published.hub import fetch, fetch_gpt2_tokenizer, is_hub_name


class Published(NamedTuple):
    """A published model in memory.

    ``tokenizer`` is None where none that linattn reads is beside it; ``missing`` then says what to do.
    """

    config: ModelConfig
    state: dict[str, Tensor]
    tokenizer: Tokenizer | None
    missing: str

    @property
    def dtype(self) -> torch.dtype:
        """The weights' one dtype."""
        return next(iter(self.state.values())).dtype

    def decoder(self, device: str | torch.device) -> Decoder:
        """The model on ``device``, in evaluation mode; on the CPU it shares the memory of ``state``."""
        with torch.device("meta"):
            model = build_model(self.config)
        model.load_state_dict(self.state, assign=True)
        for module in model.modules():
            if isinstance(module, LightningLayer):
                module.reset_buffers()
        return model.to(device).eval()


def read_published(
    source: str | Path, dtype: torch.dtype | None = None, tokenizer: str | Path | None = None
) -> Published:
    """A published model of a folder or a hub name.

    Args:
        source: a folder, or owner/name of a repository on the Hugging Face hub.
        dtype: of the weights; None keeps the file's.
        tokenizer: a tokenizer.json. Without it the folder's own, a tokenizer.json or SentencePiece's tokenizer.model;
            for a hub name of a hazyresearch model, GPT-2's.

    Raises:
        ValueError: as `load_published` and `fetch`; a tokenizer of more ids than the model has.
    """
    folder = fetch(source)
    config, state = load_published(folder, dtype)
    if tokenizer is not None:
        found = load_tokenizer(tokenizer)
    elif (folder / "tokenizer.json").is_file():
        found = load_tokenizer(folder)
    elif (folder / "tokenizer.model").is_file():
        found = _sentencepiece(folder / "tokenizer.model", Path(source).name)
    elif is_hub_name(source) and not isinstance(config, TransNormerConfig):
        found = load_tokenizer(fetch_gpt2_tokenizer())
    else:
        found = None
    if found is not None and found.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer {found.name} has {found.vocab_size:,} ids, the model {config.vocab_size:,}; "
            "give --tokenizer the model's own"
        )
    return Published(config, state, found, _missing(folder) if found is None else "")


def _sentencepiece(path: Path, name: str) -> Tokenizer:
    from linattn.models.published.sentencepiece import sentencepiece_json

    return FileTokenizer(sentencepiece_json(path), name, str(path))


def _missing(folder: Path) -> str:
    tiktoken = next(folder.glob("*.tiktoken"), None)
    if tiktoken is None:
        return "has no tokenizer.json; give one with --tokenizer to linattn generate or convert"
    return (
        f"its tokenizer is {tiktoken.name}, whose splitting rule and special tokens are Python code of the "
        "repository, which linattn does not run; make a tokenizer.json of them (transformers.integrations.tiktoken has "
        "convert_tiktoken_to_fast) and give it with --tokenizer to linattn generate or convert"
    )
