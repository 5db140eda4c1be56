"""meta.json of a folder of token shards: what it holds, as frozen dataclasses.

    out/meta.json  [tokenizer.json]  train/shard-00000.bin  train/shard-00000.idx  ...  validation/...

A ``.bin`` is tokens, little-endian and nothing else. Its ``.idx`` is int64: where in this shard each document starts,
then the shard's number of tokens. A document may run on into the next shard, which then does not start at 0.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linattn.core.config import from_data, to_data
from linattn.core.files import write_text

VERSION = 1
SPLITS = ("train", "validation")
DTYPES = {"uint16": "<u2", "uint32": "<u4"}


@dataclass(frozen=True)
class TokenizerMeta:
    """Which tokenizer made the tokens: ``spec`` is "bytes" or a file beside meta.json; ``eos`` ends each document."""

    spec: str
    name: str
    hash: str
    vocab_size: int
    eos: int
    eos_token: str | None


@dataclass(frozen=True)
class ShardMeta:
    """One shard: its tokens, the documents that start in it, the .bin's size in bytes and its SHA-256."""

    tokens: int
    documents: int
    size: int
    sha256: str


@dataclass(frozen=True)
class SplitMeta:
    """One split. ``bytes`` is the UTF-8 text that its tokens stand for: the divisor of bits per byte."""

    tokens: int
    documents: int
    bytes: int
    shards: tuple[ShardMeta, ...]


@dataclass(frozen=True)
class Meta:
    """A folder of shards. ``held_out`` is how validation was chosen: "documents", "tail" or "none"."""

    version: int
    tokenizer: TokenizerMeta
    dtype: str
    held_out: str
    train: SplitMeta
    validation: SplitMeta | None


def shard_path(folder: Path, split: str, index: int, suffix: str) -> Path:
    """The path of a shard: ``suffix`` is "bin" or "idx"."""
    return folder / split / f"shard-{index:05d}.{suffix}"


def write_meta(folder: Path, meta: Meta) -> None:
    """Write ``folder/meta.json``."""
    write_text(folder / "meta.json", json.dumps(to_data(meta), indent=1) + "\n")


def read_meta(folder: Path) -> Meta:
    """Read ``folder/meta.json``.

    Raises:
        ValueError: no such file, damaged, or of another version.
    """
    path = folder / "meta.json"
    if not path.is_file():
        raise ValueError(f"{folder}: holds no meta.json, so these are no token shards; make some with `prepare`")
    try:
        data: Any = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); prepare the text again") from error
    version = data.get("version") if isinstance(data, dict) else None
    if version != VERSION:
        raise ValueError(f"{path}: version {version!r}, this linattn reads version {VERSION}; prepare the text again")
    meta = from_data(Meta, data, where=str(path))
    if meta.dtype not in DTYPES:
        raise ValueError(f"{path}: dtype {meta.dtype!r} is not one of {list(DTYPES)}")
    return meta
