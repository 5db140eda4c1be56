"""Token shards, written: a .bin and an .idx for every ``shard_tokens`` tokens of one split."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from linattn.data.meta import DTYPES, ShardMeta, SplitMeta, shard_path
from linattn.data.tokenizer import Tokenizer


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """An OSError from here says that it is ``folder`` that could not be written, and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{folder}: could not be written ({error}); nothing is left of it: free some space, or choose "
            "another disk, and run again"
        ) from error


class ShardWriter:
    """Tokens of one split into shards of at most ``shard_tokens``.

    ``bytes`` is the text that they stand for; whoever appends counts it.
    """

    def __init__(self, folder: Path, split: str, dtype: str, tokenizer: Tokenizer, shard_tokens: int):
        self.bytes = 0
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._dtype, self._vocab_size, self._eos = np.dtype(DTYPES[dtype]), tokenizer.vocab_size, tokenizer.eos
        self._shards: list[ShardMeta] = []
        self._handle = None
        self._begins = True  # the next token is a document's first
        (folder / split).mkdir()

    def append(self, ids: np.ndarray, ends: bool) -> None:
        """The next tokens of the document under way, and whether it ends with them."""
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self._vocab_size:
            raise ValueError(f"the tokenizer gave an id outside [0, {self._vocab_size}), its vocab_size")
        data = np.empty(len(ids) + ends, dtype=self._dtype)
        data[: len(ids)] = ids
        if ends:
            data[-1] = self._eos
        while len(data):
            room = self._shard_tokens - self._tokens if self._handle else 0
            if room == 0:
                self.close()
                self._open()
                room = self._shard_tokens
            if self._begins:
                self._starts.append(self._tokens)
                self._begins = False
            self._put(data[:room])
            data = data[room:]
        self._begins = ends or self._begins

    def close(self) -> None:
        """Finish the shard under way."""
        if self._handle is None:
            return
        self._handle.close()
        self._handle = None
        index = np.append(np.frombuffer(self._starts, dtype=np.int64), self._tokens).astype("<i8")
        shard_path(self._folder, self._split, len(self._shards), "idx").write_bytes(index.tobytes())
        size = self._tokens * self._dtype.itemsize
        self._shards.append(ShardMeta(self._tokens, len(self._starts), size, self._sha.hexdigest()))

    def meta(self) -> SplitMeta:
        """What was written. Call after `close`."""
        tokens, documents = sum(s.tokens for s in self._shards), sum(s.documents for s in self._shards)
        return SplitMeta(tokens, documents, self.bytes, tuple(self._shards))

    def _open(self) -> None:
        self._handle = shard_path(self._folder, self._split, len(self._shards), "bin").open("wb")
        self._sha, self._tokens, self._starts = hashlib.sha256(), 0, array("q")

    def _put(self, data: np.ndarray) -> None:
        assert self._handle is not None
        raw = data.tobytes()
        self._handle.write(raw)
        self._sha.update(raw)
        self._tokens += len(data)
