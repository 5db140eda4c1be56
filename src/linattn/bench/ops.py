"""Measuring one op: the gate, then ours and every peer in turn, beside the floor, as a table and as records.

linattn bench taylor --cases b1-h4-t4096-f16-v64
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from linattn.bench.calls import entries_of
from linattn.bench.cases import MIXERS, BenchCase, Pass, case_name, check_op, parse_case, real_cases
from linattn.bench.costs import costs
from linattn.bench.floor import Ceilings, floor_ms, measure_ceilings
from linattn.bench.gate import OK, check_laws
from linattn.bench.memory import peak_bytes
from linattn.bench.peers import RIVALS, peers_of
from linattn.bench.record import RESULTS, Machine, Record, append_records, machine, results_path
from linattn.bench.setting import REFUSED, Entry, Setting, in_words
from linattn.bench.table import print_records
from linattn.bench.tables import Row
from linattn.bench.timing import NOT_TIMED, Timing, over_laps, time_calls, time_host
from linattn.core.dispatch import BackendError
from linattn.core.mixer import Mixer

SLOW_S = 0.3
"""In a table, a call that takes longer is timed once, and a quadratic peer expected to is not run."""

TABLE_ROUNDS, TABLE_BUDGET_S = 30, 2.0
"""Rounds of each case and pass of a table, and the seconds after which none begins: a table in four minutes."""

LAPS = 3
"""How often rows whose times are compared are gone through, with a third of the rounds: the same kernel took an H200
4.5 ms or 5.0, by what it had done in the seconds before."""


class Measured(NamedTuple):
    """What became of an entry: its verdict, the time of one call, and the peak of its memory."""

    impl: str
    verdict: str
    timing: Timing
    peak: int


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
    setting = Setting(op, mixer, device, dtype, impls, graph)
    here, limits = machine(device, commit), measure_ceilings(device) if ceilings is None else ceilings
    path = results_path(op, device, out) if record else None
    records: list[Record] = []
    for case in wanted:
        for pass_ in passes:
            rows, missing = _measure_case(setting, case, pass_, repeats, budget_s)
            records += _report(setting, case, pass_, rows, missing, here, limits, console, path)
            if setting.cuda:
                torch.cuda.empty_cache()
    return records


def bench_table(
    op: str,
    rows: Sequence[Row],
    *,
    passes: Sequence[Pass] = (),
    peers: bool = True,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = TABLE_ROUNDS,
    budget_s: float = TABLE_BUDGET_S,
    laws: Sequence[str] = (),
    record: bool = False,
    out: Path = RESULTS,
    mixer: Mixer | None = None,
    commit: str = "",
    ceilings: Ceilings | None = None,
    console: Console | None = None,
) -> list[Record]:
    """One op's table on a GPU, ours beside the public kernels, each row appended as soon as it is measured.

    Rows of constant tokens, which are compared with one another, come last, in laps: appended in the last of them.

    A peer that is absent, too slow or fails has a line with the reason in place of a verdict; so has ours.

    Args:
        rows: what to measure, from `tables.TABLES`.
        passes: only these of each row's; none: all of them.
        peers: whether to measure peers in rows that have them.
        laws: of the gate; none: all.
        Others as in `bench_op`.
    """
    check_op(op)
    check_laws(laws)
    _check_passes(passes)
    console = Console() if console is None else console
    here, limits = machine(device, commit), measure_ceilings(device) if ceilings is None else ceilings
    path = results_path(op, device, out) if record else None
    first = Setting(op, MIXERS[op] if mixer is None else mixer, device, dtype, absent=True, slow_s=SLOW_S, laws=laws)
    first = replace(first, say=lambda line: console.print(line, style="red", highlight=False))

    def report(row: Row, pass_: Pass, laps: Sequence[Sequence[Measured]]) -> list[Record]:
        target = row.targets.get(pass_)
        limit = None if target is None else target.limit_ms
        # A lap whose inputs could not be drawn has a line of ours alone.
        over = [_over_laps(entry) for entry in zip(*laps, strict=False)]
        return _report(first, parse_case(op, row.case), pass_, over, [], here, limits, console, path, limit)

    records: list[Record] = []
    todo: list[tuple[Row, Pass]] = [
        (row, pass_) for row in rows for pass_ in row.passes if not passes or pass_ in passes
    ]
    for group, laps in _in_laps(todo):
        measured: dict[int, list[list[Measured]]] = {}
        for n, (row, pass_) in list(enumerate(group)) * laps:
            impls = ("linattn", *(RIVALS if peers and row.peers else ()))
            setting, case = replace(first, impls=impls, host=row.host), parse_case(op, row.case)
            found, _ = _measure_case(setting, case, pass_, -(-repeats // laps), budget_s / laps)
            measured.setdefault(n, []).append(found)
            alive = answers(device)
            if alive and len(measured[n]) < laps:
                continue
            for done in [n] if alive else list(measured):
                records += report(*group[done], measured.pop(done))
            if not alive:
                console.print("the GPU no longer answers after this case; the table ends here", style="bold red")
                return records
    return records


def _in_laps(todo: Sequence[tuple[Row, Pass]]) -> list[tuple[Sequence[tuple[Row, Pass]], int]]:
    """Rows and passes to go through, and how often: each by itself once, but those of constant tokens together."""
    flat: dict[Pass, list[tuple[Row, Pass]]] = defaultdict(list)
    for row, pass_ in todo:
        if row.section == "flat":
            flat[pass_].append((row, pass_))
    alone = [([each], 1) for each in todo if each[0].section != "flat"]
    return [*alone, *((group, LAPS) for group in flat.values())]


def _over_laps(laps: Sequence[Measured]) -> Measured:
    """One entry's measurements of several laps as one; the first lap in which it failed, if it did."""
    failed = [m for m in laps if not m.timing.runs]
    return failed[0] if failed else laps[-1]._replace(timing=over_laps([m.timing for m in laps]))


def answers(device: str) -> bool:
    """Whether the device still works: an illegal access leaves a GPU useless to this process."""
    if torch.device(device).type != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def _measure_case(
    setting: Setting, case: BenchCase, pass_: Pass, repeats: int, budget_s: float
) -> tuple[list[Measured], list[tuple[str, str]]]:
    """What became of each entry of one case and pass, and what cannot be had, with reasons."""
    try:
        entries, missing = entries_of(setting, case, pass_)
    except Exception as error:  # a table goes on with its next row; the reason is a line of it
        if not setting.absent:
            raise
        entries, missing = [Entry("linattn", None, in_words(error))], []
    if setting.absent:
        entries += [Entry(n, None, f"{REFUSED}: {x}" if n.startswith("linattn:") else x) for n, x in missing]
        missing = []
    return measure_entries(entries, setting, repeats, budget_s), missing


def _report(
    setting: Setting,
    case: BenchCase,
    pass_: Pass,
    rows: Sequence[Measured],
    missing: Sequence[tuple[str, str]],
    here: Machine,
    limits: Ceilings,
    console: Console,
    path: Path | None,
    target: Callable[[float], float] | None = None,
) -> list[Record]:
    """Print one case and pass, and append it to the records at ``path``."""
    least = floor_ms(costs(case, pass_, setting.dtype), limits, setting.dtype)
    new = [
        new_record(
            here,
            setting.op,
            case_name(case, pass_),
            pass_,
            row.impl,
            row.timing,
            floor=least,
            verdict=row.verdict,
            dtype=setting.dtype,
            peak=row.peak,
        )
        for row in rows
    ]
    print_records(console, new, missing, math.nan if target is None else target(least))
    if path is not None:
        append_records(path, new)
    return new


def _check_impls(op: str, mixer: Mixer, impls: Sequence[str] | None) -> None:
    known = ["linattn", *(f"linattn:{b}" for b in mixer.backends), *(p.name for p in peers_of(op))]
    for name in impls or ():
        if name not in known:
            raise ValueError(f"{op}: unknown implementation {name!r}; choose from {known}")


def _check_passes(passes: Sequence[str]) -> None:
    for pass_ in passes:
        if pass_ not in ("fwd", "fwdbwd", "step"):
            raise ValueError(f"unknown pass {pass_!r}; choose from ['fwd', 'fwdbwd', 'step']")


def measure_entries(entries: list[Entry], setting: Setting, repeats: int, budget_s: float) -> list[Measured]:
    """Time the entries in turn; one that fails in its first run is not timed, one that is slow is timed once."""
    able: dict[str, Entry] = {}
    times: dict[str, Timing] = {}
    peaks: dict[str, int] = {}
    verdicts = {e.impl: e.verdict for e in entries}
    for entry in entries:
        if entry.call is None:
            continue
        try:
            peaks[entry.impl], seconds = _first_calls(entry, setting)
        except Exception as error:  # a peer's failure is its line; ours is a bug, and must be seen
            known = isinstance(error, torch.OutOfMemoryError | BackendError)
            if entry.impl.startswith("linattn") and not known and not setting.absent:
                raise
            verdicts[entry.impl] = REFUSED if isinstance(error, BackendError) else in_words(error)
            continue
        if seconds > setting.slow_s:
            ms = seconds * 1e3
            times[entry.impl] = Timing(ms, ms, ms, ms, 1)
        elif entry.host:
            times[entry.impl] = time_host(entry.call, device=setting.device)
        else:
            able[entry.impl] = entry
    calls = {name: entry.call for name, entry in able.items() if entry.call is not None}
    times |= time_calls(calls, device=setting.device, repeats=repeats, budget_s=budget_s)
    return [
        Measured(
            e.impl,
            verdicts[e.impl],
            times[e.impl].over(e.parts) if e.impl in times else NOT_TIMED,
            peaks.get(e.impl, 0),
        )
        for e in entries
    ]


def _first_calls(entry: Entry, setting: Setting) -> tuple[int, float]:
    """Peak bytes and seconds of a call after a first one; a graph's memory is set aside beforehand, not counted: 0."""
    assert entry.call is not None
    entry.call()
    if setting.cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    if entry.parts > 1:
        entry.call()
        if setting.cuda:
            torch.cuda.synchronize()
        return 0, time.perf_counter() - start
    given = entry.given_bytes if setting.cuda else 0
    peak = peak_bytes(entry.call, setting.device) + given
    return peak, time.perf_counter() - start


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
