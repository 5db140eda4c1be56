"""What a model is asked to predict: the next token, or JRT's masked tokens of the prefix and the next ones after it.

An objective turns a batch of the loader into a `Problem`, tensors only, and never sees the model. `term_sums` runs a
model on one. Losses are sums, so that the loop can divide by the targets of all micro-batches and ranks together.

    pytest tests/train -k objective
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linattn.core.shapes import document_of_token
from linattn.data import Batch, StreamBatch
from linattn.models import Decoder, JRTConfig, ModelConfig, ModelState

IGNORED = -100
"""The target of a position that has no loss."""


@dataclass(frozen=True)
class NextToken:
    """Every token predicts the next one of its document."""

    reset_documents: bool = True
    """Whether each document starts with nothing read. The published runs let packed documents see their neighbours."""


@dataclass(frozen=True)
class JRT:
    """JRT-RNN's objective (arXiv 2407.05483): ``next token + mask_weight * masked token``.

    The first M = min(prefix_length, half of the tokens) are the prefix, read without causality. Some of them are
    hidden behind the mask token, to be named where they stand; tokens after the prefix are predicted one by one.
    Published: not divided by 1 + mask_weight, though the paper's equation 5 is.
    """

    mask_rate: float = 0.15
    """The chance of each prefix token to be hidden; every hidden one becomes the mask token."""
    mask_weight: float = 0.25
    """Weight of the masked-token loss beside the next-token loss."""
    paper_targets: bool = False
    """Leave token M unpredicted, as published. By default position M-1 predicts it: a prompt of exactly M tokens takes
    its first new token from there."""
    reset_documents: bool = False
    """False, as published: a row is one text with one prefix of M. True: each packed document has a prefix of its
    own, half of it and at most M."""

    def __post_init__(self) -> None:
        if not 0 <= self.mask_rate <= 1:
            raise ValueError(f"objective.mask_rate={self.mask_rate} is a probability; the published one is 0.15")
        if not 0 <= self.mask_weight < float("inf"):
            raise ValueError(f"objective.mask_weight={self.mask_weight} must be a number of at least 0")


Objective = NextToken | JRT


class Term(NamedTuple):
    """One sum of the loss: the tokens ``rows`` (a slice of the time axis) against targets int64 [B, len(rows)]."""

    name: str
    weight: float
    rows: slice
    targets: Tensor


class Problem(NamedTuple):
    """What the model reads and what is asked of it.

    tokens: int64 [B, T], or packed [1, T] with cu_seqlens int32 [N+1]. prefix_lengths: int64 [B] or [N].
    terms: the first is the next-token loss, in every objective.
    """

    tokens: Tensor
    cu_seqlens: Tensor | None
    prefix_lengths: Tensor | None
    terms: tuple[Term, ...]

    def to(self, device: torch.device) -> Problem:
        """The same tensors on ``device``."""

        def move(x: Tensor | None) -> Any:
            return None if x is None else x.to(device, non_blocking=True)

        terms = tuple(term._replace(targets=move(term.targets)) for term in self.terms)
        return Problem(move(self.tokens), move(self.cu_seqlens), move(self.prefix_lengths), terms)


def default_objective(model: ModelConfig) -> Objective:
    """The objective that a model was made for."""
    return JRT() if isinstance(model, JRTConfig) else NextToken()


def pose(
    objective: Objective, batch: Batch | StreamBatch, model: ModelConfig, seed: int, samples: Sequence[int]
) -> Problem:
    """The problem of one batch.

    Args:
        objective: what is asked.
        batch: from the loader; B rows of T tokens.
        model: its configuration: the prefix's length and the mask token.
        seed, samples: the masks of row i are drawn from (seed, samples[i]) alone, so they do not depend on how rows
            are spread over micro-batches and ranks, nor on where a run was interrupted. No samples: nothing is
            hidden, as in evaluation.

    Raises:
        ValueError: JRT's objective for a model without a prefix.
    """
    if isinstance(objective, NextToken):
        return next_token(batch)
    if not isinstance(model, JRTConfig):
        raise ValueError(f"the JRT objective needs a JRTConfig, not a {type(model).__name__}: use NextToken")
    return jrt(objective, batch, model.prefix_length, model.mask_id, seed, samples)


def next_token(batch: Batch | StreamBatch) -> Problem:
    """Every target that the loader gives; packed if the batch is."""
    tokens, targets = _rows(batch)
    return Problem(tokens, batch.cu_seqlens, None, (Term("next_token", 1.0, slice(None), targets),))


def jrt(
    objective: JRT, batch: Batch | StreamBatch, prefix_length: int, mask_id: int, seed: int, samples: Sequence[int]
) -> Problem:
    """JRT's two terms. The masked-token targets are unshifted: position i is asked for token i.

    The published code left out masked tokens of id 0 by an oversight; here they count.
    """
    tokens, targets = _rows(batch)
    longest = min(prefix_length, batch.tokens.shape[1] // 2)
    if batch.cu_seqlens is None:
        lengths = torch.full((tokens.shape[0],), longest)
        of_token = lengths[:, None]
    else:
        lengths = (batch.cu_seqlens.diff().long() // 2).clamp(max=longest)
        of_token = lengths[document_of_token(batch.cu_seqlens, tokens.shape[1])][None]
    place = batch.positions.view_as(tokens)
    prefix = place < of_token
    hidden = prefix & (_draws(seed, samples, batch.tokens.shape).view_as(tokens) < objective.mask_rate)
    asked = place >= (of_token if objective.paper_targets else of_token - 1)
    after = torch.where(asked, targets, IGNORED)
    masked = torch.where(hidden, tokens, IGNORED)
    # In unpacked rows the prefix is the same in each, so the head need not run where no target can be.
    first = slice(None) if batch.cu_seqlens is not None else slice(0, longest)
    rest = slice(None) if batch.cu_seqlens is not None else slice(max(0, longest - 1), None)
    terms = (
        Term("next_token", 1.0, rest, after[:, rest]),
        Term("masked_token", objective.mask_weight, first, masked[:, first]),
    )
    return Problem(torch.where(hidden, mask_id, tokens), batch.cu_seqlens, lengths, terms)


def count_targets(problems: Sequence[Problem]) -> dict[str, int]:
    """How many targets each term has over all ``problems``."""
    counts: dict[str, int] = {}
    for problem in problems:
        for term in problem.terms:
            counts[term.name] = counts.get(term.name, 0) + int((term.targets != IGNORED).sum())
    return counts


def term_sums(
    model: Decoder, problem: Problem, chunk: int | None = None, state: ModelState | None = None, run: Any = None
) -> tuple[dict[str, Tensor], ModelState | None]:
    """Each term's sum of losses in nats, differentiable, and the state after the tokens if one came in.

    Args:
        model: whose `loss` is taken.
        problem: on the model's device.
        chunk: rows of logits that live at a time.
        state: what each row or document had read before.
        run: the model's forward in another form, such as ``torch.compile(model)``.
    """
    out = (model if run is None else run)(
        problem.tokens,
        state=state,
        cu_seqlens=problem.cu_seqlens,
        prefix_lengths=problem.prefix_lengths,
        logits="none",
        return_state=state is not None,
    )
    sums = {
        term.name: model.loss(out.hidden[:, term.rows], term.targets, chunk, reduction="sum") for term in problem.terms
    }
    return sums, out.state


def _rows(batch: Batch | StreamBatch) -> tuple[Tensor, Tensor]:
    """Tokens and targets as the model reads them: one row if packed."""
    if batch.cu_seqlens is None:
        return batch.tokens, batch.targets
    return batch.tokens.view(1, -1), batch.targets.view(1, -1)


def _draws(seed: int, samples: Sequence[int], shape: torch.Size) -> Tensor:
    """Uniform numbers [B, T], row i from (seed, samples[i]); all 2, so that nothing is hidden, without samples."""
    if not len(samples):
        return torch.full(shape, 2.0)
    if len(samples) != shape[0]:
        raise ValueError(f"{len(samples)} samples for the {shape[0]} rows of a batch: give one each")
    rows = []
    for sample in samples:
        digest = hashlib.blake2b(f"mask {seed} {sample}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        rows.append(torch.rand(shape[1], generator=generator))
    return torch.stack(rows)
