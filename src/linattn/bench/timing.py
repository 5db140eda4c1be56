"""Timing: several calls interleaved, so that a machine that speeds up or slows down does so for all of them.

A CPU is timed by its clock, a GPU by events around work that the host has had time to enqueue; medians with p20 and
p80, and the fastest. Not a profiler, and not a gate: a time says nothing about whether the result was right.

    pytest tests/test_bench_floor.py -k timing
"""

from __future__ import annotations

import ctypes
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

Call = Callable[[], Any]

HEAD_START, HEAD_START_S = 2.0, 3e-4
"""A GPU sleeps so many times the host's own time of a call, and so many seconds, before the first event.

Launches then never wait for the host, whose first call after a wait is slow: at 1.5 times alone one op read 0.15 ms
where it took 0.09.
"""

CYCLES_PER_SECOND = 2e9
"""Of a GPU's clock, about; only the head start uses it."""

MAX_SETS = 64
"""Input sets that are rotated at most. Tiny inputs stay in cache then, as they would in a model."""

MAX_POOLS = 512
"""Pools of States that a decoding step rotates through at most: a row of 0.7 MB needs 170 to pass a GPU's L2."""


class Timing(NamedTuple):
    """Milliseconds of one call over ``runs`` runs."""

    best_ms: float
    p20_ms: float
    p50_ms: float
    p80_ms: float
    runs: int

    def over(self, count: int) -> Timing:
        """The time of one of ``count`` equal parts of the call."""
        return Timing(self.best_ms / count, self.p20_ms / count, self.p50_ms / count, self.p80_ms / count, self.runs)


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""glibc's names of two settings of malloc."""

NOT_TIMED = Timing(math.nan, math.nan, math.nan, math.nan, 0)


def time_calls(
    calls: Mapping[str, Call],
    *,
    device: str = "cpu",
    repeats: int = 7,
    warmup: int = 1,
    budget_s: float = math.inf,
    before: int = 0,
) -> dict[str, Timing]:
    """Time the calls in turn: a, b, c, a, b, c, ... after ``warmup`` rounds that do not count.

    Args:
        calls: by name; what they return is dropped.
        device: "cpu", "cuda" or "cuda:1".
        repeats: rounds, at least 1.
        budget_s: after so many seconds no further round begins; three are always run (fewer if ``repeats`` is).
        before: how often each is called, untimed, right before it is timed.

    Returns:
        A `Timing` for each name.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    samples = {name: [] for name in calls}
    cuda = torch.device(device).type == "cuda"
    host = {name: _warm(call, warmup, cuda) for name, call in calls.items()}
    deadline = time.perf_counter() + budget_s
    for round_ in range(repeats):
        if round_ >= 3 and time.perf_counter() > deadline:
            break
        for name, call in calls.items():
            for _ in range(before):
                call()
            samples[name].append(_cuda_ms(call, host[name]) if cuda else _cpu_ms(call))
    return {name: summary(ms) for name, ms in samples.items()}


def time_call(call: Call, **options: Any) -> Timing:
    """`time_calls` of one call."""
    return time_calls({"call": call}, **options)["call"]


def summary(ms: Sequence[float]) -> Timing:
    """The fastest, and the 20th, 50th and 80th percentile (linear between samples)."""
    p20, p50, p80 = (float(p) for p in np.percentile(ms, (20, 50, 80)))
    return Timing(min(ms), p20, p50, p80, len(ms))


def over_laps(laps: Sequence[Timing]) -> Timing:
    """One timing of several of the same call with other work between them: each percentile's median over the laps."""
    p20, p50, p80 = (float(p) for p in np.median([(t.p20_ms, t.p50_ms, t.p80_ms) for t in laps], 0))
    return Timing(min(t.best_ms for t in laps), p20, p50, p80, sum(t.runs for t in laps))


def rotate(calls: Sequence[Call]) -> Call:
    """One call that runs the given ones in turn: with inputs of their own, none finds its own in cache."""
    turn = 0

    def call() -> Any:
        nonlocal turn
        turn = (turn + 1) % len(calls)
        return calls[turn]()

    return call


def time_host(call: Call, *, device: str = "cpu", calls: int = 20, repeats: int = 7) -> Timing:
    """One of ``calls`` calls that the host issues one after another, by its clock: what eager code waits for.

    Where launching takes longer than running, this is the launching; `time_calls` hides that.
    """
    cuda = torch.device(device).type == "cuda"
    samples = []
    for _ in range(repeats + 1):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if cuda:
            torch.cuda.synchronize()
        samples.append((time.perf_counter() - start) * 1e3 / calls)
    return summary(samples[1:])


def sets_beyond_cache(bytes_a_set: int, device: str, most: int = MAX_SETS) -> int:
    """How many input sets make twice the GPU's L2: 1 where one alone is larger, and 1 on a CPU.

    A CPU's figures are of warm caches where the inputs fit, as after the layer before.
    """
    if torch.device(device).type != "cuda":
        return 1
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return min(most, max(1, -(-2 * l2 // max(1, bytes_a_set))))


def graph_replay(calls: Sequence[Call]) -> Call:
    """All the calls, one after another, as the replay of one CUDA graph. Divide its time by their number.

    The calls must be capturable: fixed shapes and tensors, no host sync.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]
    # A graph holds addresses only: what the calls hold must outlive it, or replays write into memory of others.
    kept = (results, list(calls))

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


@functools.cache
def keep_pages() -> bool:
    """Ask the C library to keep the pages of freed tensors for the next ones; whether it will.

    glibc gives tensors above 32 MiB back to the kernel, which hands them out again page by page, zeroed: a step in the
    cost of a token where a mixer's tensors pass that size (short convolution with backward, 4,096 tokens of 1,024:
    three faults a token, 15 us for 10). Training loops that matter keep their pages too. For the whole process.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False  # not glibc
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def pages_are_kept() -> bool:
    """Whether `keep_pages` has been called and obeyed."""
    return keep_pages.cache_info().currsize > 0 and keep_pages()


def _warm(call: Call, warmup: int, cuda: bool) -> float:
    """Run the call ``warmup`` times; on a GPU return the seconds that the host needs to enqueue it once more."""
    for _ in range(warmup):
        call()
    if not cuda:
        return 0.0
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds


def _cpu_ms(call: Call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _cuda_ms(call: Call, host_seconds: float) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(min(0.1, HEAD_START * host_seconds + HEAD_START_S) * CYCLES_PER_SECOND))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
