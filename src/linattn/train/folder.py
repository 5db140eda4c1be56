"""A folder that is there whole or not at all.

pytest tests/train -k "disk or twice"
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a new folder beside ``path``, flush it to the disk, and rename it to ``path``."""
    partial, old = path.with_name(path.name + ".partial"), path.with_name(path.name + ".old")
    for left in (partial, old):  # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write(partial)
        for file in sorted(partial.iterdir()):
            _flush(file)
        _flush(partial)
        if path.exists():
            path.rename(old)
        partial.rename(path)
        _flush(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
