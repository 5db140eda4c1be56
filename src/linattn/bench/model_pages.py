"""The pages of whole models: training and prefill, in tokens per second."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from linattn.bench.page_parts import heading, label, markdown
from linattn.bench.record import Record
from linattn.bench.subjects import (
    FLA,
    LIKE,
    TRAIN_SUBJECTS,
    read_case,
    subject_config,
    tokens_per_s,
    utilisation,
)

FLAT = 0.05
"""How far a TransNormerLLM's speed may stray below its own at the shortest length."""
HOW = {
    "train": (
        "Whole updates: forward and backward in bf16 autocast, blocks recomputed unless a row says kept, cross-entropy "
        "in chunks, clipping, fused AdamW on fp32 weights; random tokens. MFU: model FLOPs, recomputation not counted, "
        "over the data sheet's dense bf16. x shortest: over the same model's speed at its shortest length."
    ),
    "prefill": (
        "Prompts read into a state, bf16 weights, the last token's logits; random tokens. JRT reads the first half of "
        "a prompt as its prefix. Attention is the 1.3B baseline with heads of 128, through FlashAttention-2."
    ),
}


def train_page(records: Sequence[Record], source: str) -> str:
    """Training: tokens per second at every length, beside attention of the same size and fla's kernels."""
    shown = latest(records)
    parts = [heading("Training: tokens per second on one GPU", shown, source), HOW["train"]]
    panels = training_panels(records)
    if panels:
        parts.append("![train: tokens per second against length](train.png)")
    likes = [r for r in shown if subject_of(r) not in _based()]
    based = [r for r in shown if subject_of(r) in _based()]
    if likes:
        parts += ["## TransNormerLLM beside attention of its size", speed_table(likes)]
    if based:
        parts += ["## Based 360M beside itself on fla's kernels, and attention", speed_table(based)]
    return "\n\n".join(parts) + "\n"


def prefill_page(records: Sequence[Record], source: str) -> str:
    """Prefill: tokens per second at every length, beside attention."""
    shown = latest(records)
    parts = [heading("Prefill: tokens per second on one GPU", shown, source), HOW["prefill"]]
    if prefill_panels(records):
        parts.append("![prefill: tokens per second against length](prefill.png)")
    return "\n\n".join([*parts, speed_table(shown)]) + "\n"


def latest(records: Sequence[Record]) -> list[Record]:
    """The last record of each case, in the order of their first mention."""
    return list({r.case: r for r in records}.values())


def subject_of(record: Record) -> str:
    """The model of a record."""
    return read_case(record.case)[0]


def training_panels(records: Sequence[Record]) -> list[tuple[str, dict[str, dict[int, float]]]]:
    """A panel a size of TransNormerLLM: label -> length -> tokens per second, of plain rows that were timed."""
    panels: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for r in latest(records):
        name, _, length = read_case(r.case)
        plain = r.case.endswith(f"-t{length}")
        if "transnormer" in name and plain and not math.isnan(r.p50_ms):
            line = "attention, FA2" if name.startswith(LIKE) else "TransNormerLLM"
            panels[name.removeprefix(LIKE)][line][length] = tokens_per_s(r)
    return [(name, {n: dict(sorted(line.items())) for n, line in lines.items()}) for name, lines in panels.items()]


def prefill_panels(records: Sequence[Record]) -> list[tuple[str, dict[str, dict[int, float]]]]:
    """One panel: label -> length -> tokens per second, of plain rows that were timed."""
    lines: dict[str, dict[int, float]] = defaultdict(dict)
    for r in latest(records):
        name, _, length = read_case(r.case)
        if r.case.endswith(f"-t{length}") and not math.isnan(r.p50_ms):
            lines["attention, FA2" if r.impl.startswith("sdpa") else name][length] = tokens_per_s(r)
    return [("reading a prompt", {n: dict(sorted(line.items())) for n, line in lines.items()})] if lines else []


def speed_table(records: Sequence[Record]) -> str:
    """A row a case: tokens per second, over the same model's shortest text, MFU, memory, or why there is none."""
    shortest: dict[tuple[str, str], Record] = {}
    for r in records:
        key = (subject_of(r), _form(r))
        if not math.isnan(r.p50_ms) and (
            key not in shortest or read_case(r.case)[2] < read_case(shortest[key].case)[2]
        ):
            shortest[key] = r
    rows = []
    for r in records:
        name, batch, length = read_case(r.case)
        cells = [name + _form(r), label(r.impl), f"{batch} x {length:,}"]
        if math.isnan(r.p50_ms):
            rows.append([*cells, "", "", "", "", r.gate])
            continue
        against = tokens_per_s(r) / tokens_per_s(shortest[name, _form(r)])
        mfu = utilisation(r, subject_config(name))
        share = "" if math.isnan(mfu) else f"{mfu:.1%}"
        memory = f"{r.peak_bytes / 2**30:.1f}" if r.peak_bytes else ""
        promised = name.startswith("transnormer") and r.op == "train"
        verdict = "" if not promised else "flat" if against >= 1 - FLAT else "not flat"
        rows.append([*cells, f"{tokens_per_s(r):,.0f}", f"{against:.2f}", share, memory, verdict])
    return markdown(["model", "kernels", "batch", "tokens/s", "x shortest", "MFU", "GiB", ""], rows)


def _form(record: Record) -> str:
    """What follows a case's length: kept, compiled."""
    _, _, length = read_case(record.case)
    return record.case.partition(f"-t{length}")[2]


def _based() -> set[str]:
    return {name for name in TRAIN_SUBJECTS if "360m" in name or FLA in name}
