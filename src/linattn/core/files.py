"""Writing files: text whole or not at all, safetensors with the user's umask, and a full disk an OSError."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


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
