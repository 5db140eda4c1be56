"""What the pages of results share: headings, tables in Markdown, figures and names as they are written there."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from linattn.bench.record import Record
from linattn.bench.setting import HOST

PEER_LABELS = (
    ("sdpa-flash", "FA2"),
    ("FA2-window", "FA2 with its window"),
    ("FA2", "FA2"),
    ("sdpa-cudnn", "cuDNN"),
    ("cuDNN", "cuDNN"),
    ("fla", "fla"),
)


def label(impl: str) -> str:
    """An implementation's name without its version: FA2, cuDNN, fla chunk_simple_gla, lightning_attn, linattn."""
    name, host, _ = impl.partition(HOST)
    if name.startswith("linattn"):
        return impl
    for start, plain in PEER_LABELS:
        if name.startswith(start):
            # fla's functions are many: what is left of the name without version says which.
            words = re.sub(r"^fla[- ]|\d[\w.+]*", "", name).split() if plain == "fla" else []
            return " ".join([plain, *words]) + host
    return name.split(" ")[0] + host


def heading(title: str, records: Sequence[Record], source: str) -> str:
    """Title, where the figures come from, and the machines, versions and commits of what is shown."""
    shown = list(dict.fromkeys((r.gpu, r.driver, r.torch, r.triton) for r in records))
    machines = "; ".join(
        f"{gpu}, driver {driver}, torch {torch}, triton {triton}" for gpu, driver, torch, triton in shown
    )
    runs = ", ".join(f"{commit} ({date})" for date, commit in dict.fromkeys((r.date, r.commit) for r in records))
    timed = [r.impl for r in records if not r.impl.startswith("linattn") and not math.isnan(r.p50_ms)]
    versions = sorted({impl.partition(HOST)[0] for impl in timed})
    lines = [
        f"# {title}",
        "",
        f"Made from {source} by `linattn bench pages`. {machines}.",
        "",
        f"Commits and runs: {runs}.",
    ]
    return "\n".join([*lines, "", f"Peers: {', '.join(versions)}."] if versions else lines)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; all columns but the first are figures."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, rule, *rows])


def ms(value: float) -> str:
    """Milliseconds, three figures; nothing for NaN."""
    return "" if math.isnan(value) else f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def ratio(x: float, y: float) -> str:
    """x / y; nothing where there is none."""
    return "" if math.isnan(x / y) else f"{x / y:.2f}"
