"""`linattn bench OP`: the laws, then times beside floors and peers, appended to benchmarks/results."""

from __future__ import annotations

import tyro

from linattn.bench import BenchConfig, run_bench


def run(argv: list[str]) -> int:
    """Run one benchmark; exit code 1 if a law failed."""
    return run_bench(tyro.cli(BenchConfig, args=argv, prog="linattn bench"))
