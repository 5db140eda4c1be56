"""Charts from records: time against length, and the State beside a key-value cache. Needs the extra linattn[plot].

The suffix chooses the format: .png (180 dots an inch) or .svg. Lines carry their own labels, so that no legend has to
be matched by colour.

    pytest tests/test_bench_plot.py
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from linattn.bench.record import Record

DOTS = 180
LABEL_GAP = 0.05
"""Least distance of two labels at the ends of lines, as a share of the axis."""
INK, FAINT, GRID = "#1b1f24", "#6b7280", "#e5e7eb"
OURS, OTHER = "#0f62a6", "#c2410c"
COLORS = (OURS, OTHER, "#0f766e", "#7c3aed", "#a16207", "#be185d", "#4b5563", "#15803d")
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "axes.edgecolor": "#9ca3af",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelcolor": INK,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "svg.fonttype": "none",
}


class MemoryRow(NamedTuple):
    """One moment of reading a long text as a stream.

    tokens: read so far. state_bytes: the model's whole state then. cache_bytes: what a key-value cache of a model of
    this size would hold. tokens_per_s: the speed just then, NaN where it was not taken.
    """

    tokens: int
    state_bytes: float
    cache_bytes: float
    tokens_per_s: float = math.nan


def plot_memory(rows: Sequence[MemoryRow], path: Path, *, title: str = "") -> None:
    """The README's chart: bytes (log) against tokens read, one line for the State and one for the cache.

    The first and the last known speed are written at the ends of the State's line.

    Raises:
        ModuleNotFoundError: matplotlib is missing. ValueError: fewer than two rows.
    """
    if len(rows) < 2:
        raise ValueError(f"a chart of memory needs at least two moments, got {len(rows)}")
    with _style() as figure_of:
        figure = figure_of(8.4, 4.4)
        axes = figure.subplots()
        tokens = [r.tokens for r in rows]
        axes.plot(tokens, [r.cache_bytes for r in rows], color=OTHER, linewidth=2.4)
        axes.plot(tokens, [r.state_bytes for r in rows], color=OURS, linewidth=2.8)
        axes.set_yscale("log")
        top = max(max(r.cache_bytes, r.state_bytes) for r in rows)
        bottom = min(min(r.cache_bytes, r.state_bytes) for r in rows if min(r.cache_bytes, r.state_bytes) > 0)
        axes.set_ylim(bottom / 3, top * 3)
        axes.set_xlim(0, tokens[-1])
        axes.grid(axis="y")
        axes.xaxis.set_major_formatter(lambda x, _: _tokens(x))
        axes.yaxis.set_major_formatter(lambda y, _: _bytes(y))
        axes.yaxis.set_minor_formatter("")
        axes.tick_params(which="both", length=0)
        axes.set_xlabel("tokens read")
        last = rows[-1]
        _end_label(axes, last.tokens, last.cache_bytes, f"key-value cache\n{_bytes(last.cache_bytes)}", OTHER)
        _end_label(axes, last.tokens, last.state_bytes, f"linattn's state\n{_bytes(last.state_bytes)}", OURS)
        timed = [r for r in rows if not math.isnan(r.tokens_per_s)]
        if timed:
            above = last.state_bytes * (top / bottom) ** 0.06
            for r, side in dict.fromkeys([(timed[0], "left"), (timed[-1], "right")]):
                x = 0.01 * tokens[-1] if side == "left" else 0.99 * tokens[-1]
                axes.text(x, above, f"{r.tokens_per_s:,.0f} tokens/s", color=OURS, ha=side, va="bottom", fontsize=10)
        heading = title or f"Memory while reading {_tokens(last.tokens)} tokens as one stream"
        axes.set_title(heading, pad=14)
        _save(figure, path)


def plot_lengths(records: Sequence[Record], path: Path, *, pass_: str = "fwd", title: str = "") -> None:
    """Two panels from the records of one op: milliseconds, and microseconds a token, against length, one line an impl.

    The latest record of each length and implementation counts. Medians, with p20 to p80 shaded.

    Raises:
        ModuleNotFoundError: matplotlib is missing. ValueError: no record of that pass was timed.
    """
    lines = latest_by_length(records, pass_)
    if not lines:
        raise ValueError(f"no timed record of pass {pass_!r} among {len(records)}")
    with _style() as figure_of:
        figure = figure_of(11.5, 4.6)
        for axes, each, name in zip(figure.subplots(1, 2), (False, True), ("ms a call", "µs a token"), strict=True):
            for color, (impl, points) in zip(_cycle(len(lines)), lines.items(), strict=True):
                _line(axes, impl, points, color, each)
            _length_axes(axes, name)
        some = records[0]
        figure.suptitle(title or f"{some.op}, {pass_}, {some.gpu}", x=0.01, ha="left", fontsize=12)
        _save(figure, path)


def plot_time_memory(
    lines: Mapping[str, Mapping[int, Record]], path: Path, *, title: str, ours: Sequence[str] = ("linattn",)
) -> None:
    """Two panels: milliseconds a call, and GiB at its peak, against length; Lightning Attention-2's figure.

    Args:
        lines: label -> length -> a timed record. Records without a peak are left out of the second panel.
        ours: labels drawn thicker.

    Raises:
        ModuleNotFoundError: matplotlib is missing. ValueError: no lines.
    """
    panels = [
        ("ms a call", {n: {t: r.p50_ms for t, r in line.items()} for n, line in lines.items()}),
        ("GiB at the peak of a call", {n: _peaks(line) for n, line in lines.items()}),
    ]
    _panels([(name, {n: line for n, line in panel.items() if line}) for name, panel in panels], path, title, ours)


def plot_speeds(panels: Sequence[tuple[str, Mapping[str, Mapping[int, float]]]], path: Path, *, title: str) -> None:
    """A panel a size of model: tokens per second against length, a line for each label.

    Raises:
        ModuleNotFoundError: matplotlib is missing. ValueError: no lines.
    """
    _panels(panels, path, title, [label for _, lines in panels for label in lines if not label.startswith("attention")])


def _peaks(line: Mapping[int, Record]) -> dict[int, float]:
    return {t: r.peak_bytes / 2**30 for t, r in line.items() if r.peak_bytes}


def _panels(
    panels: Sequence[tuple[str, Mapping[str, Mapping[int, float]]]], path: Path, title: str, thick: Sequence[str]
) -> None:
    """Panels side by side, both axes logarithmic; a label has one colour in all of them."""
    drawn = [(name, lines) for name, lines in panels if lines]
    if not drawn:
        raise ValueError("nothing to draw: no record was timed")
    labels = list(dict.fromkeys(label for _, lines in drawn for label in lines))
    colors = dict(zip(labels, _cycle(len(labels)), strict=True))
    with _style() as figure_of:
        figure = figure_of(5.9 * len(drawn) + 0.5, 4.6)
        for axes, (name, lines) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
            for label, line in lines.items():
                lengths, values = list(line), list(line.values())
                width = 2.6 if label in thick else 1.7
                axes.plot(lengths, values, color=colors[label], linewidth=width, marker="o", markersize=4)
            _length_axes(axes, name)
            ends = {label: list(line.items())[-1] for label, line in lines.items()}
            bottom, top = axes.get_ylim()
            heights = spread({label: y for label, (_, y) in ends.items()}, (top / bottom) ** LABEL_GAP)
            for label, (x, _) in ends.items():
                _end_label(axes, x, heights[label], label, colors[label], size=9)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        _save(figure, path)


def latest_by_length(records: Sequence[Record], pass_: str) -> dict[str, dict[int, Record]]:
    """The latest timed records of a pass: implementation -> length -> record, in the order of their first mention."""
    lines: dict[str, dict[int, Record]] = defaultdict(dict)
    for r in records:
        length = length_in(r.case)
        if r.pass_ == pass_ and length is not None and not math.isnan(r.p50_ms):
            lines[r.impl][length] = r
    return {impl: dict(sorted(points.items())) for impl, points in lines.items()}


def length_in(case: str) -> int | None:
    """T of a case's name, None where it has none."""
    match = re.search(r"(?:^|-)t(\d+)", case)
    return int(match[1]) if match else None


def _line(axes: Any, impl: str, points: Mapping[int, Record], color: str, each: bool) -> None:
    lengths = list(points)
    middle, low, high = (
        [getattr(r, name) * (1e3 / _tokens_of(r) if each else 1) for r in points.values()]
        for name in ("p50_ms", "p20_ms", "p80_ms")
    )
    width = 2.6 if impl.startswith("linattn") else 1.7
    axes.plot(lengths, middle, color=color, linewidth=width, marker="o", markersize=4)
    axes.fill_between(lengths, low, high, color=color, alpha=0.15, linewidth=0)
    _end_label(axes, lengths[-1], middle[-1], impl, color, size=9)


def spread(heights: Mapping[str, float], factor: float) -> dict[str, float]:
    """Heights of labels in the same order, moved up so that each is at least ``factor`` times the one below."""
    moved: dict[str, float] = {}
    below = 0.0
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        moved[name] = below = max(height, below * factor)
    return moved


def _length_axes(axes: Any, title: str) -> None:
    """Both axes logarithmic, lengths in powers of two."""
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(axis="y")
    axes.xaxis.set_major_formatter(lambda x, _: _binary(x))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.10g}")
    axes.yaxis.set_minor_formatter("")
    axes.tick_params(which="both", length=0)
    axes.set_xlabel("tokens a sequence")
    axes.set_title(title)


def _tokens_of(r: Record) -> int:
    """Tokens of the whole batch, where the case names one."""
    batch = re.match(r"b(\d+)-", r.case)
    return (int(batch[1]) if batch else 1) * (length_in(r.case) or 1)


def _end_label(axes: Any, x: float, y: float, text: str, color: str, size: int = 11) -> None:
    axes.annotate(
        text,
        (x, y),
        xytext=(8, 0),
        textcoords="offset points",
        color=color,
        fontsize=size,
        fontweight="bold",
        va="center",
        annotation_clip=False,
    )


def _cycle(n: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(n)]


def _tokens(x: float) -> str:
    for unit, size in (("M", 10**6), ("k", 10**3)):
        if x >= size:
            return f"{x / size:.3g}{unit}"
    return f"{x:.0f}"


def _binary(x: float) -> str:
    return f"{x / 1024:g}K" if x >= 1024 else f"{x:g}"


def _bytes(x: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if x >= size:
            return f"{x / size:.3g} {unit}"
    return f"{x:.0f} B"


@contextmanager
def _style() -> Iterator[Callable[[float, float], Any]]:
    """matplotlib with our look, undone on leaving; gives (width, height in inches) -> figure. No display is touched."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("charts need matplotlib: pip install 'linattn[plot]'") from None
    with mpl.rc_context(STYLE):
        yield lambda width, height: Figure(figsize=(width, height), facecolor="white", layout="constrained")


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS)
