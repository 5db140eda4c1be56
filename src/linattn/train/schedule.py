"""The learning rate as a pure function of how far a run has come. It holds no state, so there is none to save.

Not here: the optimizer (optim.py), which is only told a number before each update.

    pytest tests/train -k schedule
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up, then half a cosine down to ``min_lr`` at the run's end. The defaults are Based's (10B tokens)."""

    warmup_steps: int = 200
    """Updates of the linear warm-up; part of the run's steps, not beside them."""
    warmup_from: float = 1e-6
    """Learning rate of the first update."""
    min_lr: float = 8e-5
    """Learning rate at the end."""

    def __post_init__(self) -> None:
        _check(self.warmup_steps, self.warmup_from, self.min_lr)


@dataclass(frozen=True)
class WSD:
    """Linear warm-up, a constant rate, then a decay over the last part of the run (arXiv 2404.06395)."""

    warmup_steps: int = 200
    """Updates of the linear warm-up."""
    warmup_from: float = 1e-6
    """Learning rate of the first update."""
    decay: float = 0.2
    """The fraction of the run, at its end, in which the rate decays."""
    shape: Literal["linear", "sqrt", "cosine"] = "sqrt"
    """Of the decay; sqrt is 1 - sqrt(x), the best of those compared in arXiv 2405.18392."""
    min_lr: float = 0.0
    """Learning rate at the end."""

    def __post_init__(self) -> None:
        _check(self.warmup_steps, self.warmup_from, self.min_lr)
        if not 0 < self.decay <= 1:
            raise ValueError(f"schedule.decay={self.decay} is a fraction of the run; it must be above 0 and at most 1")
        if self.shape not in ("linear", "sqrt", "cosine"):
            raise ValueError(f"schedule.shape={self.shape!r} is not one of ['linear', 'sqrt', 'cosine']")


def run_fraction(step: int, steps: int, seconds: float = 0.0, max_seconds: float | None = None) -> float:
    """How much of a run is over, 0 to 1: by updates or by the clock, whichever is further."""
    by_clock = 0.0 if max_seconds is None else seconds / max_seconds
    return min(1.0, max(step / steps, by_clock))


def learning_rate(schedule: Cosine | WSD, peak: float, step: int, steps: int, fraction: float | None = None) -> float:
    """The rate of the update that follows ``step`` updates of ``steps``.

    ``fraction`` is `run_fraction`, by default step / steps. The warm-up counts updates; what follows it goes by the
    fraction, so that a run with a budget of seconds decays to its end too.
    """
    if step < schedule.warmup_steps:
        return schedule.warmup_from + (peak - schedule.warmup_from) * step / schedule.warmup_steps
    fraction = step / steps if fraction is None else fraction
    if isinstance(schedule, Cosine):
        begin = schedule.warmup_steps / steps
        kept = _cosine(_part(fraction, begin))
    else:
        x = _part(fraction, 1 - schedule.decay)
        kept = {"linear": 1 - x, "sqrt": 1 - math.sqrt(x), "cosine": _cosine(x)}[schedule.shape]
    return schedule.min_lr + (peak - schedule.min_lr) * kept


def _part(fraction: float, begin: float) -> float:
    """How much of the stretch from ``begin`` to 1 is over."""
    return 1.0 if begin >= 1 else min(1.0, max(0.0, (fraction - begin) / (1 - begin)))


def _cosine(x: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * x))


def _check(warmup_steps: int, warmup_from: float, min_lr: float) -> None:
    if warmup_steps < 0:
        raise ValueError(f"schedule.warmup_steps={warmup_steps} must be at least 0; 0 starts at the full rate")
    for name, value in (("warmup_from", warmup_from), ("min_lr", min_lr)):
        if not 0 <= value < math.inf:
            raise ValueError(f"schedule.{name}={value} must be a number of at least 0")
