"""`linattn doctor`: the versions, the devices, and which backend each op takes here, with the others' reasons."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from dataclasses import dataclass

import torch
import tyro
from rich.console import Console
from rich.table import Table

from linattn.core.dispatch import choose, describe

MIXERS = ("taylor", "lightning", "window", "shortconv", "softmax")


@dataclass(frozen=True)
class DoctorArgs:
    """Say what this machine has and which backend every op would take on it."""


def run(argv: list[str]) -> int:
    """Print the report."""
    tyro.cli(DoctorArgs, args=argv, prog="linattn doctor")
    console = Console()
    for name in ("linattn", "torch", "triton", "safetensors", "tokenizers"):
        console.print(f"{name:12s} {_version(name)}", highlight=False)
    console.print(f"{'python':12s} {platform.python_version()}, {torch.get_num_threads()} threads", highlight=False)
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        major, minor = torch.cuda.get_device_capability()
        console.print(f"{'gpu':12s} {torch.cuda.get_device_name()}, compute capability {major}.{minor}")
    else:
        console.print(f"{'gpu':12s} none that torch can use")
    table = Table()
    for head in ("op", "device", "dtype", "backend", "why not the others"):
        table.add_column(head)
    for mixer in MIXERS:
        for device in devices:
            for dtype in (torch.float32, torch.bfloat16):
                table.add_row(*_choice(mixer, device, dtype))
    console.print(table)
    console.print("prefix attention is Taylor attention begun from a State: it takes Taylor's backend.")
    return 0


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _choice(mixer: str, device: str, dtype: torch.dtype) -> tuple[str, ...]:
    module = importlib.import_module(f"linattn.mixers.{mixer}")
    case = importlib.import_module(f"linattn.mixers.{mixer}.cases").REAL[0]
    inputs = case.draw(length=64, batch=1, dtype=dtype, device=device, seed=0)
    tensors = {n: x for n, x in inputs.items() if isinstance(x, torch.Tensor)}
    call = describe(mixer, tensors)
    chosen = choose(module.BACKENDS, call)
    reasons = [f"{b.name}: {'; '.join(b.refuses(call))}" for b in module.BACKENDS if b.refuses(call)]
    return mixer, device, str(dtype).removeprefix("torch."), chosen.name, "\n".join(reasons)
