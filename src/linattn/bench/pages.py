"""Pages made from a GPU's records: docs/results/*.md and their charts. Nothing on them is written by hand.

A figure and the peers beside it always come from one run: of each case and pass the newest run that measured ours.

    linattn bench pages
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from linattn.bench import plot, table5
from linattn.bench.cases import parse_case
from linattn.bench.costs import costs, state_numbers
from linattn.bench.model_pages import prefill_page, prefill_panels, train_page, training_panels
from linattn.bench.page_parts import heading, label, markdown, ms, ratio
from linattn.bench.record import Record, read_records
from linattn.bench.setting import HOST, IN_GRAPH
from linattn.bench.tables import TABLES, Section, target_of
from linattn.mixers.lightning.cases import LightningCase
from linattn.mixers.taylor.cases import TaylorCase

DOCS = Path("docs/results")
CHARTS = {(op, pass_) for op in TABLES for pass_ in ("fwd", "fwdbwd")}
"""Ops and passes whose time and memory are drawn against length, where records have two lengths beside peers."""
HELD = (
    "GiB at the peak of a call. Its tensors: inputs, outputs and the inputs' gradients; what backward begins with, the "
    "output's gradient, is in neither."
)
FLAT, SPLIT = 1.10, 1.5
"""Dearest over cheapest token that is promised while rows times heads fill the SMs, and where a sequence is split."""
FULL = {"lightning": 128, "taylor": 256}
"""Rows times heads from which they do: one program of lightning's is on a multiprocessor of 132, two of taylor's."""
FLAT_WORDS = (
    "As many tokens in every row of the table, in texts of growing length; each row is the median of laps over all of "
    "them. Forward writes the State of every text: x bytes is what short texts move for that."
)


def write_pages(results: Path, docs: Path = DOCS, say: Callable[[str], object] = print) -> list[Path]:
    """Write every page that the CSV files in ``results`` (benchmarks/results/h200) allow, and draw its charts.

    Without matplotlib the pages are written and the charts are not, which ``say`` is told.

    Raises:
        ValueError: a file that holds something else.
    """
    docs.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in pages_of(results).items():
        path = docs / f"{name}.md"
        path.write_text(text, encoding="utf-8")
        written.append(path)
    try:
        written += draw_charts(results, docs)
    except ModuleNotFoundError as error:
        say(str(error))
    return written


def pages_of(results: Path) -> dict[str, str]:
    """The pages that the files in ``results`` make, by name, as Markdown."""
    makers: dict[str, Callable[[Sequence[Record], str], str]] = dict.fromkeys(TABLES, op_page)
    makers |= {"table5": table5_page, "train": train_page, "prefill": prefill_page}
    pages = {}
    for name, make in makers.items():
        path = results / f"{name}.csv"
        records = counted(path)
        if records:
            pages[name] = make(records, f"benchmarks/results/{results.name}/{name}.csv")
    return pages


def counted(path: Path) -> list[Record]:
    """The records of a file, if it is there, but those timed in another way: that is, without a count of runs."""
    return [r for r in read_records(path) if r.runs or math.isnan(r.p50_ms)] if path.exists() else []


def draw_charts(results: Path, docs: Path) -> list[Path]:
    """The charts that the pages show, as PNG beside them."""
    drawn = []
    for op, pass_ in sorted(CHARTS):
        family, lines = chart_lines(newest_runs(counted(results / f"{op}.csv")), pass_)
        if lines:
            gpu = next(iter(next(iter(lines.values())).values())).gpu
            chart = docs / f"{op}-{pass_}.png"
            plot.plot_time_memory(lines, chart, title=f"{op}, {_pass_name(pass_)}, {family}, bf16, {gpu}")
            drawn.append(chart)
    for name, panels_of in (("train", training_panels), ("prefill", prefill_panels)):
        panels = panels_of(counted(results / f"{name}.csv"))
        if panels:
            chart = docs / f"{name}.png"
            plot.plot_speeds(panels, chart, title=f"{name}, tokens per second on one GPU")
            drawn.append(chart)
    return drawn


def newest_runs(records: Sequence[Record]) -> list[Record]:
    """Of each case and pass the newest run that has ours, whole: peers beside a figure are always of its run."""
    newest = {(r.case, r.pass_): (r.date, r.commit) for r in records if r.impl.startswith("linattn")}
    kept: dict[tuple[str, str, str], Record] = {}
    for r in records:
        if newest.get((r.case, r.pass_)) == (r.date, r.commit):
            kept[r.case, r.pass_, label(r.impl)] = r
    return list(kept.values())


def chart_lines(records: Sequence[Record], pass_: str) -> tuple[str, dict[str, dict[int, Record]]]:
    """The shape measured at most lengths beside peers, and its timed records: label -> length -> record.

    A prefix is half of its text, and grows with it in one line. Nothing where one length is all there is.
    """
    families: dict[str, dict[str, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    for r in records:
        length = plot.length_in(r.case)
        plain = HOST not in r.impl and IN_GRAPH not in r.impl
        if r.pass_ == pass_ and length is not None and plain and not math.isnan(r.p50_ms):
            families[re.sub(r"-[tm]\d+", "", r.case)][label(r.impl)][length] = r
    beside = {
        family: lines for family, lines in families.items() if len(lines) > 1 and max(map(len, lines.values())) > 1
    }
    if not beside:
        return "", {}
    family = max(beside, key=lambda name: sum(len(line) for line in beside[name].values()))
    return family, {name: dict(sorted(line.items())) for name, line in beside[family].items()}


def op_page(records: Sequence[Record], source: str) -> str:
    """One op: the table with targets and peers, time against length, flatness, decoding, what was not measured."""
    op, records = records[0].op, newest_runs(records)
    sections: dict[str, list[Record]] = defaultdict(list)
    for r in records:
        sections[section_of(op, r.case, r.pass_)].append(r)
    parts = [heading(f"{op}: speed on one GPU", records, source)]
    parts.append(
        "Median milliseconds. Floor: bytes and FLOPs over what this machine was measured to copy and multiply. "
        "FA2 and cuDNN are causal softmax attention with the same heads and values: another op, for scale. "
        "`linattn` and peers are timed with the host ahead of the GPU; `host included` is eager calls by the clock."
    )
    titles = {"main": "Against targets", "lengths": "Time against length", "step": "Decoding: one token a row"}
    for section, title in titles.items():
        if sections[section]:
            parts += [f"## {title}", op_table(op, sections[section])]
    for chart in [f"{o}-{pass_}" for o, pass_ in sorted(CHARTS) if o == op and chart_lines(records, pass_)[1]]:
        parts.append(f"![{chart}: time and memory against length]({chart}.png)")
    memory = memory_table(op, records)
    if memory:
        parts += ["## Memory of forward and backward", HELD, memory]
    if sections["flat"]:
        parts += ["## A token's cost at any length", FLAT_WORDS, flat_table(sections["flat"])]
    absent = [r for r in records if math.isnan(r.p50_ms)]
    if absent:
        lines = [f"- {r.case} {r.pass_}, {label(r.impl)}: {r.gate}" for r in absent]
        parts += ["## Not timed", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def section_of(op: str, case: str, pass_: str) -> Section:
    """Where a record stands on its op's page."""
    if pass_ == "step":
        return "step"
    for row in TABLES[op]:
        if row.case == case:
            return row.section
    return "main"


def op_table(op: str, records: Sequence[Record]) -> str:
    """A row a case and pass: floor, target, ours and how far from both, then a column for each peer."""
    groups: dict[tuple[str, str], dict[str, Record]] = defaultdict(dict)
    for r in records:
        groups[r.case, r.pass_][label(r.impl)] = r
    others = list(dict.fromkeys(name for group in groups.values() for name in group if name != "linattn"))
    others = [n for n in others if any(n in g and not math.isnan(g[n].p50_ms) for g in groups.values())]
    rows = []
    for (case, pass_), group in groups.items():
        first, ours = next(iter(group.values())), group.get("linattn")
        target, mine = target_of(op, case, pass_), math.nan if ours is None else ours.p50_ms
        reached = "" if target is None else "yes" if mine <= target.limit_ms(first.floor_ms) else "no"
        cells = [case, pass_, ms(first.floor_ms), "" if target is None else str(target), ms(mine)]
        cells += [ratio(mine, first.floor_ms), "" if math.isnan(mine) else reached]
        rows.append([*cells, *(ms(group[n].p50_ms) if n in group else "" for n in others)])
    columns = ["case", "pass", "floor", "target", "linattn", "x floor", "reached", *others]
    return markdown(columns, rows)


def memory_table(op: str, records: Sequence[Record]) -> str:
    """GiB at the peak of forward and backward: ours, over what its tensors hold, and each peer's. Empty: none taken."""
    groups: dict[str, dict[str, Record]] = defaultdict(dict)
    for r in records:
        if r.pass_ == "fwdbwd" and r.peak_bytes and HOST not in r.impl and IN_GRAPH not in r.impl:
            groups[r.case][label(r.impl)] = r
    groups = {case: group for case, group in groups.items() if "linattn" in group}
    others = list(dict.fromkeys(name for group in groups.values() for name in group if name != "linattn"))
    rows = []
    for name, group in groups.items():
        case, dtype = parse_case(op, name), getattr(torch, group["linattn"].dtype)
        held = costs(case, "fwdbwd", dtype).bytes - costs(case, "fwd", dtype).bytes
        peak = group["linattn"].peak_bytes
        others_gib = [f"{group[n].peak_bytes / 2**30:.2f}" if n in group else "" for n in others]
        rows.append([name, f"{peak / 2**30:.2f}", f"{peak / held:.2f}", *others_gib])
    return markdown(["case", "linattn", "x its tensors", *others], rows) if rows else ""


def flat_table(records: Sequence[Record]) -> str:
    """Nanoseconds a token and head, and how much dearer than the cheapest of those that fill the SMs."""
    rows, ours = [], [r for r in records if r.impl == "linattn" and not math.isnan(r.p50_ms)]
    for pass_ in dict.fromkeys(r.pass_ for r in ours):
        some = [r for r in ours if r.pass_ == pass_]
        cost = {r.case: r.p50_ms * 1e6 / math.prod(_sizes(r.case)) for r in some}
        full = [cost[r.case] for r in some if _full(r)]
        least = min(full or cost.values())
        for r in some:
            limit = FLAT if _full(r) else SPLIT
            times = cost[r.case] / least
            verdict = "yes" if times <= limit else "no"
            cells = [r.case, pass_, ms(r.p50_ms), f"{cost[r.case]:.3f}", f"{_with_states(r):.2f}"]
            rows.append([*cells, f"{times:.2f}", f"{limit:g}", verdict])
    columns = ["case", "pass", "ms", "ns a token and head", "x bytes", "x cheapest", "promised", "reached"]
    return markdown(columns, rows)


def _with_states(record: Record) -> float:
    """The bytes of a forward with the fp32 States that it writes over those without; with backward it writes none."""
    case = parse_case(record.op, record.case)
    assert isinstance(case, TaylorCase | LightningCase)
    if record.pass_ == "fwdbwd":
        return 1.0
    return 1 + case.batch * state_numbers(case) * 4 / costs(case, "fwd", getattr(torch, record.dtype)).bytes


def table5_page(records: Sequence[Record], source: str) -> str:
    """Table 5 of Just Read Twice on this GPU, and the sweep over batches."""
    records = newest_runs(records)
    parts = [heading("Reading twice against FlashAttention-2: Table 5 on one GPU", records, source)]
    parts.append(
        "One attention op of a 360M model (16 heads, features 16, values 64), forward, bf16, with normaliser, scale "
        "and final State. JRT-Prompt reads 2N tokens; JRT-RNN reads N with a prefix of N/2. FA2 and cuDNN are causal "
        "softmax attention over N tokens. The paper's figures are an H100's, without normaliser, scale and State."
    )
    groups: dict[str, dict[str, Record]] = defaultdict(dict)
    for r in records:
        groups[r.case][label(r.impl)] = r
    batch, length = table5.POINTS[0]
    main = table5.base_case(batch, length).name
    ours = (table5.PROMPT, table5.RNN, table5.ONCE)
    if main in groups:
        rows = [_table5_row(groups[main], name) for name in (*ours, "FA2", "cuDNN") if name in groups[main]]
        columns = ["what", "ms", "floor", "x faster than FA2", "target", "reached", "in the paper"]
        parts += [f"## B = {batch}, N = {length:,}", markdown(columns, rows)]
    sweep = {case: group for case, group in groups.items() if case != main}
    if sweep:
        rows = []
        for case, group in sweep.items():
            times = [group[n].p50_ms if n in group else math.nan for n in (*ours, "FA2", "cuDNN")]
            rows.append([case, *map(ms, times), *(ratio(times[3], t) for t in times[:2])])
        columns = ["case", *(n.removeprefix("linattn ") for n in ours), "FA2", "cuDNN"]
        parts += ["## Batches", markdown([*columns, "FA2 / JRT-Prompt", "FA2 / JRT-RNN"], rows)]
    absent = [f"- {r.case}, {label(r.impl)}: {r.gate}" for r in records if math.isnan(r.p50_ms)]
    parts += ["## Not timed", "\n".join(absent)] if absent else []
    return "\n\n".join(parts) + "\n"


def _table5_row(group: Mapping[str, Record], name: str) -> list[str]:
    r, base = group[name], group["FA2"].p50_ms if "FA2" in group else math.nan
    target, paper = table5.TARGETS.get(name), table5.PAPER.get(name)
    reached = "" if target is None or math.isnan(base / r.p50_ms) else "yes" if base / r.p50_ms >= target else "no"
    cells = [name.removeprefix("linattn "), ms(r.p50_ms), ms(r.floor_ms), ratio(base, r.p50_ms)]
    return [*cells, "" if target is None else f"{target:g}", reached, "" if paper is None else f"{paper:g}"]


def _pass_name(pass_: str) -> str:
    return {"fwd": "forward", "fwdbwd": "forward and backward"}.get(pass_, pass_)


def _sizes(case: str) -> tuple[int, int, int]:
    """B, H, T of a case's name."""
    numbers = {letter: int(n) for letter, n in re.findall(r"(?:^|-)([bht])(\d+)", case)}
    return numbers["b"], numbers["h"], numbers["t"]


def _full(record: Record) -> bool:
    batch, heads, _ = _sizes(record.case)
    return batch * heads >= FULL[record.op]
