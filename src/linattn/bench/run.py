"""One benchmark run from one configuration: what `linattn bench` calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console

from linattn.bench import cpu
from linattn.bench.cases import Pass
from linattn.bench.gate import OK
from linattn.bench.ops import bench_op
from linattn.bench.plot import plot_lengths
from linattn.bench.record import RESULTS, Record
from linattn.bench.timing import keep_pages

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


Op = Literal["taylor", "prefix", "lightning", "window", "shortconv", "softmax", "cpu", "decode"]


@dataclass(frozen=True)
class BenchConfig:
    """Gate, then measure; print a table, and record it if asked to."""

    op: Annotated[Op, tyro.conf.Positional] = "taylor"
    """A mixer; or cpu (cost and memory per token of every mixer, and rivals) or decode (the 360M models, one row)."""
    cases: tuple[str, ...] = ()
    """Shapes such as b4-h32-t8192-d128; none: the published ones. For cpu: mixers; for decode: models."""
    passes: tuple[Literal["fwd", "fwdbwd", "step"], ...] = ("fwd", "fwdbwd")
    """fwd: without gradients; fwdbwd: with; step: one token a row."""
    impls: tuple[str, ...] = ()
    """Implementations: linattn, linattn:BACKEND, or peers by name; none: all that can be had here."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one. cpu and decode always run on the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU, both for decode. cpu is float32."""
    repeats: int = 0
    """Rounds of each case and pass, all implementations in turn. 0: 7 on a CPU, 50 on a GPU, 20 steps of decode."""
    budget_s: float = 60.0
    """Seconds of rounds a case and pass; three rounds are always run. cpu and decode ignore it."""
    lengths: tuple[int, ...] = ()
    """For cpu: tokens at which cost is measured; none: 1024, 4096, 16384, 65536."""
    graph: bool = False
    """On a GPU, time replays of a CUDA graph; steps always are."""
    record: bool = False
    """Append the figures to OUT/GPU/OP.csv. Leave it off on a machine that does other work."""
    out: Path = RESULTS
    """Folder of the results."""
    commit: str = ""
    """For a mixer's records: the commit, where the tree that runs was copied without its history."""
    plot: Path | None = None
    """Also draw time against length, .png or .svg; a folder of them for cpu. Needs linattn[plot]."""


def run_bench(config: BenchConfig, console: Console | None = None) -> int:
    """Run it; 0, or 1 where a gate failed, so that a script notices.

    Raises:
        ValueError: a case, mixer, model or implementation that is not known, or CUDA where there is none.
    """
    console = Console() if console is None else console
    if config.op == "decode":
        records = _decode(config, console)
    elif config.op == "cpu":
        records = _cpu(config, console)
    else:
        records = _op(config, console)
    failed = sorted({f"{r.op}: {r.gate}" for r in records if r.impl.startswith("linattn") and r.gate != OK})
    for line in failed:
        console.print(f"gate failed, no time taken: {line}", style="bold red", highlight=False)
    return 1 if failed else 0


def _op(config: BenchConfig, console: Console) -> list[Record]:
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch sees no GPU; use --device cpu, or a CUDA build of torch")
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    records = bench_op(
        config.op,
        cases=config.cases or None,
        passes=config.passes,
        impls=config.impls or None,
        device=device,
        dtype=DTYPES[dtype],
        repeats=config.repeats or (50 if device == "cuda" else 7),
        budget_s=config.budget_s,
        graph=config.graph,
        record=config.record,
        out=config.out,
        commit=config.commit,
        console=console,
    )
    if config.plot is not None:
        for pass_ in config.passes:
            path = config.plot.with_stem(f"{config.plot.stem}-{pass_}") if len(config.passes) > 1 else config.plot
            _draw(records, path, pass_, console)
    return records


def _cpu(config: BenchConfig, console: Console) -> list[Record]:
    keep_pages()
    passes: Sequence[Pass] = [p for p in config.passes if p != "step"]
    lengths, runs = config.lengths or cpu.LENGTHS, config.repeats or cpu.RUNS
    records: list[Record] = []
    for op in _known(config.cases or tuple(cpu.CPU_CASES), tuple(cpu.CPU_CASES), "mixer"):
        console.rule(op)
        options = {"passes": passes, "runs": runs, "record": config.record, "out": config.out, "console": console}
        cost = cpu.cost_per_token(op, lengths=lengths, **options)
        cpu.memory_per_token(op, lengths=lengths[:3], console=console)
        rivals = cpu.against_rivals(op, **options) if op != "shortconv" else []
        if config.plot is not None:
            for pass_ in passes:
                _draw([*rivals, *cost], config.plot / f"{op}-{pass_}.png", pass_, console)
        records += [*cost, *rivals]
    return records


def _decode(config: BenchConfig, console: Console) -> list[Record]:
    return cpu.decode(
        config.cases or cpu.DECODE_MODELS,
        dtypes=(torch.bfloat16, torch.float32) if config.dtype == "auto" else (DTYPES[config.dtype],),
        steps=config.repeats or 20,
        record=config.record,
        out=config.out,
        console=console,
    )


def _known(names: tuple[str, ...], known: tuple[str, ...], what: str) -> tuple[str, ...]:
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}; choose from {list(known)}")
    return names


def _draw(records: Sequence[Record], path: Path, pass_: str, console: Console) -> None:
    if not any(r.pass_ == pass_ and r.runs for r in records) or pass_ == "step":
        return
    plot_lengths(records, path, pass_=pass_)
    console.print(f"drawn: {path}")
