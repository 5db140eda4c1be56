"""Measuring one op: the gate, then ours and every peer in turn, beside the floor, as a table and as records.

linattn bench taylor --cases b1-h4-t4096-f16-v64
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from linattn.bench.cases import (
    MIXERS,
    BenchCase,
    Pass,
    at_length,
    batch_of,
    case_name,
    check_op,
    draw_inputs,
    length_of,
    parse_case,
    real_cases,
)
from linattn.bench.costs import costs
from linattn.bench.floor import Ceilings, floor_ms, measure_ceilings
from linattn.bench.gate import OK, gate, parity_at_size
from linattn.bench.memory import peak_bytes
from linattn.bench.peers import Peer, Ready, leaf, peers_of
from linattn.bench.record import RESULTS, Machine, Record, append_records, machine, results_path
from linattn.bench.table import print_records
from linattn.bench.timing import NOT_TIMED, Timing, graph_replay, rotate, sets_beyond_cache, time_calls
from linattn.core.dispatch import BackendError
from linattn.core.mixer import Mixer, state_bytes
from linattn.core.numerics import TORCH_TOLERANCE, relative_error

STEPS = 1024
"""Room in a softmax pool for the steps of warm-up and timing together."""

ANOTHER_OP = "another op"


class Entry(NamedTuple):
    """One line of a measurement before it is timed: what runs, in ``parts`` equal parts, and whether it may."""

    impl: str
    call: Callable[[], Any] | None
    verdict: str
    given_bytes: int = 0
    parts: int = 1


def bench_op(
    op: str,
    *,
    cases: Sequence[str | BenchCase] | None = None,
    passes: Sequence[Pass] = ("fwd", "fwdbwd"),
    impls: Sequence[str] | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    repeats: int = 20,
    budget_s: float = 20.0,
    graph: bool = False,
    record: bool = False,
    out: Path = RESULTS,
    mixer: Mixer | None = None,
    commit: str = "",
    ceilings: Ceilings | None = None,
    console: Console | None = None,
) -> list[Record]:
    """Gate, time and print one op; append the records if asked to.

    Args:
        op: a name in `cases.MIXERS`.
        cases: names or cases; None takes the published shapes.
        passes: "fwd" without gradients, with the final State; "fwdbwd" as a training layer, without it, gradients of
            everything; "step" one token a row out of a pool.
        impls: names to measure: "linattn" (the backend chosen), "linattn:BACKEND", a peer's name. None: all.
        repeats, budget_s: rounds of each case and pass, and the seconds after which none begins.
        graph: on CUDA, time replays of a graph; steps always are.
        record, out: whether and under which folder to append to <gpu>/<op>.csv.
        mixer: stands in for the op's own, for a test of the gate.
        commit: of the tree that runs, where it was copied without its history.
        ceilings: of this machine, if known; measured otherwise.

    Returns:
        A record for each case, pass and implementation. One that fails the gate has no times.

    Raises:
        ValueError: an unknown op, pass or implementation, or a case that cannot be read.
    """
    check_op(op)
    wanted = [parse_case(op, c) if isinstance(c, str) else c for c in (real_cases(op) if cases is None else cases)]
    mixer = MIXERS[op] if mixer is None else mixer
    _check_impls(op, mixer, impls)
    _check_passes(passes)
    console = Console() if console is None else console
    here, limits = machine(device, commit), measure_ceilings(device) if ceilings is None else ceilings
    records: list[Record] = []
    for case in wanted:
        for pass_ in passes:
            build = _step_entries if pass_ == "step" else _entries
            entries, missing = build(op, mixer, case, pass_, impls, device, dtype, graph)
            rows = _measure(entries, device, repeats, budget_s)
            least = floor_ms(costs(case, pass_, dtype), limits, dtype)
            new = [_record(here, op, case, pass_, dtype, least, *row) for row in rows]
            records += new
            print_records(console, new, missing)
            if record:
                append_records(results_path(op, device, out), new)
            del entries
            if torch.device(device).type == "cuda":
                torch.cuda.empty_cache()
    return records


def _check_impls(op: str, mixer: Mixer, impls: Sequence[str] | None) -> None:
    known = ["linattn", *(f"linattn:{b}" for b in mixer.backends), *(p.name for p in peers_of(op))]
    for name in impls or ():
        if name not in known:
            raise ValueError(f"{op}: unknown implementation {name!r}; choose from {known}")


def _check_passes(passes: Sequence[str]) -> None:
    for pass_ in passes:
        if pass_ not in ("fwd", "fwdbwd", "step"):
            raise ValueError(f"unknown pass {pass_!r}; choose from ['fwd', 'fwdbwd', 'step']")


def _ours(
    mixer: Mixer, inputs: dict[str, Any], grad: bool, impls: Sequence[str] | None
) -> tuple[list[tuple[str, str | None]], list[tuple[str, str]]]:
    """Names of ours to measure with the backend that each asks for, and backends that refuse, with their reasons."""
    able: list[tuple[str, str | None]] = []
    refusing: list[tuple[str, str]] = []
    for backend in mixer.backends:
        name, reason = f"linattn:{backend}", _refusal(mixer, inputs, grad, backend)
        if impls is None or name in impls:
            able += [] if reason else [(name, backend)]
            refusing += [(name, reason)] if reason else []
    if impls is None and len(able) == 1:
        able = []  # it is what would be chosen, and need not be measured under both names
    return ([("linattn", None)] if impls is None or "linattn" in impls else []) + able, refusing


def _refusal(mixer: Mixer, inputs: dict[str, Any], grad: bool, backend: str) -> str:
    """Why a backend would not run the op on the first tokens of these inputs; empty where it would."""
    few = {n: x[:1, :64] if isinstance(x, Tensor) and "T" in mixer.axes.get(n, "") else x for n, x in inputs.items()}
    few = {n: x[:1] if isinstance(x, Tensor) and mixer.axes.get(n, "")[:1] == "B" else x for n, x in few.items()}
    try:
        ready = own(mixer, few, backend, grad)
        ready.run() if grad else no_grad(ready.run)
    except BackendError as error:
        return str(error).splitlines()[-1].strip().removeprefix(f"{backend}: ")
    return ""


def _entries(
    op: str,
    mixer: Mixer,
    case: BenchCase,
    pass_: Pass,
    impls: Sequence[str] | None,
    device: str,
    dtype: torch.dtype,
    graph: bool,
) -> tuple[list[Entry], list[tuple[str, str]]]:
    """What to time of a forward pass, with or without backward, and the peers that cannot be had, with reasons."""
    grad = pass_ == "fwdbwd"
    first = draw_inputs(op, case, dtype, device)
    given = sum(x.numel() * x.element_size() for x in first.values() if isinstance(x, Tensor))
    sets = [first, *(draw_inputs(op, case, dtype, device, seed) for seed in range(1, sets_beyond_cache(given, device)))]
    graph = graph and torch.device(device).type == "cuda"
    entries = []
    ours, missing = _ours(mixer, first, grad, impls)
    for name, backend in ours:
        verdict = _judge(mixer, case, first, backend, dtype, device)
        ready = [own(mixer, inputs, backend, grad) for inputs in sets] if verdict == OK else []
        entries.append(_entry(name, ready, verdict, grad, graph))
    for peer in peers_of(op):
        if impls is not None and peer.name not in impls:
            continue
        ready = [peer.build(op, inputs, grad) for inputs in sets]
        reasons = [r for r in ready if isinstance(r, str)]
        if reasons:
            missing.append((peer.name, reasons[0]))
            continue
        verdict = _judge_peer(op, mixer, peer, case, dtype, device)
        name = f"{peer.name} {peer.version()}".strip()
        try:
            entries.append(_entry(name, [r for r in ready if isinstance(r, Ready)], verdict, grad, graph))
        except Exception as error:  # noqa: BLE001  what a graph cannot capture; ours go on
            entries.append(Entry(name, None, f"error: {type(error).__name__}"))
    return entries, missing


def own(mixer: Mixer, inputs: dict[str, Any], backend: str | None, grad: bool) -> Ready:
    """Ours as a call: with the final State where no gradient is asked for, as a training layer without it."""
    leaves = {n: leaf(x, grad) for n, x in inputs.items() if _moving(mixer, n, x)}
    options: dict[str, Any] = {"backend": backend, "return_state": not grad}
    return Ready(lambda: mixer.forward({**inputs, **leaves}, **options)[0], tuple(leaves.values()))


def _moving(mixer: Mixer, name: str, x: Any) -> bool:
    """Whether a gradient is asked for: of what has rows, and of filters; not of a decay, which models keep constant."""
    return isinstance(x, Tensor) and x.is_floating_point() and mixer.axes.get(name, "") not in ("", "H")


def _entry(impl: str, ready: list[Ready], verdict: str, grad: bool, graph: bool) -> Entry:
    if not ready:
        return Entry(impl, None, verdict)
    calls = [backward_call(r) if grad else partial(no_grad, r.run) for r in ready]
    given = sum(x.numel() * x.element_size() for x in ready[0].leaves)
    if graph:
        return Entry(impl, graph_replay(calls), verdict, given, len(calls))
    return Entry(impl, rotate(calls), verdict, given)


def no_grad(run: Callable[[], Tensor]) -> Tensor:
    """The call as inference makes it."""
    with torch.no_grad():
        return run()


def backward_call(ready: Ready) -> Callable[[], Any]:
    """Forward and backward from one random gradient of y, drawn at the first call."""
    kept: list[Tensor] = []

    def call() -> Any:
        y = ready.run()
        if not kept:
            kept.append(torch.randn_like(y))
        return torch.autograd.grad(y, ready.leaves, kept[0])

    return call


def _judge(
    mixer: Mixer, case: BenchCase, inputs: dict[str, Any], backend: str | None, dtype: torch.dtype, device: str
) -> str:
    """The gate's verdict on a backend, or on the one that would be chosen."""
    only = mixer.backends[0] if len(mixer.backends) == 1 else None
    verdict = gate(mixer, case, backend=backend or only, dtype=dtype, device=device)
    if verdict != OK or torch.device(device).type != "cuda":
        return verdict
    return parity_at_size(mixer, inputs, backend=backend)


def _judge_peer(op: str, mixer: Mixer, peer: Peer, case: BenchCase, dtype: torch.dtype, device: str) -> str:
    """ok, parity, or another op: a peer's output on up to 512 tokens of the case, against the float64 definition."""
    if not peer.computes(op):
        return ANOTHER_OP
    few = at_length(case, min(length_of(case), 512))
    inputs = draw_inputs(op, few, dtype, device)
    ready = peer.build(op, inputs, False)
    if isinstance(ready, str):
        return OK
    try:
        y = no_grad(ready.run)
    except Exception as error:  # noqa: BLE001  whatever a peer raises is its verdict, and ours go on
        return f"error: {type(error).__name__}"
    wide = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in inputs.items()}
    want, _ = MIXERS[op].reference(wide)
    return OK if relative_error(y, want, (0, 2)) <= 2 * TORCH_TOLERANCE[dtype] else "parity"


def _step_entries(
    op: str,
    mixer: Mixer,
    case: BenchCase,
    pass_: Pass,
    impls: Sequence[str] | None,
    device: str,
    dtype: torch.dtype,
    graph: bool,
) -> tuple[list[Entry], list[tuple[str, str]]]:
    """One token a row out of pools of States that have read something; on CUDA replays over pools beyond the L2."""
    cuda = torch.device(device).type == "cuda"
    read = length_of(case) if op == "softmax" else 256
    inputs = draw_inputs(op, at_length(case, read), dtype, device)
    state = mixer.summarize(inputs)
    batch = batch_of(case)
    token = {
        n: x[:, 0].clone() if "T" in mixer.axes.get(n, "") else x for n, x in inputs.items() if n not in mixer.once
    }
    slots = torch.arange(batch, dtype=torch.int32, device=device)
    pools = []
    for _ in range(sets_beyond_cache(state_bytes(state), device)):
        pool = mixer.new_pool(state, batch, read + STEPS)
        mixer.put_(pool, slots, state)
        pools.append(pool)
    entries = []
    ours, missing = _ours(mixer, inputs, False, impls)
    for name, backend in ours:
        verdict = _judge(mixer, case, inputs, backend, dtype, device)
        calls = [partial(mixer.step_, token, pool, slots, backend=backend) for pool in pools]
        if verdict != OK:
            entries.append(Entry(name, None, verdict))
        elif cuda:
            entries.append(Entry(name, graph_replay(calls), verdict, parts=len(calls)))
        else:
            entries.append(Entry(name, rotate(calls), verdict))
    return entries, missing


def _measure(entries: list[Entry], device: str, repeats: int, budget_s: float) -> list[tuple[str, str, Timing, int]]:
    """(impl, verdict, timing of one call, peak bytes); one that fails in its first run is not timed."""
    able: dict[str, Entry] = {}
    peaks: dict[str, int] = {}
    verdicts = {e.impl: e.verdict for e in entries}
    for entry in entries:
        if entry.call is None:
            continue
        try:
            peaks[entry.impl] = _peak(entry, device)
            able[entry.impl] = entry
        except torch.OutOfMemoryError:
            verdicts[entry.impl] = "out of memory"
        except BackendError:
            verdicts[entry.impl] = "refused"
        except Exception as error:  # a peer's failure is its row; ours is a bug, and must be seen
            if entry.impl.startswith("linattn"):
                raise
            verdicts[entry.impl] = f"error: {type(error).__name__}"
    calls = {name: entry.call for name, entry in able.items() if entry.call is not None}
    times = time_calls(calls, device=device, repeats=repeats, budget_s=budget_s)
    return [
        (
            e.impl,
            verdicts[e.impl],
            times[e.impl].over(e.parts) if e.impl in times else NOT_TIMED,
            peaks.get(e.impl, 0),
        )
        for e in entries
    ]


def _peak(entry: Entry, device: str) -> int:
    """Peak bytes of one call after a first one; a graph's memory is set aside beforehand and not counted: 0."""
    assert entry.call is not None
    entry.call()
    if entry.parts > 1:
        return 0
    given = entry.given_bytes if torch.device(device).type == "cuda" else 0
    return peak_bytes(entry.call, device) + given


def _record(
    here: Machine,
    op: str,
    case: BenchCase,
    pass_: Pass,
    dtype: torch.dtype,
    least: float,
    impl: str,
    verdict: str,
    timing: Timing,
    peak: int,
) -> Record:
    return new_record(
        here, op, case_name(case, pass_), pass_, impl, timing, floor=least, verdict=verdict, dtype=dtype, peak=peak
    )


def new_record(
    here: Machine,
    op: str,
    case: str,
    pass_: str,
    impl: str,
    timing: Timing,
    *,
    floor: float = math.nan,
    verdict: str = OK,
    dtype: torch.dtype = torch.float32,
    peak: int = 0,
) -> Record:
    """A record of this machine."""
    return Record(
        **vars(here),
        op=op,
        case=case,
        pass_=pass_,
        impl=impl,
        p20_ms=timing.p20_ms,
        p50_ms=timing.p50_ms,
        p80_ms=timing.p80_ms,
        floor_ms=floor,
        gate=verdict,
        dtype=str(dtype).removeprefix("torch."),
        best_ms=timing.best_ms,
        runs=timing.runs,
        peak_bytes=peak,
    )
