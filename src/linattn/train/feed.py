"""From the loader to what the loop needs: the micro-batches of an update, at a position that is one integer.

The position counts samples consumed (shuffled windows) or updates (stateful streams). Reading the same position gives
the same tensors, which is all that resuming needs of the data.

    pytest tests/train/test_train_resume.py
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from linattn.data import Loader, StreamBatch, StreamLoader, TokenShards
from linattn.models import ModelState, map_model_state
from linattn.train.config import TrainConfig
from linattn.train.objective import Problem, pose


class Links(NamedTuple):
    """Where carried States enter and leave a packed micro-batch; see `StreamBatch`. All tensors are [rows]."""

    rows: slice
    fresh: Tensor
    first: Tensor
    last: Tensor


class MicroBatch(NamedTuple):
    """One pass through the model. ``links`` is there in stateful training alone."""

    problem: Problem
    links: Links | None


class Feed:
    """The micro-batches of each update.

    Attributes:
        advance: what an update adds to the position.

    Raises:
        ValueError: too little text for the configuration.
    """

    def __init__(self, config: TrainConfig, shards: TokenShards):
        self._config, rows = config, config.micro_rows
        self._micros = config.batch // rows
        packed = config.objective.reset_documents
        if config.stateful:
            # Micro-batch i reads what rank i of as many would.
            self._streams = [
                StreamLoader(
                    shards, length=config.length, batch=config.batch, rank=i, world=self._micros, packed=packed
                )
                for i in range(self._micros)
            ]
            self.advance = 1
        else:
            self._loader = Loader(shards, length=config.length, batch=rows, seed=config.seed, packed=packed)
            self.advance = config.batch

    def at(self, position: int) -> list[MicroBatch]:
        """The update at ``position``."""
        return [self._micro(position, i) for i in range(self._micros)]

    def describe(self, position: int, micro: int | None = None) -> str:
        """Which text the update at ``position`` reads, or its micro-batch ``micro`` alone, for people."""
        rows = self._config.batch if micro is None else self._config.micro_rows
        first = (micro or 0) * rows
        if self._config.stateful:
            return f"rows {first} to {first + rows - 1} of stream position {position}"
        return f"samples {position + first} to {position + first + rows - 1} (seed {self._config.seed})"

    def _micro(self, position: int, i: int) -> MicroBatch:
        config, rows = self._config, self._config.micro_rows
        if config.stateful:
            batch = self._streams[i].at(position)
            links = Links(slice(i * rows, (i + 1) * rows), batch.fresh, batch.first, batch.last)
        else:
            batch, links = self._loader.at(position + i * rows), None
        samples = [] if isinstance(batch, StreamBatch) else range(position + i * rows, position + (i + 1) * rows)
        return MicroBatch(pose(config.objective, batch, config.model, config.seed, samples), links)


def carry_in(carried: ModelState, empty: ModelState, links: Links, documents: int) -> ModelState:
    """The state of N packed documents: the carried one where a row goes on, ``empty`` (1 row) everywhere else."""
    rows = torch.arange(links.rows.start, links.rows.stop)
    source = torch.full((documents,), -1)  # the last row: empty
    source[links.first] = torch.where(links.fresh, -1, rows)

    def leaf(a: Tensor, b: Tensor) -> Tensor:
        joined = torch.cat([a, b])
        return joined[(source % len(joined)).to(a.device)]

    return map_model_state(leaf, carried, empty)


def carry_out(carried: ModelState, after: ModelState, links: Links) -> ModelState:
    """``carried`` with this micro-batch's rows as they are after it, without their history of gradients."""

    def leaf(a: Tensor, b: Tensor) -> Tensor:
        a = a.clone()
        a[links.rows] = b.detach()[links.last.to(b.device)].to(a.dtype)
        return a

    return map_model_state(leaf, carried, after)
