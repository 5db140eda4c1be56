"""Files: JSON read, text written whole or not at all, safetensors with the user's umask, and a full disk an OSError."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""What weights may be stored as, by safetensors' names."""


def read_json(path: Path) -> Any:
    """The data of a JSON file.

    Raises:
        ValueError: it is missing or damaged, with its path.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{path}: is missing; copy the folder again") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); copy the folder again") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors, by name, and text metadata to ``path``.

    Raises:
        OSError: it could not be written, whatever the reason.
    """
    path.touch()
    mode = path.stat().st_mode  # safetensors itself leaves files that only their owner can read
    try:
        save_file({n: t.detach().contiguous() for n, t in tensors.items()}, path, dict(metadata or {}) or None)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    path.chmod(mode)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` beside ``path``, flush it to the disk, and rename it to ``path``.

    Raises:
        OSError: it could not be written, with the path. What was there before is as it was, and nothing else is left.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
