"""Read a document of any length into a state, in constant memory; its exact loss on the way if asked for.

pytest tests/generate -k read
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linattn.generate.engine import CHUNK, check_chunk, check_ids
from linattn.models import Decoder, ModelState

LOSS_ROWS = 256
"""Rows whose logits live at a time: 51 MB in fp32 at 50,257 tokens, whatever the chunk."""

SPEED_CHUNKS = 8
"""Chunks at either end of a stream whose median gives its speed."""

_PIECE = 1 << 16  # ids taken from a stream at a time

Progress = Callable[[int, float], None]


@dataclass(frozen=True)
class Reading:
    """What reading a stream gives."""

    state: ModelState
    """One row, which has read all of it."""
    tokens: int
    """How many tokens were read."""
    seconds: float
    """Spent in the model."""
    start_speed: float
    """Tokens a second at the start: the median of the first chunks, the very first left out as warm-up."""
    end_speed: float
    """The same of the last chunks."""
    nll: float | None = None
    """Sum of -log p over the scored tokens, in nats; None unless asked for."""
    scored: int = 0
    """How many tokens have a probability: all but the first, which nothing precedes, and a prefix model's prefix."""

    @property
    def perplexity(self) -> float:
        """exp(nll / scored)."""
        return math.exp(self.nats_per_token)

    @property
    def nats_per_token(self) -> float:
        """nll / scored.

        Raises:
            ValueError: the loss was not asked for, or no token has one.
        """
        if self.nll is None or not self.scored:
            raise ValueError(f"no token was scored ({self.tokens} were read): call read(..., nll=True) on two or more")
        return self.nll / self.scored


@torch.no_grad()
def read(
    model: Decoder,
    tokens: Tensor | np.ndarray | Iterable[Any],
    *,
    chunk: int = CHUNK,
    state: ModelState | None = None,
    nll: bool = False,
    progress: Progress | None = None,
) -> Reading:
    """Fold one document into a state, ``chunk`` tokens at a time.

    A prefix model reads its first min(prefix_length, tokens) tokens without causality and in one call, unless it goes
    on from a state; they are not scored, since each of them could see itself.

    Args:
        tokens: ids [T], an iterator of ids, or an iterator of arrays or tensors of ids, of any length.
        chunk: tokens a call, at least 1.
        state: what was read before, one row.
        nll: whether to sum the loss. It is that of one forward pass over everything: the chunks do not show in it.
        progress: called after each chunk with the tokens read so far and the chunk's tokens a second.

    Raises:
        ValueError: no tokens, an id outside the vocabulary, or a state of more than one row.
    """
    check_chunk(chunk)
    if state is not None and state.tokens.shape[0] != 1:
        raise ValueError(f"a stream is one document, but the state has {state.tokens.shape[0]} rows: take one of them")
    first = model.config.prefix_length if state is None else 0
    count, scored, total, carry = 0, 0, 0.0, None
    clock = _Clock(chunk)
    for ids in _chunks(tokens, chunk, first):
        check_ids(model, ids, f"the stream, from token {count} on,")
        ids = ids.to(model.embedding.weight.device)
        started = time.perf_counter()
        prefix = min(first, len(ids)) if count == 0 and first else 0
        lengths = torch.tensor([prefix], device=ids.device) if prefix else None
        out = model(ids[None], state=state, prefix_lengths=lengths, logits="none", return_state=True)
        state = out.state
        if nll:
            known = out.hidden[0] if carry is None else torch.cat([carry, out.hidden[0]])
            # The first token of the stream has nothing before it; what is inside the prefix was seen beforehand.
            skipped = max(prefix, 1) if carry is None else 0
            targets = ids[skipped:]
            carry = known[-1:]
            if len(targets):
                losses = model.loss(known[-1 - len(targets) : -1], targets, chunk=LOSS_ROWS, reduction="none")
                total, scored = total + float(losses.double().sum()), scored + len(targets)
        if ids.is_cuda:
            torch.cuda.synchronize(ids.device)
        speed = clock.lap(len(ids), time.perf_counter() - started)
        count += len(ids)
        if progress is not None:
            progress(count, speed)
    if state is None or count == 0:
        raise ValueError("nothing to read: the stream holds no token")
    return Reading(state, count, clock.seconds, clock.start, clock.end, total if nll else None, scored)


class _Clock:
    """Speeds at both ends of a stream, in constant memory. Only whole chunks count, where there are any."""

    def __init__(self, chunk: int):
        self._chunk = chunk
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=SPEED_CHUNKS)
        self._tokens = 0
        self.seconds = 0.0

    def lap(self, tokens: int, seconds: float) -> float:
        """Note a chunk; its tokens a second."""
        speed = tokens / max(seconds, 1e-9)
        if tokens == self._chunk:
            if len(self._first) <= SPEED_CHUNKS:
                self._first.append(speed)
            self._last.append(speed)
        self._tokens, self.seconds = self._tokens + tokens, self.seconds + seconds
        return speed

    @property
    def start(self) -> float:
        return statistics.median(self._first[1:] or self._first or [self._overall])

    @property
    def end(self) -> float:
        return statistics.median(self._last or [self._overall])

    @property
    def _overall(self) -> float:
        return self._tokens / max(self.seconds, 1e-9)


def _chunks(tokens: Any, chunk: int, first: int) -> Iterator[Tensor]:
    """The stream cut into int64 tensors of ``chunk`` ids, the first of them at least ``first`` long."""
    size, count, held = max(chunk, first), 0, []
    for piece in _pieces(tokens):
        held.append(piece)
        count += len(piece)
        if count < size:
            continue
        joined = torch.cat(held)
        while len(joined) >= size:
            yield joined[:size]
            joined, size = joined[size:], chunk
        held, count = [joined], len(joined)
    if count:
        yield torch.cat(held)


def _pieces(tokens: Any) -> Iterator[Tensor]:
    """Ids, arrays of ids, or an iterator of either, as int64 tensors of bounded length."""
    if isinstance(tokens, Tensor | np.ndarray):
        if tokens.ndim != 1:
            raise ValueError(f"a stream is one row of ids [T], got {list(tokens.shape)}; give tokens[0]")
        for start in range(0, len(tokens), _PIECE):
            yield _int64(tokens[start : start + _PIECE])
        return
    gathered: list[int] = []
    for item in tokens:
        if isinstance(item, int | np.integer):
            gathered.append(int(item))
            if len(gathered) < _PIECE:
                continue
        if gathered:
            yield torch.tensor(gathered)
            gathered = []
        if not isinstance(item, int | np.integer):
            yield from _pieces(item if isinstance(item, Tensor | np.ndarray) else torch.tensor(item))
    if gathered:
        yield torch.tensor(gathered)


def _int64(ids: Tensor | np.ndarray) -> Tensor:
    if isinstance(ids, np.ndarray):
        if ids.dtype.kind not in "iu":
            raise ValueError(f"token ids are integers, got an array of {ids.dtype}")
        return torch.from_numpy(ids.astype(np.int64))
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"token ids are integers, got a tensor of {ids.dtype}")
    return ids.to(torch.int64)
