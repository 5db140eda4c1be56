"""Three claims about a CPU, measured: cost and memory per token do not grow, quadratic forms lose, decode is bandwidth.

linattn bench cpu          the first two, with memory
linattn bench decode       the third
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from linattn.bench.calls import backward_call, no_grad, own
from linattn.bench.cases import MIXERS, BenchCase, Pass, at_length, case_name, draw_inputs, parse_case
from linattn.bench.costs import costs
from linattn.bench.floor import Ceilings, floor_ms, measure_ceilings
from linattn.bench.gate import OK, gate
from linattn.bench.memory import kept_bytes, peak_bytes
from linattn.bench.ops import bench_op, new_record
from linattn.bench.record import RESULTS, Record, append_records, machine, results_path
from linattn.bench.table import print_rows
from linattn.bench.timing import NOT_TIMED, Timing, time_calls
from linattn.models import PUBLISHED, build_model
from linattn.models.decoder import Decoder

CPU_CASES: dict[str, str] = {
    "taylor": "b1-h4-t1024-f16-v64",
    "prefix": "b1-h4-t1024-f16-v64-m512",
    "lightning": "b1-h4-t1024-d128",
    "window": "b1-h4-t1024-d64-w129",
    "shortconv": "b1-t1024-d1024-w3-silu-gate",
}
"""Every mixer but softmax, with four of its published heads (1,024 channels), so that 65,536 tokens take seconds."""

LENGTHS = (1024, 4096, 16384, 65536)
FLAT = 1.2
"""Largest cost of a token at any length over the smallest."""
RUNS = 7
RIVAL_LENGTHS = {"quadratic": (1024, 2048, 4096), "sdpa": (4096, 8192)}
"""Where each rival must lose: the quadratic form from 1,024 tokens on, torch's attention from 4,096."""
DECODE_MODELS = ("based_360m", "jrt_360m", "transnormer_385m", "transformer_360m")
DECODE_RATIO = 2.0
"""Largest time of a token over its weights' bytes at the machine's copy bandwidth."""
COPY_NUMBERS = 2**26
"""fp32 numbers of the copy beside the steps: 256 MiB, far beyond any cache."""
COPY_BYTES = 2 * 4 * COPY_NUMBERS
"""Read plus written."""
ENCODER = ("proj_k_enc", "proj_v_enc")
"""Parameters that a prefix model reads at the start of a text only."""


class Growth(NamedTuple):
    """How memory grows: bytes ~ constant + a_token * tokens, through the shortest and the longest length."""

    constant: float
    a_token: float


def cost_per_token(
    op: str,
    *,
    lengths: Sequence[int] = LENGTHS,
    passes: Sequence[Pass] = ("fwd", "fwdbwd"),
    runs: int = RUNS,
    record: bool = False,
    out: Path = RESULTS,
    ceilings: Ceilings | None = None,
    console: Console | None = None,
) -> list[Record]:
    """Time one mixer's torch backend at all lengths in turn, fp32, and print what a token costs at each.

    Each timed call follows one of its own. What a call wrote lies in the cache until others push it out to memory:
    after 65,536 tokens that is the whole cache, and took 1,024 tokens 0.4 to 1.3 ms more than their own 1.1 to 5.

    Returns:
        A record a pass and length; the claim reads best_ms.
    """
    console = Console() if console is None else console
    here, limits = machine("cpu"), measure_ceilings("cpu") if ceilings is None else ceilings
    base = parse_case(op, CPU_CASES[op])
    verdict = gate(MIXERS[op], base, backend="torch", dtype=torch.float32, device="cpu")
    cases = [at_length(base, length) for length in lengths]
    records: list[Record] = []
    for pass_ in passes:
        times, peaks = _time_lengths(op, cases, pass_, runs) if verdict == OK else ({}, {})
        new = [
            new_record(
                here,
                op,
                case_name(case, pass_),
                pass_,
                "linattn:torch",
                times.get(case.name, NOT_TIMED),
                floor=floor_ms(costs(case, pass_, torch.float32), limits, torch.float32),
                verdict=verdict,
                peak=peaks.get(case.name, 0),
            )
            for case in cases
        ]
        _print_cost(console, op, pass_, lengths, new)
        records += new
    if record:
        append_records(results_path(op, "cpu", out), records)
    return records


def flatness(best_ms: Sequence[float], lengths: Sequence[int]) -> float:
    """The dearest token over the cheapest: 1 where cost is linear. NaN where something was not timed."""
    each = [ms / length for ms, length in zip(best_ms, lengths, strict=True)]
    return math.nan if any(math.isnan(x) for x in each) else max(each) / min(each)


def growth(sizes: Sequence[float], lengths: Sequence[int]) -> Growth:
    """The line through the first and the last point."""
    if len(lengths) < 2:
        return Growth(0.0, sizes[0] / lengths[0])
    a_token = (sizes[-1] - sizes[0]) / (lengths[-1] - lengths[0])
    return Growth(sizes[0] - a_token * lengths[0], a_token)


def memory_per_token(
    op: str, *, lengths: Sequence[int] = LENGTHS[:3], console: Console | None = None
) -> dict[str, Growth]:
    """How memory grows with tokens, inputs not counted: "forward" and "forward+backward" peaks, "kept" for backward."""
    console = Console() if console is None else console
    sizes: dict[str, list[float]] = {"forward": [], "forward+backward": [], "kept": []}
    for length in lengths:
        inputs = draw_inputs(op, at_length(parse_case(op, CPU_CASES[op]), length), torch.float32, "cpu")
        ready = own(MIXERS[op], inputs, "torch", True)
        given = [x for x in inputs.values() if isinstance(x, Tensor)]
        sizes["forward"].append(peak_bytes(partial(no_grad, own(MIXERS[op], inputs, "torch", False).run), "cpu"))
        call = backward_call(ready)
        call()
        sizes["forward+backward"].append(peak_bytes(call, "cpu"))
        sizes["kept"].append(kept_bytes(ready.run, given))
    grown = {name: growth(values, lengths) for name, values in sizes.items()}
    rows = [
        [name, *(f"{x / n:,.0f}" for x, n in zip(values, lengths, strict=True)), *(f"{g:,.0f}" for g in grown[name])]
        for name, values in sizes.items()
    ]
    columns = ["bytes a token", *(f"at {n:,}" for n in lengths), "constant", "a token more"]
    print_rows(console, f"{op} {CPU_CASES[op]} and longer, float32, inputs not counted", columns, rows)
    return grown


def against_rivals(
    op: str,
    *,
    lengths: dict[str, Sequence[int]] | None = None,
    passes: Sequence[Pass] = ("fwd", "fwdbwd"),
    runs: int = RUNS,
    record: bool = False,
    out: Path = RESULTS,
    ceilings: Ceilings | None = None,
    console: Console | None = None,
) -> list[Record]:
    """Ours beside the quadratic form of the same op, and beside torch's softmax attention, each from where it loses."""
    wanted = RIVAL_LENGTHS if lengths is None else lengths
    records: list[Record] = []
    for length in sorted({n for some in wanted.values() for n in some}):
        records += bench_op(
            op,
            cases=[at_length(parse_case(op, CPU_CASES[op]), length)],
            passes=passes,
            impls=["linattn:torch", *(rival for rival, some in wanted.items() if length in some)],
            repeats=runs,
            budget_s=math.inf,
            record=record,
            out=out,
            ceilings=ceilings,
            console=console,
        )
    return records


def decode(
    models: Sequence[str] = DECODE_MODELS,
    *,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
    steps: int = 20,
    record: bool = False,
    out: Path = RESULTS,
    console: Console | None = None,
) -> list[Record]:
    """Milliseconds a token of published models with random weights, one row, beside their weights' bytes.

    A large copy is timed in turn with the steps of every model; its median over the whole run is the one ceiling that
    all models share, and the floor is weight bytes over that bandwidth, read plus written.

    Raises:
        ValueError: a model that is not published.
    """
    for name in models:
        if name not in PUBLISHED:
            raise ValueError(f"unknown model {name!r}; choose from {sorted(PUBLISHED)}")
    console = Console() if console is None else console
    timed: list[tuple[str, torch.dtype, int, Timing, Timing]] = []
    for name in models:
        model = random_model(name)
        for dtype in dtypes:
            model = model.to(dtype)
            timed.append((name, dtype, step_weight_bytes(model), *_time_steps(model, steps)))
        del model
    # One bandwidth for all: by a copy of its own, a model timed in a fast minute would be held to a dearer floor.
    bandwidth = COPY_BYTES / statistics.median(copy.p50_ms for *_, copy in timed) * 1e3
    here, records, rows = machine("cpu"), [], []
    for name, dtype, size, step, copy in timed:
        least = size / bandwidth * 1e3
        records.append(new_record(here, "decode", name, "step", "linattn", step, floor=least, dtype=dtype))
        figures = (size / 1e9, COPY_BYTES / copy.p50_ms / 1e6, least, step.p50_ms, step.best_ms)
        verdict = _verdict(step.p50_ms / least, DECODE_RATIO)
        rows.append([f"{name} {records[-1].dtype}", *(f"{x:,.1f}" for x in figures), verdict])
    columns = ["model", "GB", "copy GB/s", "floor", "median", "fastest", "x floor"]
    print_rows(console, f"decode, ms a token, one row, copy {bandwidth / 1e9:,.1f} GB/s, {here.gpu}", columns, rows)
    if record:
        append_records(results_path("decode", "cpu", out), records)
    return records


def random_model(name: str) -> Decoder:
    """A published model with N(0, init_std) weights, fp32, on the CPU."""
    return build_model(PUBLISHED[name]()).eval().requires_grad_(False)


def step_weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that one decoded token must read: an untied embedding is one row, an encoder nothing."""
    untied = getattr(getattr(model, "head", None), "weight", None) is not None
    return sum(
        p.numel() * p.element_size()
        for name, p in model.named_parameters()
        if not any(part in name for part in ENCODER) and not (untied and name.startswith("embedding."))
    )


def _time_lengths(
    op: str, cases: Sequence[BenchCase], pass_: Pass, runs: int
) -> tuple[dict[str, Timing], dict[str, int]]:
    calls = {}
    for case in cases:
        ready = own(MIXERS[op], draw_inputs(op, case, torch.float32, "cpu"), "torch", pass_ == "fwdbwd")
        calls[case.name] = backward_call(ready) if pass_ == "fwdbwd" else partial(no_grad, ready.run)
    times = time_calls(calls, repeats=runs, before=1)
    return times, {name: peak_bytes(call, "cpu") for name, call in calls.items()}


def _print_cost(console: Console, op: str, pass_: str, lengths: Sequence[int], records: Sequence[Record]) -> None:
    ratio = flatness([r.best_ms for r in records], lengths)
    rows = [
        [
            f"{n:,}",
            f"{r.best_ms:,.1f}",
            f"{r.best_ms / n * 1e3:,.2f}",
            f"{r.p50_ms / n * 1e3:,.2f}",
            f"{r.peak_bytes / n:,.0f}",
        ]
        for r, n in zip(records, lengths, strict=True)
    ]
    columns = ["tokens", "fastest ms", "us/token", "median us/token", "peak B/token"]
    print_rows(console, f"{op} {pass_} {records[0].case}, gate {records[0].gate}", columns, rows)
    console.print(f"  dearest / cheapest token {_verdict(ratio, FLAT)}", highlight=False)


def _verdict(ratio: float, most: float) -> str:
    return f"{ratio:.2f} {'<=' if ratio <= most else '>'} {most:g}"


def _time_steps(model: Decoder, steps: int) -> tuple[Timing, Timing]:
    """One greedy token a call, and a copy of `COPY_NUMBERS` between them."""
    slots = torch.zeros(1, dtype=torch.int32)
    pool = model.new_pool(1, capacity=steps + 16)
    token = torch.tensor([17])
    source = torch.empty(COPY_NUMBERS).normal_()
    target = torch.empty_like(source)

    def step() -> None:
        token.copy_(model.step_(token, pool, slots).argmax(-1))

    times = time_calls({"step": step, "copy": lambda: target.copy_(source)}, repeats=steps, warmup=3)
    return times["step"], times["copy"]
