"""What one run of the bench measures, and what is timed of it: the values that calls.py, ops.py and the pages share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from linattn.core.mixer import Mixer

STEPS = 1024
"""Room in a softmax pool for the steps of warm-up and timing together."""

ANOTHER_OP = "another op"
"""The verdict on a peer that computes something else, such as softmax attention: timed, not compared."""

REFUSED = "refused"
"""What the verdict on a backend begins with that does not take the call; another may, and then no gate has failed."""

STEP_LAW = "decode_is_the_fold"
"""What another way of decoding must keep."""

HOST, IN_GRAPH = ", host included", " in a CUDA graph"
"""What follows an implementation's name where it is timed in these other ways too."""

FLOPS_PER_S = 6e14
"""Above what attention kernels reach on one H200 in bf16: by it a quadratic peer is left out before it runs."""


class Entry(NamedTuple):
    """One line of a measurement before it is timed: what runs, in ``parts`` equal parts, and whether it may.

    host: whether the host's time of launching is part of what is asked for.
    """

    impl: str
    call: Callable[[], Any] | None
    verdict: str
    given_bytes: int = 0
    parts: int = 1
    host: bool = False


@dataclass(frozen=True)
class Setting:
    """What one run measures, apart from cases and passes.

    impls: names wanted, None for all. graph: time replays of a CUDA graph. host: besides, time eager calls with the
    host's share, and ours as a graph. absent: give a peer that cannot be had a line of its own. slow_s: a quadratic
    peer expected to take longer is not run. laws: of the gate; none: all. verdicts: those already given in this run.
    """

    op: str
    mixer: Mixer
    device: str
    dtype: torch.dtype
    impls: Sequence[str] | None = None
    graph: bool = False
    host: bool = False
    absent: bool = False
    slow_s: float = float("inf")
    laws: Sequence[str] = ()
    say: Callable[[str], object] | None = None
    verdicts: dict[tuple[str, str, str], str] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        """Whether on a GPU."""
        return torch.device(self.device).type == "cuda"

    def wants(self, impl: str) -> bool:
        """Whether an implementation is asked for."""
        return self.impls is None or impl in self.impls


Entries = tuple[list[Entry], list[tuple[str, str]]]
"""What to time, and (name, reason) of what cannot be had."""


def in_words(error: Exception) -> str:
    """The verdict on what an exception stopped."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    first = (str(error).splitlines() or [""])[0].strip()
    return f"error: {type(error).__name__}" + (f": {first[:120]}" if first else "")
