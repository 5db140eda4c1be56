"""Token shards, opened for reading: one long stream of tokens, memory-mapped, with its documents' starts.

python -c "from linattn.data import TokenShards; print(TokenShards('runs/austen', 'train').tokens)"
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from linattn.data.meta import DTYPES, SPLITS, ShardMeta, SplitMeta, read_meta, shard_path
from linattn.data.tokenizer import Tokenizer, load_tokenizer


class TokenShards:
    """One split of what `prepare` wrote, checked against its meta.json on opening.

    Attributes:
        path, split, meta: where it lies, "train" or "validation", and all of meta.json.
        tokens: how many tokens there are, end-of-document tokens included.
        documents: how many documents.
        bytes: the UTF-8 text that the tokens stand for: bits per byte is nats / ln 2 / bytes.
        document_offsets: int64 [documents + 1], where each document starts in the stream, then ``tokens``.

    Raises:
        ValueError: no such folder or split, or files that are not what meta.json says.
    """

    def __init__(self, path: str | Path, split: str = "train"):
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is not one of {list(SPLITS)}")
        self.path, self.split = Path(path), split
        self.meta = read_meta(self.path)
        found: SplitMeta | None = getattr(self.meta, split)
        if found is None:
            raise ValueError(f"{path}: has no {split} split; prepare it again with validation_fraction > 0")
        self._about = found
        self.tokens, self.documents, self.bytes = found.tokens, found.documents, found.bytes
        dtype = np.dtype(DTYPES[self.meta.dtype])
        self._maps = [_open_bin(self._file(i, "bin"), s, dtype) for i, s in enumerate(found.shards)]
        ends = np.cumsum([s.tokens for s in found.shards], dtype=np.int64)
        self._starts = np.concatenate([np.zeros(1, np.int64), ends])
        starts = [_open_idx(self._file(i, "idx"), s) + self._starts[i] for i, s in enumerate(found.shards)]
        self.document_offsets = np.concatenate([*starts, np.array([self.tokens], np.int64)])
        if int(self._starts[-1]) != self.tokens or len(self.document_offsets) != self.documents + 1:
            raise ValueError(
                f"{self.path / 'meta.json'}: {split} has {self.tokens} tokens in {self.documents} documents, its "
                f"shards {int(self._starts[-1])} in {len(self.document_offsets) - 1}; prepare the text again"
            )
        if self.document_offsets[0] != 0:
            raise ValueError(f"{self._file(0, 'idx')}: the first document starts at {self.document_offsets[0]}, not 0")

    def __len__(self) -> int:
        return self.tokens

    def read(self, start: int, length: int) -> Tensor:
        """The tokens [start, start + length) of the stream, int64 [length], across shards if need be.

        Raises:
            ValueError: a range outside [0, tokens].
        """
        if length < 0 or start < 0 or start + length > self.tokens:
            raise ValueError(f"tokens [{start}, {start + length}) are outside [0, {self.tokens}) of {self.path}")
        out = np.empty(length, dtype=np.int64)
        shard, done = int(np.searchsorted(self._starts, start, side="right")) - 1, 0
        while done < length:
            at = start + done - int(self._starts[shard])
            part = self._maps[shard][at : at + length - done]
            out[done : done + len(part)] = part
            done += len(part)
            shard += 1
        return torch.from_numpy(out)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuse a tokenizer other than the one that made these tokens.

        Raises:
            ValueError: its hash is another; both are named.
        """
        made = self.meta.tokenizer
        if tokenizer.hash != made.hash:
            raise ValueError(
                f"{self.path}: made by tokenizer {made.name!r} (hash {made.hash}), not by {tokenizer.name!r} "
                f"(hash {tokenizer.hash}); prepare the text again with {tokenizer.name!r}, or use `load_tokenizer()`"
            )

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that made these tokens; it lies beside them, and its hash is checked."""
        made = self.meta.tokenizer
        if made.spec == "bytes":
            tokenizer = load_tokenizer("bytes")
        else:
            tokenizer = load_tokenizer(self.path / made.spec, eos=made.eos_token)
        self.check_tokenizer(tokenizer)
        return tokenizer

    def verify(self) -> None:
        """Read every byte and compare the SHA-256 of each shard: 1 to 2 GB a second.

        Raises:
            ValueError: a shard's bytes are not the ones that were written.
        """
        for index, shard in enumerate(self._about.shards):
            path = self._file(index, "bin")
            with path.open("rb") as handle:
                found = hashlib.file_digest(handle, "sha256").hexdigest()
            if found != shard.sha256:
                raise ValueError(f"{path}: SHA-256 {found}, expected {shard.sha256}; copy it again or prepare again")

    def _file(self, index: int, suffix: str) -> Path:
        return shard_path(self.path, self.split, index, suffix)


def _open_bin(path: Path, shard: ShardMeta, dtype: np.dtype) -> np.ndarray:
    expected = shard.tokens * dtype.itemsize
    if shard.size != expected:
        raise ValueError(f"{path}: meta.json gives {shard.size} bytes for {shard.tokens} tokens of {dtype.name}")
    _check_size(path, expected)
    return np.memmap(path, dtype=dtype, mode="r")


def _open_idx(path: Path, shard: ShardMeta) -> np.ndarray:
    """The document starts of one shard, without the total at the end."""
    _check_size(path, 8 * (shard.documents + 1))
    index = np.fromfile(path, dtype="<i8")
    if index[-1] != shard.tokens or index[0] < 0 or (np.diff(index) <= 0).any():
        raise ValueError(f"{path}: is not a rising list of offsets up to {shard.tokens}; prepare the text again")
    return index[:-1]


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: is missing; copy the folder again or prepare the text again")
    found = path.stat().st_size
    if found != expected:
        raise ValueError(
            f"{path}: expected {expected} bytes, found {found}; it was cut short or changed: "
            "copy it again or prepare the text again"
        )
