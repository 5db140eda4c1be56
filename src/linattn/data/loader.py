"""Batches for training and validation. A loader's whole state is one integer.

`Loader` shuffles fixed windows of the stream. What it gives is a pure function of (seed, position, rank, world): to
resume, set the position, at any number of ranks. `validation_batches` reads a split once, in order. Reading in order
with a state carried across steps is stream.py.

    python -c "from linattn.data import *; print(next(Loader(TokenShards('runs/austen'), length=64, batch=2)))"
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from linattn.data.pack import Packed, check_window, cut, pad_bounds, positions_in, rank_rows, window_documents
from linattn.data.permute import permute
from linattn.data.shards import TokenShards


class Batch(NamedTuple):
    """One rank's part of a batch: B rows of T tokens, and how they lie as one packed sequence of B * T tokens.

    tokens: int64 [B, T].
    targets: int64 [B, T], the next token; -100 where none is to be predicted: at a document's last token (what follows
        belongs to a document of which nothing has been read), and at padding.
    cu_seqlens: int32 [N + 1] over tokens.view(1, B * T), a boundary at each row's start and each document's, so that a
        neighbour never leaks through the state. N is fixed; documents of length 0 at the end fill it. None if the
        loader was asked not to pack.
    positions: int64 [1, B * T], from 0 in each piece.
    """

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None
    positions: Tensor


class Loader:
    """Shuffled windows, without end.

    Window i is the tokens [i T, (i + 1) T) with the token after it as last target; an epoch is each of the
    (tokens - 1) // T windows once, in an order drawn from (seed, epoch) and stored nowhere.

    Args:
        shards: the split to read.
        length: T, tokens in a row.
        batch: rows in a batch over all ranks; each rank gets batch // world of them, in rank order.
        seed: any integer.
        rank, world: this rank and how many there are.
        position: samples consumed so far by all ranks together: the whole state. Save it, set it to resume.
        shuffle: False reads the windows in order, each epoch alike.
        packed: False leaves cu_seqlens out and lets documents of one row see each other.
        max_documents: N of cu_seqlens. By default the most that this rank's rows can ever hold, so that the shape
            never changes; if a smaller one is given and exceeded, it is doubled for that batch until it fits.

    Raises:
        ValueError: fewer than length + 1 tokens, a batch that the ranks cannot share, or a negative position.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        length: int,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        position: int = 0,
        shuffle: bool = True,
        packed: bool = True,
        max_documents: int | None = None,
    ):
        self._rows = rank_rows(batch, rank, world)
        check_window(shards, batch, length, length + 1)
        if position < 0:
            raise ValueError(f"position={position} must be at least 0")
        self.shards, self.length, self.batch, self.seed, self.position = shards, length, batch, seed, position
        self.shuffle, self.packed = shuffle, packed
        self.windows = (shards.tokens - 1) // length
        local = batch // world
        self.max_documents = _documents(max_documents, local) or _most(
            window_documents(shards, length, self.windows), local
        )

    @property
    def epoch(self) -> float:
        """How often the windows have been read, with the fraction of the epoch under way."""
        return self.position / self.windows

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        """The batch at ``position``, which then moves on by ``batch``."""
        found = self.at(self.position)
        self.position += self.batch
        return found

    def at(self, position: int) -> Batch:
        """The batch that starts with sample ``position``; reads nothing of, and leaves alone, the loader's own."""
        samples = position + np.arange(self.batch, dtype=np.int64)[self._rows]
        epochs, windows = np.divmod(samples, self.windows)
        if self.shuffle:
            for epoch in np.unique(epochs):
                at = epochs == epoch
                windows[at] = permute(windows[at], self.windows, self.seed, int(epoch))
        return _batch(cut(self.shards, windows * self.length, self.length), self.packed, self.max_documents)


def validation_batches(
    shards: TokenShards,
    *,
    length: int,
    batch: int,
    rank: int = 0,
    world: int = 1,
    packed: bool = True,
    max_documents: int | None = None,
) -> Iterator[Batch]:
    """The whole split once, in order, in windows that do not overlap: each target exactly once over all ranks.

    A document's first token is no target, so there are ``shards.tokens - shards.documents`` of them. All ranks get
    equally many batches of one shape: what is past the end is token 0 with target -100, in documents of its own. A
    window starts with nothing read, so a document longer than ``length`` is read in parts; take a larger length to
    measure with more context.

    Raises:
        ValueError: a split of one token, or a batch that the ranks cannot share.
    """
    rows = rank_rows(batch, rank, world)
    check_window(shards, batch, length, 2)
    windows = -(-(shards.tokens - 1) // length)
    steps = -(-windows // batch)
    # The padding of the last window is one more document, which window_documents counts: the stream's end is an offset.
    counts = np.ones(steps * batch, np.int64)
    counts[:windows] = window_documents(shards, length, windows)
    most = _documents(max_documents, batch // world) or int(counts.reshape(steps * world, -1).sum(1).max())

    def batches() -> Iterator[Batch]:
        for step in range(steps):
            starts = (step * batch + np.arange(batch)[rows]) * length
            yield _batch(cut(shards, starts, length), packed, most)

    return batches()


def _batch(rows: Packed, packed: bool, max_documents: int) -> Batch:
    size, length = rows.tokens.shape
    bounds = rows.bounds if packed else np.arange(size + 1) * length
    positions = torch.from_numpy(positions_in(bounds)).unsqueeze(0)
    cu_seqlens = pad_bounds(bounds, max_documents) if packed else None
    return Batch(rows.tokens, rows.targets, cu_seqlens, positions)


def _documents(given: int | None, rows: int) -> int | None:
    if given is not None and given < rows:
        raise ValueError(f"max_documents={given} is fewer than the {rows} rows of a rank; each starts a document")
    return given


def _most(counts: np.ndarray, rows: int) -> int:
    """The most pieces that ``rows`` consecutive samples can hold.

    A batch takes each window once in an epoch, and over the end of an epoch may take one once more.
    """
    repeats = -(-rows // len(counts)) + 1
    fullest = np.sort(np.partition(counts, -min(rows, len(counts)))[-rows:])[::-1]
    return int(np.repeat(fullest, repeats)[:rows].sum())
