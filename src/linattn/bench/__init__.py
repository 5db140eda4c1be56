"""Speed as a record: gate, time, floor, CSV. `run_bench` is the whole of it; the files are usable alone."""

from linattn.bench.run import BenchConfig, run_bench

__all__ = ["BenchConfig", "run_bench"]
