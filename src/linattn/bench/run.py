"""One benchmark run from one configuration: what `linattn bench` calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console

from linattn.bench import cpu
from linattn.bench.cases import Pass
from linattn.bench.gate import OK
from linattn.bench.models import bench_models
from linattn.bench.ops import TABLE_BUDGET_S, TABLE_ROUNDS, bench_op, bench_table
from linattn.bench.pages import DOCS, write_pages
from linattn.bench.plot import plot_lengths
from linattn.bench.record import RESULTS, Record
from linattn.bench.setting import REFUSED
from linattn.bench.table5 import POINTS, bench_table5, read_point
from linattn.bench.tables import TABLES, Section, table_rows
from linattn.bench.timing import keep_pages

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


Op = Literal[
    "taylor",
    "prefix",
    "lightning",
    "window",
    "shortconv",
    "softmax",
    "table5",
    "train",
    "prefill",
    "pages",
    "cpu",
    "decode",
]


@dataclass(frozen=True)
class BenchConfig:
    """Gate, then measure; print a table, and record it if asked to."""

    op: Annotated[Op, tyro.conf.Positional] = "taylor"
    """A mixer; or, on a GPU, table5 (reading twice against FA2), train and prefill (whole models), pages (docs/results
    from the records); or cpu (cost and memory per token of every mixer, and rivals), decode (the 360M models)."""
    cases: tuple[str, ...] = ()
    """Shapes such as b4-h32-t8192-d128; none: the op's table on a GPU, the published ones on a CPU. For cpu: mixers;
    for decode, train and prefill: models; for table5: b16-t32768."""
    sections: tuple[Section, ...] = ()
    """On a GPU, parts of the op's table; none: all."""
    passes: tuple[Literal["fwd", "fwdbwd", "step"], ...] = ()
    """fwd: without gradients; fwdbwd: with; step: one token a row. None: fwd and fwdbwd, or the table's."""
    impls: tuple[str, ...] = ()
    """Implementations: linattn, linattn:BACKEND, or peers by name; none: all that can be had here."""
    peers: bool = True
    """Whether a GPU's tables measure peers, and cpu its rivals."""
    laws: tuple[str, ...] = ()
    """Laws that the gate of a GPU's tables runs, such as parity; none: all."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one. cpu and decode always run on the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU, both for decode. cpu is float32."""
    repeats: int = 0
    """Rounds of each case and pass, all implementations in turn. 0: 7 on a CPU, 30 on a GPU, 20 steps of decode."""
    budget_s: float = 0.0
    """Seconds of rounds a case and pass; three rounds are always run. 0: 60, 2 in a GPU's tables. cpu and decode
    ignore it."""
    lengths: tuple[int, ...] = ()
    """For cpu, train and prefill: tokens of a text; none: their table's."""
    tokens: int = 0
    """For train and prefill: tokens of a batch at every length. 0: 65,536 and 131,072."""
    recompute: bool = True
    """For train: keep only the inputs of blocks, and run each again in backward."""
    compiled: bool = False
    """For train and prefill: blocks under torch.compile."""
    graph: bool = False
    """With impls, on a GPU: time replays of a CUDA graph; steps always are."""
    record: bool = False
    """Append the figures to OUT/GPU/OP.csv. Leave it off on a machine that does other work."""
    out: Path = RESULTS
    """Folder of the results."""
    docs: Path = DOCS
    """Folder of the pages."""
    gpu: str = "h200"
    """Whose records pages are made from: a folder in OUT."""
    commit: str = ""
    """For records: the commit, where the tree that runs was copied without its history."""
    plot: Path | None = None
    """Also draw time against length, .png or .svg; a folder of them for cpu. Needs linattn[plot]."""


def run_bench(config: BenchConfig, console: Console | None = None) -> int:
    """Run it; 0, or 1 where a gate failed, so that a script notices.

    Raises:
        ValueError: a case, mixer, model or implementation that is not known, or CUDA where there is none.
    """
    console = Console() if console is None else console
    if config.op == "pages":
        for path in write_pages(config.out / config.gpu, config.docs, console.print):
            console.print(f"written: {path}", highlight=False)
        return 0
    if config.op in ("train", "prefill"):
        # A length that does not fit is an outcome; any other error is not.
        return 1 if any(r.gate.startswith("error") for r in _models(config, config.op, console)) else 0
    if config.op == "decode":
        records = _decode(config, console)
    elif config.op == "cpu":
        records = _cpu(config, console)
    elif config.op == "table5":
        records = _table5(config, console)
    else:
        records = _op(config, config.op, console)
    ours = [r for r in records if r.impl.startswith("linattn")]
    right = {(r.case, r.pass_) for r in ours if r.gate == OK}
    failed = sorted({f"{r.op}: {r.gate}" for r in ours if r.gate != OK and not _stood_in_for(r, right)})
    for line in failed:
        console.print(f"gate failed, no time taken: {line}", style="bold red", highlight=False)
    return 1 if failed else 0


def _stood_in_for(record: Record, right: set[tuple[str, str]]) -> bool:
    """Whether it is a backend that refuses a case and pass which another of ours gets right."""
    return record.gate.startswith(REFUSED) and (record.case, record.pass_) in right


def _device(config: BenchConfig) -> str:
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch sees no GPU; use --device cpu, or a CUDA build of torch")
    return device


def _dtype(config: BenchConfig, device: str) -> torch.dtype:
    return DTYPES[config.dtype if config.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"]


def _op(config: BenchConfig, op: str, console: Console) -> list[Record]:
    device = _device(config)
    passes: tuple[Pass, ...] = config.passes
    options: dict[str, Any] = {
        "device": device,
        "dtype": _dtype(config, device),
        "record": config.record,
        "out": config.out,
        "commit": config.commit,
        "console": console,
    }
    if device == "cuda" and op in TABLES and not config.impls:
        records = bench_table(
            op,
            table_rows(op, config.cases, config.sections),
            passes=passes,
            peers=config.peers,
            laws=config.laws,
            repeats=config.repeats or TABLE_ROUNDS,
            budget_s=config.budget_s or TABLE_BUDGET_S,
            **options,
        )
    else:
        passes = passes or ("fwd", "fwdbwd")
        records = bench_op(
            op,
            cases=config.cases or None,
            passes=passes,
            impls=config.impls or None,
            repeats=config.repeats or (30 if device == "cuda" else 7),
            budget_s=config.budget_s or 60.0,
            graph=config.graph,
            **options,
        )
    if config.plot is not None:
        passes = passes or ("fwd", "fwdbwd")
        for pass_ in passes:
            path = config.plot.with_stem(f"{config.plot.stem}-{pass_}") if len(passes) > 1 else config.plot
            _draw(records, path, pass_, console)
    return records


def _table5(config: BenchConfig, console: Console) -> list[Record]:
    device = _device(config)
    return bench_table5(
        [read_point(name) for name in config.cases] or POINTS,
        peers=config.peers,
        device=device,
        dtype=_dtype(config, device),
        repeats=config.repeats or TABLE_ROUNDS,
        budget_s=config.budget_s or TABLE_BUDGET_S,
        laws=config.laws,
        record=config.record,
        out=config.out,
        commit=config.commit,
        console=console,
    )


def _models(config: BenchConfig, kind: Literal["train", "prefill"], console: Console) -> list[Record]:
    return bench_models(
        kind,
        config.cases,
        lengths=config.lengths,
        tokens=config.tokens,
        device=_device(config),
        recompute=config.recompute,
        compiled=config.compiled,
        record=config.record,
        out=config.out,
        commit=config.commit,
        console=console,
    )


def _cpu(config: BenchConfig, console: Console) -> list[Record]:
    keep_pages()
    passes: Sequence[Pass] = [p for p in config.passes or ("fwd", "fwdbwd") if p != "step"]
    lengths, runs = config.lengths or cpu.LENGTHS, config.repeats or cpu.RUNS
    records: list[Record] = []
    for op in _known(config.cases or tuple(cpu.CPU_CASES), tuple(cpu.CPU_CASES), "mixer"):
        console.rule(op)
        options = {"passes": passes, "runs": runs, "record": config.record, "out": config.out, "console": console}
        cost = cpu.cost_per_token(op, lengths=lengths, **options)
        cpu.memory_per_token(op, lengths=lengths[:3], console=console)
        rivals = cpu.against_rivals(op, **options) if op != "shortconv" and config.peers else []
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
