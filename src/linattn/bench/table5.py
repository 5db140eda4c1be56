"""Table 5 of Just Read Twice (arXiv 2407.05483) on this GPU: one attention op of a 360M model, prefill, against FA2.

JRT-Prompt reads the text twice: taylor over 2N tokens. JRT-RNN reads it once with a prefix of N/2: prefix over N. Both
normalised, scaled and with their final State; the paper's figures are without them. Not a model: see models.py.

    linattn bench table5 --record
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from linattn.bench.calls import entries_of
from linattn.bench.cases import MIXERS, BenchCase
from linattn.bench.costs import costs
from linattn.bench.floor import Ceilings, floor_ms, measure_ceilings
from linattn.bench.gate import check_laws
from linattn.bench.ops import SLOW_S, TABLE_BUDGET_S, TABLE_ROUNDS, measure_entries, new_record
from linattn.bench.record import RESULTS, Record, append_records, machine, results_path
from linattn.bench.setting import Entry, Setting
from linattn.bench.table import print_records
from linattn.mixers.prefix.cases import PrefixCase
from linattn.mixers.softmax.cases import SoftmaxCase
from linattn.mixers.taylor.cases import TaylorCase

OP = "table5"
POINTS = ((16, 32768), *((batch, 16384) for batch in (2, 4, 8, 16, 32, 64)))
"""(B, N): the row of the table, and the sweep over batches."""
PROMPT, RNN, ONCE = "linattn JRT-Prompt (2N)", "linattn JRT-RNN (M = N/2)", "linattn Based (N)"
TARGETS = {PROMPT: 30.0, RNN: 50.0}
"""How many times faster than FlashAttention-2 at N, at B = 16, N = 32,768, on one H200."""
PAPER = {PROMPT: 11.9, RNN: 19.2}
"""The same in the paper, on an H100, without normaliser, scale and final State."""
ATTENTION = ("sdpa-flash", "sdpa-cudnn")


def base_case(batch: int, length: int) -> TaylorCase:
    """The 360M model's attention: 16 heads, features 16, values 64."""
    return TaylorCase(batch, length, 16, 16, 64, "JRT Table 5")


def read_point(name: str) -> tuple[int, int]:
    """(B, N) of b16-t32768.

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"b(\d+)-t(\d+)", name)
    if match is None:
        raise ValueError(f"cannot read the case {name!r}; spell it like b16-t32768, rows and tokens")
    return int(match[1]), int(match[2])


def bench_table5(
    points: Sequence[tuple[int, int]] = POINTS,
    *,
    peers: bool = True,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = TABLE_ROUNDS,
    budget_s: float = TABLE_BUDGET_S,
    laws: Sequence[str] = (),
    record: bool = False,
    out: Path = RESULTS,
    commit: str = "",
    ceilings: Ceilings | None = None,
    console: Console | None = None,
    base: TaylorCase | None = None,
) -> list[Record]:
    """Forward of each, and of attention at N, in one run; a point's rows are appended as soon as it is measured.

    Args:
        points: (B, N).
        base: whose heads and dims are measured; None: `base_case`.
        Others as in `ops.bench_table`.
    """
    check_laws(laws)
    console = Console() if console is None else console
    here, limits = machine(device, commit), measure_ceilings(device) if ceilings is None else ceilings
    verdicts: dict[str, dict[tuple[str, str, str], str]] = {"taylor": {}, "prefix": {}}
    records: list[Record] = []
    for batch, length in points:
        once = base_case(batch, length) if base is None else replace(base, batch=batch, length=length)
        entries: list[Entry] = []
        floors: dict[str, float] = {}

        def add(op: str, impl: str, case: BenchCase, entries: list[Entry] = entries, floors: dict = floors) -> Setting:
            setting = Setting(op, MIXERS[op], device, dtype, ("linattn",), laws=laws, slow_s=SLOW_S, absent=True)
            setting = replace(setting, verdicts=verdicts[op])
            entries += [e._replace(impl=impl) for e in entries_of(setting, case, "fwd")[0]]
            floors[impl] = floor_ms(costs(case, "fwd", dtype), limits, dtype)
            return setting

        add("taylor", PROMPT, replace(once, length=2 * length))
        add("prefix", RNN, PrefixCase(once, length // 2, "JRT Table 5"))
        setting = add("taylor", ONCE, once)
        if peers:
            found, missing = entries_of(replace(setting, impls=ATTENTION), once, "fwd")
            entries += [*found, *(Entry(name, None, reason) for name, reason in missing)]
        softmax = SoftmaxCase(batch, length, once.heads, once.value_dim, "JRT Table 5")
        of_attention = floor_ms(costs(softmax, "fwd", dtype), limits, dtype)
        new = []
        for row in measure_entries(entries, setting, repeats, budget_s):
            options = {"floor": floors.get(row.impl, of_attention), "verdict": row.verdict, "peak": row.peak}
            new.append(new_record(here, OP, once.name, "fwd", row.impl, row.timing, dtype=dtype, **options))
        print_records(console, new)
        if record:
            append_records(results_path(OP, device, out), new)
        records += new
        del entries
    return records
