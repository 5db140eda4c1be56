"""A published model by name: the folder itself, or its files from the Hugging Face hub through huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path

from linattn.models.published.files import KINDS

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
GPT2 = "openai-community/gpt2"
"""Whose tokenizer.json the hazyresearch models use; their own repositories hold none."""

SMALL = ("*.json", "tokenizer.model", "*.tiktoken")
"""What is fetched beside the weights: configuration, indices and tokenizers; never Python."""


def is_hub_name(source: str | Path) -> bool:
    """Whether ``source`` is spelled owner/name and no path: where a folder ``owner`` is here, a path was meant."""
    path = Path(source)
    return not path.exists() and not path.parent.exists() and HUB_NAME.fullmatch(str(source)) is not None


def fetch(source: str | Path) -> Path:
    """The folder of ``source``: itself if it is one, else downloaded (once: huggingface_hub keeps a cache).

    safetensors are preferred; a .bin is fetched only where there are none.

    Raises:
        ValueError: no folder and no hub name, huggingface_hub is not installed, or the download failed.
    """
    if Path(source).is_dir():
        return Path(source)
    if not is_hub_name(source):
        raise ValueError(f"{source}: no such folder, and no hub name of the form owner/name")
    folder = Path()
    for whole, suffix in KINDS:
        weights = f"{Path(whole).stem}*{suffix}"
        folder = Path(_download("snapshot_download", str(source), allow_patterns=[*SMALL, weights]))
        if any(folder.glob(weights)):
            break
    return folder


def fetch_gpt2_tokenizer() -> Path:
    """GPT-2's tokenizer.json from the hub; errors as in `fetch`."""
    return Path(_download("hf_hub_download", GPT2, filename="tokenizer.json"))


def _download(function: str, name: str, **options: object) -> str:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            f"{name}: no such folder here, and fetching it from the hub needs huggingface_hub: "
            "pip install huggingface_hub, or copy the repository's files into a folder and give that"
        ) from error
    try:
        return getattr(huggingface_hub, function)(name, **options)
    except (OSError, ValueError) as error:  # its own errors are OSErrors, a name it dislikes a ValueError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{name}: could not be fetched from the hub ({reason}); with its files in a folder, give the folder"
        ) from error
