"""Pools of States for decoding: leaves [slots + 1, ...], rewritten in place, one row a document.

The last row is no slot: idle rows of a batch (slot -1) write there, so that nothing is masked and nothing waits for the
device. A mixer whose pool is not its State (a ring, a cache of fixed capacity) brings `new_pool`, `take` and `put_` of
its own.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from linattn.core.mixer import map_state

S = TypeVar("S", bound=tuple)


def new_pool(state: S, slots: int, capacity: int | None = None) -> S:
    """A pool of ``slots`` empty States like ``state``; ``capacity`` means nothing where a State does not grow."""
    return map_state(lambda leaf: leaf.new_zeros(slots + 1, *leaf.shape[1:]), state)


def pool_rows(leaf: Tensor, slots: Tensor) -> Tensor:
    """The rows int64 [B] of a pool's leaf that slots int [B] name; -1 becomes the row that is no slot."""
    return slots.long() % leaf.shape[0]


def take(pool: S, slots: Tensor) -> S:
    """The States in ``slots`` int [B] of a pool, copied."""
    return map_state(lambda leaf: leaf.index_select(0, slots.long()), pool)


def put_(pool: S, slots: Tensor, state: S) -> None:
    """Write the States ``state`` [B, ...] into ``slots`` int [B] of a pool."""
    for leaf, rows in zip(pool, state, strict=True):
        leaf.index_copy_(0, slots.long(), rows.to(leaf.dtype))
