"""Records: every figure with what is needed to believe it or to measure it again, as CSV that git can diff.

One file an op and machine: benchmarks/results/<gpu>/<op>.csv. Rows are only ever added.

    pytest tests/test_bench.py -k record
"""

from __future__ import annotations

import csv
import io
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import linattn
from linattn.bench.timing import pages_are_kept

RESULTS = Path("benchmarks/results")


@dataclass(frozen=True)
class Machine:
    """Where and with what a figure was measured: the columns that are the same for all records of a run."""

    date: str
    commit: str
    gpu: str
    driver: str
    torch: str
    triton: str
    command: str


@dataclass(frozen=True)
class Record:
    """One line of a results file. Times are milliseconds of one call, NaN (an empty cell) where none was taken."""

    date: str
    """When the run began, UTC, to the second."""
    commit: str
    """Twelve digits, and -dirty where the tree held changes outside benchmarks/."""
    gpu: str
    """The GPU's name, or cpu, its name and the threads used."""
    driver: str
    """Of the GPU; on a CPU "pages kept" where `timing.keep_pages` holds."""
    torch: str
    triton: str
    op: str
    case: str
    """Spelled like b4-h32-t8192-d128."""
    pass_: str
    """fwd, fwdbwd or step; the column is named pass."""
    impl: str
    """linattn, linattn:BACKEND, or a peer's name and version."""
    p20_ms: float
    p50_ms: float
    p80_ms: float
    floor_ms: float
    """The case's bytes and FLOPs over the machine's measured ceilings; NaN where it has none."""
    gate: str
    """ok; the laws that failed (then nothing was timed); or what a peer computes, where that is another op."""
    command: str
    dtype: str = ""
    best_ms: float = math.nan
    runs: int = 0
    peak_bytes: int = 0
    """Largest memory of one call, inputs, outputs and gradients included; on a CPU without the inputs. 0: not taken."""


_NAMES = {f.name: f.name.rstrip("_") for f in fields(Record)}
COLUMNS = tuple(_NAMES.values())
_KINDS: dict[str, type] = {"float": float, "int": int, "str": str}


def results_path(op: str, device: str, root: Path = RESULTS) -> Path:
    """benchmarks/results/h200/lightning.csv and the like."""
    return root / machine_slug(device) / f"{op}.csv"


def machine_slug(device: str) -> str:
    """cpu, or the GPU's name without its maker: h200, rtx-4090."""
    if torch.device(device).type != "cuda":
        return torch.device(device).type
    name = torch.cuda.get_device_name(device).lower()
    words = [w for w in re.findall(r"[a-z0-9]+", name) if w not in ("nvidia", "amd", "geforce", "tesla")]
    return "-".join(words)


def machine(device: str, known_commit: str = "") -> Machine:
    """This machine, now. ``known_commit`` names the commit of a tree that was copied without its history."""
    program = Path(sys.argv[0]).name
    argv = ["linattn" if program == "main.py" else program, *sys.argv[1:]]  # python -m linattn.cli.main is it too
    return Machine(
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        commit=known_commit or commit(),
        gpu=device_name(device),
        driver=_driver() if torch.device(device).type == "cuda" else "pages kept" * pages_are_kept(),
        torch=torch.__version__,
        triton=_version("triton"),
        command=shlex.join(argv),
    )


def device_name(device: str) -> str:
    """NVIDIA H200; or cpu (AMD EPYC 9654, 2 threads)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"cpu ({_cpu_name()}, {threads} thread{'s' * (threads > 1)})"


def commit(folder: Path | None = None) -> str:
    """Twelve digits of the checkout that the package stands in, with -dirty where its tree has changes.

    Untracked files count, ignored ones and the results under benchmarks/ do not. An installed package has no checkout:
    then it is v and its version.
    """
    package = Path(linattn.__file__).parent
    if folder is None:
        top = _git(package, "rev-parse", "--show-toplevel")
        if not top or Path(top).resolve() / "src" / "linattn" != package.resolve():
            return f"v{_version('linattn')}"
        folder = Path(top)
    head = _git(folder, "rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    changes = _git(folder, "status", "--porcelain", "--", ":/", ":(exclude,top)benchmarks")
    return f"{head}-dirty" if changes else head


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Add records to a CSV file, made if it is not there: read, add, write beside, rename. A reader sees all or none.

    Raises:
        ValueError: the file holds something else, or columns that this version does not know.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    everything = [*(read_records(path) if path.exists() else []), *records]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([_cell(getattr(r, name)) for name in _NAMES] for r in everything)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", newline="") as file:
            file.write(text.getvalue())
            file.flush()
            os.fsync(file.fileno())
        Path(beside).chmod(0o644)
        Path(beside).replace(path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def read_records(path: Path) -> list[Record]:
    """The records of a CSV file, in its order. Columns that came later are at their defaults in older files.

    Raises:
        ValueError: a column that no record has, a missing one, or a cell that is not a number; with its line.
    """
    with path.open(newline="") as file:
        rows = csv.DictReader(file, strict=True)
        unknown = sorted(set(rows.fieldnames or ()) - set(COLUMNS))
        if unknown or not rows.fieldnames:
            raise ValueError(f"{path} has columns that no record has: {unknown}; expected {list(COLUMNS)}")
        return [_record(path, line, row) for line, row in enumerate(rows, 2)]


def _record(path: Path, line: int, row: dict[str, str]) -> Record:
    values: dict[str, Any] = {}
    for f in fields(Record):
        cell = row.get(_NAMES[f.name])
        if cell is None:
            continue
        kind = _KINDS[str(f.type)]
        try:
            values[f.name] = math.nan if kind is float and cell == "" else kind(cell)
        except ValueError:
            raise ValueError(f"{path}, line {line}: {_NAMES[f.name]} is {cell!r}, not a {f.type}") from None
    try:
        return Record(**values)
    except TypeError as error:
        raise ValueError(f"{path}, line {line}: {error}") from None


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value)


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


@cache
def _driver() -> str:
    """The driver's version, by the tool that comes with it; empty where that is missing."""
    query: Sequence[str] = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""


@cache
def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
