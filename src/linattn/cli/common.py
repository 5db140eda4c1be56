"""What several verbs share: loading a model for use, and reading a text file as the user named it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from linattn.cli.published import read_published
from linattn.data import Tokenizer, bundled_names, bundled_text, load_tokenizer
from linattn.models import Decoder, ModelConfig
from linattn.models.published import is_published
from linattn.models.published.hub import is_hub_name
from linattn.train import load_model, load_model_tokenizer

Dtype = Literal["fp32", "bf16", "stored"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "stored": None}


def load(
    path: Path, device: str, dtype: Dtype, tokenizer: Path | None = None
) -> tuple[Decoder, ModelConfig, Tokenizer]:
    """The model at ``path``, its configuration and its tokenizer.

    Args:
        path: a checkpoint, an export, a run (its newest checkpoint), a published checkpoint's folder, or the name of
            one on the hub.
        device: "cpu", "cuda" or "auto".
        dtype: of the weights.
        tokenizer: a tokenizer.json, instead of the model's own.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda, but torch sees no GPU here; use --device cpu")
    if is_published(path) or is_hub_name(path):
        found = read_published(path, DTYPES[dtype], tokenizer)
        if found.tokenizer is None:
            raise ValueError(f"{path}: {found.missing}")
        return found.decoder(device), found.config, found.tokenizer
    model, config = load_model(path, device, DTYPES[dtype])
    return model, config, load_model_tokenizer(path) if tokenizer is None else load_tokenizer(tokenizer)


def read_text(name: str) -> str:
    """The text of a file, or of ``bundled:NAME``.

    Raises:
        ValueError: the file is empty or not UTF-8 (with the byte's offset), or no such bundled text.
    """
    if name.startswith("bundled:"):
        wanted = name.removeprefix("bundled:")
        if wanted not in bundled_names():
            raise ValueError(f"no bundled text {wanted!r}; there are {', '.join(bundled_names())}")
        return bundled_text(wanted)
    data = Path(name).read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 at byte {error.start}; convert it with iconv -t utf-8") from error
    if not text.strip():
        raise ValueError(f"{name}: holds no text; give a file with some")
    return text
