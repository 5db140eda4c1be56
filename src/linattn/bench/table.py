"""Records as tables for people."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from linattn.bench.record import Record


def print_records(
    console: Console, records: Sequence[Record], missing: Sequence[tuple[str, str]] = (), target_ms: float = math.nan
) -> None:
    """One case and pass: every implementation with its median, how far from the floor and ours, its memory.

    ``target_ms`` is what ours is to reach, NaN where nothing was set.
    """
    if records:
        first = records[0]
        title = f"{first.op} {first.case} {first.pass_} {first.dtype}, floor {_ms(first.floor_ms)} ms"
        if not math.isnan(target_ms):
            title += f", target {_ms(target_ms)} ms"
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("impl", no_wrap=True)
        for name in ("ms", "p20", "p80", "x floor", "x ours", "MiB"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("gate")
        ours = next((r.p50_ms for r in records if r.impl.startswith("linattn")), math.nan)
        for r in records:
            table.add_row(
                r.impl,
                _ms(r.p50_ms),
                _ms(r.p20_ms),
                _ms(r.p80_ms),
                _ratio(r.p50_ms, r.floor_ms),
                _ratio(r.p50_ms, ours),
                f"{r.peak_bytes / 2**20:,.1f}" if r.peak_bytes else "-",
                r.gate,
            )
        console.print(table)
    by_reason: dict[str, list[str]] = {}
    for name, reason in missing:
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        console.print(f"  without {', '.join(names)}: {reason}", style="dim", highlight=False)


def print_rows(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table whose first column is text and whose others are figures."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _ms(ms: float) -> str:
    if math.isnan(ms):
        return "-"
    return f"{ms:.4f}" if ms < 0.1 else f"{ms:,.3f}" if ms < 100 else f"{ms:,.1f}"


def _ratio(x: float, y: float) -> str:
    return "-" if math.isnan(x) or math.isnan(y) or y == 0 else f"{x / y:.2f}"
