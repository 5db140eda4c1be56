"""Held-out loss: nats a token, perplexity, bits per byte.

Every target of the split counts once, however the windows fall. A window starts with nothing read, so a larger length
measures with more context.

    pytest tests/train -k evaluat
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from linattn.data import Tokenizer, TokenShards, validation_batches
from linattn.models import Decoder, ModelConfig
from linattn.train.objective import IGNORED, Objective, default_objective, pose, term_sums


@dataclass(frozen=True)
class Evaluation:
    """nats: the sum over all targets. tokens: how many. bytes: the UTF-8 text that those tokens spell."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of a token, in nats."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is beyond floating point."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits that the tokens cost, an end of document included, over the bytes of text they spell."""
        return self.nats / math.log(2) / self.bytes

    def as_metrics(self) -> dict[str, float]:
        """What metrics.jsonl holds of it."""
        return {"val_loss": self.loss, "val_perplexity": self.perplexity, "val_bits_per_byte": self.bits_per_byte}


@torch.no_grad()
def evaluate(
    model: Decoder,
    config: ModelConfig,
    shards: TokenShards,
    tokenizer: Tokenizer,
    *,
    length: int,
    batch: int,
    objective: Objective | None = None,
    limit: int | None = None,
    chunk: int | None = 4096,
    bf16: bool = False,
    stop: Callable[[], bool] | None = None,
) -> Evaluation | None:
    """Score a split in windows of ``length`` tokens, ``batch`` at a time, in order.

    Prefix models read the first tokens of each window without causality, none of them hidden, and are scored on what
    they are asked for in training: the tokens after the prefix.

    Args:
        model, config: the model and what it was built from.
        shards: the split, usually "validation".
        tokenizer: the split's; counts the bytes.
        length, batch: tokens in a window, windows in a forward pass.
        objective: by default the model's own.
        limit: batches to read; None reads all.
        chunk: tokens whose logits live at a time.
        bf16: whether under autocast.
        stop: asked before each batch; once true, the evaluation is given up.

    Returns:
        The result; None if stopped.

    Raises:
        ValueError: nothing to score.
    """
    objective = default_objective(config) if objective is None else objective
    device, training = model.embedding.weight.device, model.training
    model.eval()
    nats, tokens, size = torch.zeros((), dtype=torch.float64), 0, 0
    batches = validation_batches(shards, length=length, batch=batch, packed=objective.reset_documents)
    try:
        for found in islice(batches, limit):
            if stop is not None and stop():
                return None
            problem = pose(objective, found, config, 0, [])
            targets = problem.terms[0].targets
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                sums, _ = term_sums(model, problem._replace(terms=problem.terms[:1]).to(device), chunk)
            nats += sums["next_token"].double().cpu()
            tokens += int((targets != IGNORED).sum())
            size += spelled_bytes(tokenizer, targets)
    finally:
        model.train(training)
    if not tokens or not size:
        raise ValueError(f"{shards.path}: {shards.split} gives no targets in windows of {length}; prepare more text")
    return Evaluation(float(nats), tokens, size)


def spelled_bytes(tokenizer: Tokenizer, targets: Tensor) -> int:
    """Bytes of UTF-8 that the targets other than -100 spell: exact for bytes; for others but for a character that the
    first or last target holds a part of.
    """
    ids = targets[targets != IGNORED]
    if tokenizer.name == "bytes":
        return int((ids < 256).sum())
    return len(tokenizer.decode(ids.tolist()).encode())
