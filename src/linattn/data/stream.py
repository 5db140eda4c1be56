"""Contiguous streams, for training that carries a detached State from one step to the next.

    python -c "from linattn.data import *; print(next(StreamLoader(TokenShards('runs/austen'), length=64, batch=2)))"

Not here: shuffling (loader.py). Rows of one step are far apart in the corpus; the steps of one row are neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from linattn.data.pack import check_window, cut, pad_bounds, rank_rows, window_documents
from linattn.data.shards import TokenShards


class StreamBatch(NamedTuple):
    """One rank's step: B rows, each the continuation of the row before it, as one packed sequence of B * T tokens.

    tokens, targets, cu_seqlens: as in `Batch`.
    positions: int64 [1, B * T], counted from the start of the document (or of the row's part of the corpus), so they
        go on across steps; unpacked, always from the start of the row's part.
    fresh: bool [B], whether the row starts anew here: begin it from the identity State, and from the carried one
        everywhere else.
    first, last: int64 [B], which of the N documents each row's first and last piece are: the carried States go in at
        ``first`` and come out at ``last``.
    """

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    positions: Tensor
    fresh: Tensor
    first: Tensor
    last: Tensor


class StreamLoader:
    """Row r of the batch reads its own contiguous part of the split in order, T tokens a step, without end.

    The split is cut into ``batch`` equal parts of ``steps`` windows; what is over at the end, at most batch * T
    tokens, is not read. After ``steps`` steps every row starts its part again, fresh.

    Args:
        shards: the split to read.
        length: T, tokens in a row.
        batch: rows over all ranks; each rank gets batch // world of them, in rank order.
        rank, world: this rank and how many there are.
        position: steps taken so far: the whole state. The batch must stay the same to resume; the world need not.
        packed: False lets the documents of a row see each other: only rows are apart, each starts anew only where its
            part does, and N is the number of rows.
        max_documents: N of cu_seqlens, as in `Loader`.

    Raises:
        ValueError: fewer than batch * length + 1 tokens, a batch that the ranks cannot share, or a negative position.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        length: int,
        batch: int,
        rank: int = 0,
        world: int = 1,
        position: int = 0,
        packed: bool = True,
        max_documents: int | None = None,
    ):
        self._rows = rank_rows(batch, rank, world)
        check_window(shards, batch, length, batch * length + 1)
        if position < 0:
            raise ValueError(f"position={position} must be at least 0")
        local = batch // world
        if max_documents is not None and max_documents < local:
            raise ValueError(f"max_documents={max_documents} is fewer than the {local} rows of a rank")
        self.shards, self.length, self.batch, self.position, self.packed = shards, length, batch, position, packed
        self.steps = (shards.tokens - 1) // length // batch
        if not packed:
            max_documents = local
        elif max_documents is None:
            counts = window_documents(shards, length, batch * self.steps).reshape(world, local, self.steps)
            max_documents = int(counts.sum(1).max())
        self.max_documents = max_documents

    def __iter__(self) -> StreamLoader:
        return self

    def __next__(self) -> StreamBatch:
        """The step at ``position``, which then moves on by 1."""
        found = self.at(self.position)
        self.position += 1
        return found

    def at(self, position: int) -> StreamBatch:
        """Step ``position``; reads nothing of, and leaves alone, the loader's own position."""
        step, length = position % self.steps, self.length
        parts = np.arange(self.batch, dtype=np.int64)[self._rows] * self.steps * length
        starts = parts + step * length
        rows = cut(self.shards, starts, length)
        at = starts[:, None] + np.arange(length)
        begins, sides = parts[:, None], np.arange(len(starts) + 1) * length
        bounds = rows.bounds if self.packed else sides
        if self.packed:
            offsets = self.shards.document_offsets
            begins = np.maximum(begins, offsets[np.searchsorted(offsets, at, side="right") - 1])
        positions = at - begins
        edges = np.searchsorted(bounds, sides)
        return StreamBatch(
            rows.tokens,
            rows.targets,
            pad_bounds(bounds, self.max_documents),
            torch.from_numpy(positions.reshape(1, -1)),
            torch.from_numpy(positions[:, 0] == 0),
            torch.from_numpy(edges[:-1]),
            torch.from_numpy(edges[1:] - 1),
        )
