"""What `linattn bench OP` measures on a GPU: each op's cases, passes, peers, and the figures to reach on one H200.

A target is milliseconds at bf16, or so many times the case's floor; it is shown, and never read by the gate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from linattn.bench.cases import Pass

Section = Literal["main", "lengths", "flat", "step"]
"""main: the shapes with targets. lengths: one batch at growing length, for the charts. flat: a constant number of
tokens at growing length, ours alone. step: decoding."""


class Target(NamedTuple):
    """At most so many milliseconds, or so many times the floor."""

    ms: float = math.nan
    floors: float = math.nan

    def limit_ms(self, floor_ms: float) -> float:
        """Milliseconds, on a machine with this floor."""
        return self.floors * floor_ms if math.isnan(self.ms) else self.ms

    def __str__(self) -> str:
        return f"{self.floors:g}x the floor" if math.isnan(self.ms) else f"{self.ms:g} ms"


class Row(NamedTuple):
    """One case of a table. host: also with the host's time of launching, and ours as a CUDA graph."""

    case: str
    passes: tuple[Pass, ...] = ("fwd", "fwdbwd")
    targets: Mapping[Pass, Target] = {}
    section: Section = "main"
    peers: bool = True
    host: bool = False


def _both(case: str, fwd: float, fwdbwd: float, host: bool = False) -> Row:
    return Row(case, targets={"fwd": Target(fwd), "fwdbwd": Target(fwdbwd)}, host=host)


def _flat(cases: str) -> tuple[Row, ...]:
    return tuple(Row(case, section="flat", peers=False) for case in cases.split())


def _lengths(cases: str) -> tuple[Row, ...]:
    return tuple(Row(case, section="lengths") for case in cases.split())


def _steps(shape: str, b64: tuple[int, float] | None, b1024: float | None) -> tuple[Row, ...]:
    """Batches of 1, some, and 1,024 rows; a single row is to take at most 8 us."""
    targets = {1: Target(0.008) if b64 else None}
    some = b64[0] if b64 else 128
    targets |= {some: Target(floors=b64[1]) if b64 else None, 1024: Target(floors=b1024) if b1024 else None}
    return tuple(
        Row(f"b{batch}-{shape}", ("step",), {} if target is None else {"step": target}, "step", peers=False)
        for batch, target in targets.items()
    )


TABLES: dict[str, tuple[Row, ...]] = {
    "lightning": (
        _both("b4-h32-t2048-d128", 0.095, 0.40, host=True),
        _both("b4-h32-t8192-d128", 0.34, 1.40),
        _both("b4-h32-t32768-d128", 1.35, 5.5),
        _both("b1-h32-t131072-d128", 1.9, 7.0),
        _both("b1-h16-t524288-d128", 3.8, 14.0),
        *_lengths("b4-h32-t1024-d128 b4-h32-t4096-d128 b4-h32-t16384-d128 b4-h32-t65536-d128"),
        *_flat("b1024-h16-t1024-d128 b256-h16-t4096-d128 b64-h16-t16384-d128 b16-h16-t65536-d128"),
        *_flat("b8-h16-t131072-d128 b4-h16-t262144-d128 b1-h16-t1048576-d128"),
        *_steps("h32-d128", (64, 1.25), 1.15),
    ),
    "taylor": (
        Row("b16-h16-t2048-f16-v64", targets={"fwd": Target(0.12)}, host=True),
        Row("b16-h16-t8192-f16-v64", ("fwd",), {"fwd": Target(0.42)}),
        Row("b16-h16-t32768-f16-v64", ("fwd",), {"fwd": Target(1.6)}),
        Row("b2-h16-t16384-f16-v64", ("fwd",), {"fwd": Target(0.13)}),
        Row("b32-h16-t2048-f16-v64", ("fwdbwd",), {"fwdbwd": Target(1.3)}),
        Row("b4-h16-t16384-f16-v64", targets={"fwdbwd": Target(1.3)}),
        Row("b16-h16-t8192-f16-v112", targets={"fwd": Target(0.75)}),
        *_lengths("b4-h16-t1024-f16-v64 b4-h16-t4096-f16-v64 b4-h16-t65536-f16-v64"),
        *_flat("b512-h16-t1024-f16-v64 b128-h16-t4096-f16-v64 b32-h16-t16384-f16-v64 b8-h16-t65536-f16-v64"),
        *_flat("b2-h16-t262144-f16-v64 b1-h16-t524288-f16-v64"),
        *_steps("h16-f16-v112", (128, 1.3), 1.2),
    ),
    "prefix": (
        Row("b16-h16-t2048-f16-v64-m1024", host=True),
        Row("b16-h16-t8192-f16-v64-m4096"),
        Row("b16-h16-t32768-f16-v64-m16384", ("fwd",), {"fwd": Target(1.9)}),
        Row("b32-h16-t2048-f16-v64-m1024", ("fwdbwd",)),
        Row("b4-h16-t16384-f16-v64-m8192"),
        Row("b2-h16-t16384-f16-v64-m8192", ("fwd",)),
        Row("b16-h16-t8192-f16-v112-m4096"),
    ),
    "window": (
        Row("b16-h16-t2048-d64-w129", host=True),
        Row("b16-h16-t8192-d64-w129"),
        Row("b16-h16-t32768-d64-w129"),
        Row("b4-h16-t16384-d64-w129", peers=False),
        Row("b16-h16-t2048-d64-w65", peers=False),
        Row("b16-h16-t8192-d112-w129"),
        *_steps("h16-d64-w129", None, None),
        *_steps("h16-d112-w129", None, None),
    ),
    "shortconv": (
        Row("b16-t2048-d2048-w3-silu-gate", host=True),
        Row("b16-t8192-d2048-w3-silu-gate"),
        Row("b16-t32768-d2048-w3-silu-gate"),
        Row("b32-t2048-d2048-w3-silu-gate"),
        Row("b4-t16384-d2048-w3-silu-gate"),
        Row("b16-t2048-d3584-w3-silu-gate"),
        *_steps("d3584-w3-silu-gate", None, None),
    ),
}
"""By op. Decoding takes TransNormerLLM 7B's heads, and those of Based 1.3B."""


def table_rows(op: str, cases: Sequence[str] = (), sections: Sequence[str] = ()) -> list[Row]:
    """The rows of an op's table, limited to cases by name and to sections; a case that is not in it is a row too.

    Raises:
        ValueError: a section without rows.
    """
    for name in sections:
        if name not in {row.section for row in TABLES[op]}:
            raise ValueError(f"{op}: no section {name!r}; choose from {sorted({r.section for r in TABLES[op]})}")
    rows = [row for row in TABLES[op] if not sections or row.section in sections]
    if not cases:
        return rows
    known = {row.case: row for row in rows}
    return [known.get(case, Row(case)) for case in cases]


def target_of(op: str, case: str, pass_: str) -> Target | None:
    """What a case and pass must reach, None where nothing was set."""
    for row in TABLES.get(op, ()):
        for name, target in row.targets.items():
            if (row.case, name) == (case, pass_):
                return target
    return None
