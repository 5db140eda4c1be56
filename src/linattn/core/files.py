"""Writing safetensors as any other file is written: with the user's umask, and a full disk an OSError."""

from __future__ import annotations

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
