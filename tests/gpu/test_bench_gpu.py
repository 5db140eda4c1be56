"""The bench on a GPU, on small cases: every way of timing works, every peer has a verdict, models train and read.

Command: pytest -m gpu tests/gpu/test_bench_gpu.py
"""

import io
import math

import pytest
import torch
from rich.console import Console

from linattn.bench.floor import Ceilings
from linattn.bench.models import bench_models
from linattn.bench.ops import bench_table
from linattn.bench.record import read_records
from linattn.bench.setting import HOST, IN_GRAPH
from linattn.bench.table5 import PROMPT, RNN, bench_table5
from linattn.bench.tables import Row
from linattn.models import BasedConfig, JRTConfig, TransformerConfig, TransNormerConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),
]

H200 = Ceilings(4.30e12, {torch.float32: 50e12, torch.bfloat16: 673e12})
FEW = {"laws": ["parity"], "repeats": 3, "ceilings": H200}
SMALL = {
    "taylor": ("b2-h4-t512-f16-v64", "b2-h4-f16-v64"),
    "prefix": ("b2-h4-t512-f16-v64-m256", ""),
    "lightning": ("b2-h4-t512-d128", "b2-h4-d128"),
    "window": ("b2-h4-t512-d64-w129", "b2-h4-d64-w129"),
    "shortconv": ("b2-t512-d256-w3-silu-gate", "b2-d256-w3-silu-gate"),
}
SIZES = {"d_model": 256, "d_hidden": 256, "vocab_size": 1001}
LAYERS = {"n_layers": 3, "n_heads": 4, "linear_layers": (0,), "window_layers": (1,)}
BASED = BasedConfig(**SIZES, **LAYERS)
TRANSFORMER = TransformerConfig(**SIZES, n_layers=2, n_heads=4)
MODELS = {
    "train": (BASED, TransNormerConfig(**SIZES, n_layers=2, n_heads=2), TRANSFORMER),
    "prefill": (BASED, JRTConfig(**SIZES, **LAYERS), TRANSFORMER),
}


def quiet():
    return Console(file=io.StringIO(), width=200)


@pytest.mark.parametrize("op", SMALL)
def test_ours_is_timed_in_every_way_and_every_peer_has_a_verdict(op, tmp_path):
    case, step = SMALL[op]
    rows = [Row(case, host=True), *([Row(step, ("step",))] if step else [])]
    console = quiet()
    records = bench_table(op, rows, record=True, out=tmp_path, console=console, **FEW)
    said = console.file.getvalue()
    for pass_ in ("fwd", "fwdbwd"):
        ours = {r.impl: r for r in records if r.pass_ == pass_ and r.impl.startswith("linattn")}
        assert {r.gate for r in ours.values()} == {"ok"}, said
        assert all(r.p50_ms > 0 for r in ours.values()), said
        assert set(ours) == {"linattn", "linattn" + HOST, "linattn" + IN_GRAPH}
        assert ours["linattn"].peak_bytes > 0
    steps = [r for r in records if r.pass_ == "step"]
    assert [r.gate for r in steps] == ["ok"] * len(steps), said
    assert all(r.gate for r in records)
    (path,) = tmp_path.rglob(f"{op}.csv")
    assert len(read_records(path)) == len(records)


def test_attention_of_torch_runs_beside_ours():
    records = bench_table("lightning", [Row(SMALL["lightning"][0])], console=quiet(), **FEW)
    attention = [r for r in records if r.impl.startswith("sdpa-flash")]
    assert [r.pass_ for r in attention] == ["fwd", "fwdbwd"]
    assert all(r.gate == "another op" and r.p50_ms > 0 for r in attention)


def test_table5_on_a_small_point():
    records = bench_table5([(2, 1024)], console=quiet(), **FEW)
    timed = {r.impl for r in records if not math.isnan(r.p50_ms)}
    assert {PROMPT, RNN} < timed


@pytest.mark.parametrize("kind", MODELS)
def test_models_train_and_read(kind):
    for config in MODELS[kind]:
        options = {"lengths": (256, 512), "tokens": 1024, "ceilings": H200, "console": quiet()}
        records = bench_models(kind, [("small", config)], **options)
        assert [r.gate for r in records] == ["ok", "ok"], type(config)
        assert all(r.peak_bytes > 0 for r in records)


def test_blocks_compile():
    options = {"lengths": (256, 512), "tokens": 1024, "compiled": True, "ceilings": H200, "console": quiet()}
    records = bench_models("train", [("small", MODELS["train"][1])], **options)
    assert [r.gate for r in records] == ["ok", "ok"]
    assert all(r.case.endswith("-compiled") for r in records)


def test_a_model_that_does_not_fit_says_so():
    torch.cuda.set_per_process_memory_fraction(0.1)  # whoever shares the GPU keeps the rest
    try:
        (record,) = bench_models("train", [("small", BASED)], lengths=(2**26,), ceilings=H200, console=quiet())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert record.gate == "out of memory"
    assert math.isnan(record.p50_ms)
