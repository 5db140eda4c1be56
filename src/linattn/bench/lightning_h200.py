"""Lightning attention's record on one GPU: gate, then time beside the peers that are installed, then CSV.

    python -m linattn.bench.lightning_h200 --out benchmarks/results/h200/lightning.csv

Rows are issue-sized shapes of one op, not a general bench. Peers: fla's chunk_simple_gla, the authors' lightning_attn,
and torch's attention (FlashAttention 2 and cuDNN). A step is timed as CUDA-graph replays over pools larger than the L2.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from linattn.core.laws import Subject, broken_laws, parity, parity_from_state
from linattn.core.numerics import relative_error
from linattn.mixers.lightning import MIXER, LightningState, alibi_slopes, lightning_attention, lightning_step_
from linattn.mixers.lightning.cases import LightningCase

BYTES_A_MS = 4.30e9
"""What a device-to-device copy moved on an H200, bytes read plus written."""
SHAPES = ((4, 32, 2048), (4, 32, 8192), (4, 32, 32768), (1, 32, 131072), (1, 16, 524288))
FLAT = ((128, 32, 1024), (32, 32, 4096), (8, 32, 16384))
"""Beside those above, as many tokens at other lengths: ours alone, for the cost per token."""
STEPS = (1, 64, 1024)
COLUMNS = ("date", "commit", "gpu", "driver", "torch", "triton", "op", "case", "pass", "impl")
COLUMNS += ("p20_ms", "p50_ms", "p80_ms", "floor_ms", "gate", "command")
Pair = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    """Measure everything and append to ``--out``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/h200/lightning.csv"))
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--commit", default="worktree")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    new = not options.out.exists()
    with options.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        for row in rows(peers=not options.no_peers):
            writer.writerow(machine(options.commit) | row)
            file.flush()
            print(" ".join(str(row[n]) for n in ("case", "pass", "impl", "p50_ms", "floor_ms", "gate")), flush=True)


def machine(commit: str) -> dict[str, Any]:
    """The columns that say where and with what."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "op": "lightning",
        "command": "python -m linattn.bench.lightning_h200 " + " ".join(sys.argv[1:]),
    }


def rows(peers: bool) -> Any:
    """Every row of the record, as dictionaries of the columns that differ."""
    small = LightningCase(2, 130, 4, 128, 128, "the gate")
    subject = Subject(MIXER, small, "triton", torch.bfloat16, "cuda")
    broken = broken_laws(subject, {"parity": parity, "parity_from_state": parity_from_state})
    gate = "ok" if not broken else " ".join(broken)
    for shape in SHAPES:
        yield from attention_rows(*shape, gate, peers)
    for shape in FLAT:
        yield from attention_rows(*shape, gate, peers=False)
    for batch in STEPS:
        yield step_row(batch, 32, gate)


def attention_rows(B: int, H: int, T: int, gate: str, peers: bool) -> Any:
    """Forward, and forward with backward, of us and the peers on one shape."""
    q, k, v, do = (torch.randn(B, T, H, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    log_decay = -alibi_slopes(H).to("cuda", torch.float32)
    tokens = B * H * T

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lightning_attention(q, k, v, log_decay, return_state=False, backend="triton")[0]

    impls: dict[str, Pair] = {"linattn": ours}
    if peers:
        impls |= peer_implementations(T, log_decay)
    check = ""
    for name, function in impls.items():
        # A peer beside us is a second, independent implementation at full length.
        if name.startswith("fla "):
            error = relative_error(ours(q, k, v), function(q, k, v), (0, 2))
            check = "" if error < 2e-2 else f" differs from {name} by {error:.0e}"
    for name, function in impls.items():
        mine = name.startswith("linattn")
        for kind, traffic in (("fwd", 1024), ("fwdbwd", 2816)):
            row = {"case": f"b{B}-h{H}-t{T}-d128", "pass": kind, "impl": name}
            row["gate"] = gate + check if mine else "peer"
            row["floor_ms"] = f"{tokens * traffic / BYTES_A_MS:.4f}"
            run = forward_of(function, q, k, v) if kind == "fwd" else both_of(function, q, k, v, do)
            yield row | timed(run)
            if mine:
                # Replays of a CUDA graph leave out what the host needs to launch, which short texts do not hide.
                yield row | {"impl": "linattn in a CUDA graph"} | timed(captured(run))


def forward_of(function: Pair, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
    """The forward alone, without a graph of gradients."""

    def run() -> Tensor:
        with torch.no_grad():
            return function(q, k, v)

    return run


def both_of(function: Pair, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> Callable[[], Any]:
    """Forward and the three gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return lambda: torch.autograd.grad(function(*leaves), leaves, do)


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same work as one graph to replay."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def timed(run: Callable[[], Any]) -> dict[str, str]:
    """Median, p20 and p80 by events, with the L2 cache flushed between runs; a peer that fails says so."""
    import triton

    try:
        run()
        times: Any = triton.testing.do_bench(run, warmup=20, rep=80, quantiles=[0.2, 0.5, 0.8])
        p20, p50, p80 = times
    except Exception as error:  # noqa: BLE001  a peer that cannot run a shape is part of the record
        return dict.fromkeys(("p20_ms", "p50_ms", "p80_ms"), "") | {"gate": f"{type(error).__name__}"}
    finally:
        torch.cuda.empty_cache()
    return {"p20_ms": f"{p20:.4f}", "p50_ms": f"{p50:.4f}", "p80_ms": f"{p80:.4f}"}


def peer_implementations(T: int, log_decay: Tensor) -> dict[str, Pair]:
    """Those installed, where one call stays under about half a second."""
    impls: dict[str, Pair] = {}
    try:
        from fla.ops.simple_gla import chunk_simple_gla  # pyright: ignore[reportMissingImports]

        name = f"fla {importlib.metadata.version('fla-core')} chunk_simple_gla"
        impls[name] = lambda q, k, v: chunk_simple_gla(q, k, v, g_gamma=log_decay, scale=1.0)[0]
    except ImportError:
        pass
    try:
        from lightning_attn.ops import lightning_attn_func  # pyright: ignore[reportMissingImports]

        slopes = -log_decay[:, None, None]

        def authors(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return lightning_attn_func(*(x.transpose(1, 2).contiguous() for x in (q, k, v)), slopes).transpose(1, 2)

        if T <= 8192:
            impls[f"lightning_attn {importlib.metadata.version('lightning_attn')}"] = authors
    except ImportError:
        pass
    if T <= 8192:
        for name, backend in (("FA2", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
            impls[f"{name} (torch {torch.__version__})"] = attention_by(backend)
    return impls


def attention_by(backend: SDPBackend) -> Pair:
    """Causal softmax attention by one of torch's kernels."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return run


def step_row(batch: int, H: int, gate: str) -> dict[str, Any]:
    """One token a row, replayed over as many pools as exceed the 60 MB L2 several times."""
    size = batch * H * 128 * 128 * 4
    pools = [
        LightningState(torch.zeros(batch, H, device="cuda"), torch.randn(batch, H, 128, 128, device="cuda"))
        for _ in range(max(2, min(150, 600_000_000 // size)))
    ]
    q, k, v = (torch.randn(batch, H, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    log_decay = -alibi_slopes(H).to("cuda", torch.float32)
    slots = torch.randperm(batch, device="cuda").to(torch.int32)
    lightning_step_(q, k, v, log_decay, pools[0], slots, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for pool in pools:
            lightning_step_(q, k, v, log_decay, pool, slots, backend="triton")
    times = []
    for _ in range(25):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / len(pools))
    times = sorted(times[5:])
    named = {f"p{p}_ms": f"{times[len(times) * p // 100]:.5f}" for p in (20, 50, 80)}
    case = {"case": f"b{batch}-h{H}-d128", "pass": "step", "impl": "linattn", "gate": gate}
    return case | named | {"floor_ms": f"{2 * size / BYTES_A_MS:.5f}"}


if __name__ == "__main__":
    main()
