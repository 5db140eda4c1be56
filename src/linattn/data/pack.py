"""Windows of the token stream as one packed sequence, with a boundary wherever a document or a row starts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from linattn.data.shards import TokenShards

IGNORED = -100  # a target that no loss counts: the default ignore_index of torch's cross-entropy


class Packed(NamedTuple):
    """Rows cut from the stream.

    tokens, targets: int64 [B, T]; bounds: int64 [N + 1], the boundaries in the flattened B * T, none of length 0.
    """

    tokens: Tensor
    targets: Tensor
    bounds: np.ndarray


def cut(shards: TokenShards, starts: np.ndarray, length: int) -> Packed:
    """One row of ``length`` tokens from each of ``starts`` (positions in the stream).

    The target of a document's last token is -100: what follows belongs to another document, of which nothing has been
    read. Past the stream's end a row is filled with token 0 and targets -100, in a document of their own.
    """
    offsets, rows = shards.document_offsets, len(starts)
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    targets = torch.full((rows, length), IGNORED, dtype=torch.int64)
    bounds = []
    for row, start in enumerate(map(int, starts)):
        real = shards.read(min(start, shards.tokens), max(0, min(length + 1, shards.tokens - start)))
        tokens[row, : len(real)] = real[:length]
        targets[row, : max(0, len(real) - 1)] = real[1:]
        low, high = np.searchsorted(offsets, [start + 1, start + length + 1])
        inner = offsets[low:high] - start  # where another document starts, in [1, length]
        targets[row, torch.from_numpy(inner - 1)] = IGNORED
        bounds += [[row * length], row * length + inner[inner < length]]
    bounds.append([rows * length])
    return Packed(tokens, targets, np.concatenate(bounds).astype(np.int64))


def window_documents(shards: TokenShards, length: int, windows: int) -> np.ndarray:
    """How many pieces of documents each window [i * length, (i + 1) * length) holds, int64 [windows]."""
    offsets = shards.document_offsets
    inner = offsets[(offsets % length != 0) & (offsets < windows * length)]
    return 1 + np.bincount(inner // length, minlength=windows)


def pad_bounds(bounds: np.ndarray, documents: int) -> Tensor:
    """``bounds`` as int32 cu_seqlens [documents + 1], filled with documents of length 0 at the end.

    ``documents`` is doubled until they fit, so that few shapes ever occur.
    """
    while documents < len(bounds) - 1:
        documents *= 2
    padded = np.full(documents + 1, bounds[-1], dtype=np.int32)
    padded[: len(bounds)] = bounds
    return torch.from_numpy(padded)


def positions_in(bounds: np.ndarray) -> np.ndarray:
    """The position of each packed token in its piece, int64 [B * T]."""
    return np.arange(bounds[-1]) - np.repeat(bounds[:-1], np.diff(bounds))


def rank_rows(batch: int, rank: int, world: int) -> slice:
    """The rows of a global batch that are this rank's.

    Raises:
        ValueError: a batch that the ranks cannot share evenly, or no such rank.
    """
    if world < 1 or not 0 <= rank < world:
        raise ValueError(f"rank={rank} is not one of the {world} ranks")
    if batch < 1 or batch % world:
        raise ValueError(f"batch={batch} counts the samples of all ranks and must be a multiple of world={world}")
    return slice(rank * batch // world, (rank + 1) * batch // world)


def check_window(shards: TokenShards, batch: int, length: int, needed: int) -> None:
    """Refuse windows that the split cannot fill: it must have ``needed`` tokens."""
    if length < 1:
        raise ValueError(f"length={length} must be at least 1")
    if batch * length >= 1 << 31:
        raise ValueError(f"batch * length = {batch * length} tokens do not fit cu_seqlens (int32); make either smaller")
    if shards.tokens < needed:
        raise ValueError(
            f"{shards.path}: {shards.split} has {shards.tokens} tokens and this needs {needed}; "
            "give a smaller length or batch, or more text"
        )
