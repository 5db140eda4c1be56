"""From logits to a token: greedy, temperature, top-k, top-p, min-p, repetition penalty.

`probabilities` is the distribution and `sample` one draw from it, so that every filter can be checked by its numbers.
Each row draws from a generator of its own: what is written in a row depends on its logits and its seed alone.

    pytest tests/generate -k sampling
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value} must be {allowed}")


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen. The filters act in this order: penalty, temperature, top-k, top-p, min-p."""

    temperature: float = 1.0
    """Logits are divided by it; 0 is greedy: the largest logit, the lowest id among equals."""
    top_k: int | None = None
    """Keep the k likeliest tokens, and those as likely as the k-th; None keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens until their sum reaches top_p, and those as likely as the last; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least min_p times as likely as the likeliest; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens that were read or written before are divided by it, negative ones multiplied
    (CTRL, arXiv 1909.05858); 1 is off."""
    seed: int = 0
    """Row i of a call draws from seed + i."""

    def __post_init__(self) -> None:
        _require(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 (greedy) or a positive number")
        _require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "at least 1, or None to keep all tokens")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1, which keeps all tokens")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "0, which keeps all tokens, to 1")
        penalty = self.repetition_penalty
        _require(0 < penalty < math.inf, "repetition_penalty", penalty, "a positive number; 1 is off, 1.1 is mild")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2^63 - 1")


GREEDY = SamplingConfig(temperature=0.0)
"""The likeliest token, always."""

DEFAULT = SamplingConfig()
"""The model's own distribution."""


FEW = 1024
"""Tokens that top-p looks at before it sorts them all: 1.6 ms a row of 50,257 instead of 13.6, on one core."""


def row_seeds(config: SamplingConfig, rows: int, seeds: Sequence[int] | None = None) -> list[int]:
    """The seed of each row: ``seeds`` where given, else config.seed + row.

    Raises:
        ValueError: as many seeds as rows are needed.
    """
    if seeds is None:
        return [(config.seed + row) % 2**63 for row in range(rows)]
    if len(seeds) != rows:
        raise ValueError(f"{len(seeds)} seeds for {rows} rows: give one a row, or none to count up from sampling.seed")
    return [int(seed) for seed in seeds]


def row_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator a seed. They live on the CPU, so that a seed gives one text on every device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def seen_tokens(rows: Sequence[Sequence[int] | Tensor], vocab_size: int) -> Tensor:
    """Which tokens stand in each row: bool [B, vocab_size]. Ids beyond the vocabulary have no logit: left out."""
    seen = torch.zeros(len(rows), vocab_size, dtype=torch.bool)
    for mark, row in zip(seen, rows, strict=True):
        ids = torch.as_tensor(row, dtype=torch.int64, device="cpu")
        mark[ids[ids < vocab_size]] = True
    return seen


def probabilities(logits: Tensor, config: SamplingConfig, seen: Tensor | None = None) -> Tensor:
    """The distribution that `sample` draws from: logits [B, V] -> float64 [B, V], rows of sum 1.

    Args:
        logits: of any floating dtype; -inf forbids a token.
        config: its seed is not used.
        seen: bool [B, V], the tokens that the repetition penalty is for (`seen_tokens`).

    Raises:
        ValueError: NaN or +inf among the logits, a row of -inf alone, or shapes that do not fit.
    """
    _check(logits, config, seen)
    x = logits.double()
    if seen is not None and config.repetition_penalty != 1:
        penalized = torch.where(x > 0, x / config.repetition_penalty, x * config.repetition_penalty)
        x = torch.where(seen.to(x.device), penalized, x)
    if config.temperature == 0:
        return torch.zeros_like(x).scatter_(1, x.argmax(1, keepdim=True), 1)
    # The largest becomes 0 first: a small temperature would carry it to infinity.
    x = (x - x.amax(1, keepdim=True)) / config.temperature
    if config.top_k is not None and config.top_k < x.shape[1]:
        x = x.masked_fill(x < x.topk(config.top_k).values[:, -1:], -math.inf)
    p = x.softmax(1)
    if config.top_p < 1:
        p = p.masked_fill(p < _least_likely(p, config.top_p), 0)
    if config.min_p > 0:
        p = p.masked_fill(p < config.min_p * p.amax(1, keepdim=True), 0)
    return p / p.sum(1, keepdim=True)


def sample(
    logits: Tensor,
    config: SamplingConfig,
    generators: Sequence[torch.Generator] | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """One token a row: logits [B, V] -> int64 [B]. Nothing is changed but the generators, by one draw each.

    Args:
        logits, config, seen: as in `probabilities`.
        generators: one a row (`row_generators`); greedy needs none and draws from none.

    Raises:
        ValueError: as in `probabilities`, or no generator for each row.
    """
    p = probabilities(logits, config, seen)
    if config.temperature == 0:
        return p.argmax(1)
    if generators is None or len(generators) != p.shape[0]:
        given = 0 if generators is None else len(generators)
        raise ValueError(f"{given} generators for {p.shape[0]} rows: give one a row, from row_generators(seeds)")
    draws = torch.stack([torch.rand((), dtype=torch.float64, generator=g) for g in generators]).to(p.device)
    # The sums run in the order of ids, not of likelihood: rounding that swaps two neighbours then changes no draw.
    sums = p.cumsum(1)
    # A draw is at most 1 - 2^-53, and its product with the total rounds to less than the total.
    drawn = draws[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, drawn, right=True)[:, 0]


def _least_likely(p: Tensor, top_p: float) -> Tensor:
    """The probability [B, 1] of the last token that a sum of ``top_p`` needs."""
    few = min(FEW, p.shape[1])
    likeliest = p.topk(few).values
    if few < p.shape[1] and bool((likeliest.sum(1) < top_p).any()):
        likeliest = p.sort(dim=1, descending=True).values
    needed = (likeliest.cumsum(1) - likeliest < top_p).sum(1, keepdim=True)
    return likeliest.gather(1, needed - 1)


def _check(logits: Tensor, config: SamplingConfig, seen: Tensor | None) -> None:
    if logits.ndim != 2 or logits.numel() == 0:
        raise ValueError(f"logits must be [B, V] with at least one token, got {list(logits.shape)}")
    if seen is not None and seen.shape != logits.shape:
        raise ValueError(f"seen is {list(seen.shape)}, logits are {list(logits.shape)}: they must agree")
    # NaN is larger than all else in amax, so that one reduction finds all three faults.
    for row, top in enumerate(logits.detach().amax(1).tolist()):
        if math.isfinite(top):
            continue
        if top == -math.inf:
            raise ValueError(f"all logits of row {row} are -inf: leave it at least one token to write")
        raise ValueError(
            f"the logits of row {row} hold {'NaN' if math.isnan(top) else 'inf'}: "
            "the model's weights or state are damaged, or 16-bit sums overflowed; try float32 or bfloat16"
        )
