"""The bench: its gate bites, its records survive. Command: pytest tests/test_bench.py

Times themselves are measured by `linattn bench` and recorded, never asserted here.
"""

import io
import math
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from bench_parts import H200, TINY, a_record
from rich.console import Console

from linattn.bench import BenchConfig, cpu, run_bench
from linattn.bench import plot as charts
from linattn.bench.cases import MIXERS, draw_inputs, parse_case, real_cases
from linattn.bench.gate import gate, parity_at_size, small
from linattn.bench.memory import kept_bytes, peak_bytes
from linattn.bench.ops import bench_op
from linattn.bench.peers import PEERS, Peer, Ready, peers_of
from linattn.bench.record import COLUMNS, append_records, commit, machine, read_records, results_path
from linattn.core.mixer import map_state


def quiet():
    return Console(file=io.StringIO(), width=160)


def text_of(console):
    return console.file.getvalue()


@pytest.mark.parametrize("op", MIXERS)
def test_the_gate_passes_what_is_right(op):
    assert gate(MIXERS[op], parse_case(op, TINY[op]), backend="torch", dtype=torch.float32, device="cpu") == "ok"


def planted(change):
    right = MIXERS["lightning"]
    return replace(right, forward=lambda inputs, **kw: change(*right.forward(inputs, **kw)))


BUGS = {
    "outputs a twentieth too large": (planted(lambda y, s: (y * 1.05, s)), "parity"),
    "a state that forgets": (
        planted(lambda y, s: (y, s if s is None else map_state(torch.zeros_like, s))),
        "a_split_is_the_whole",
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_the_gate_refuses_a_planted_bug(name, tmp_path):
    mixer, law = BUGS[name]
    console = quiet()
    options = {"cases": [TINY["lightning"]], "passes": ["fwd"], "impls": ["linattn"], "repeats": 1, "ceilings": H200}
    (record,) = bench_op("lightning", mixer=mixer, record=True, out=tmp_path, console=console, **options)
    assert law in record.gate.split()
    assert math.isnan(record.p50_ms) and math.isnan(record.best_ms) and record.runs == 0
    assert law in text_of(console)
    (kept,) = read_records(results_path("lightning", "cpu", tmp_path))
    assert kept.gate == record.gate and math.isnan(kept.p50_ms)


def test_the_gate_judges_a_small_version():
    case = small(parse_case("taylor", "b16-h16-t32768-f16-v64"))
    assert (case.heads, case.batch, case.feature_dim, case.value_dim) == (2, 2, 16, 64)
    assert small(parse_case("shortconv", "b16-t2048-d2048-w3")).channels == 64
    grouped = real_cases("lightning")[0]
    assert small(replace(grouped, k_heads=8, v_heads=8)).heads == 32


@pytest.mark.parametrize("op", MIXERS)
def test_the_gate_at_full_size(op):
    """What it does on a GPU, here: outputs and gradients of the first and last row and head against float64."""
    inputs = draw_inputs(op, parse_case(op, TINY[op]), torch.float32, "cpu")
    assert parity_at_size(MIXERS[op], inputs, backend="torch") == "ok"


def test_the_gate_at_full_size_sees_the_last_head():
    right = MIXERS["lightning"]

    def forward(inputs, **kw):
        y, state = right.forward(inputs, **kw)
        wrong = torch.ones(y.shape[2]) if y.dtype == torch.float64 else torch.tensor([1.0, 1.1])
        return y * wrong[:, None].to(y), state

    inputs = draw_inputs("lightning", parse_case("lightning", TINY["lightning"]), torch.float32, "cpu")
    verdict = parity_at_size(replace(right, forward=forward), inputs, backend="torch")
    assert verdict.split() == ["k-at-size", "q-at-size", "v-at-size", "y-at-size"]


def test_record_round_trip(tmp_path):
    path = tmp_path / "new" / "folders" / "taylor.csv"
    first = [a_record(), a_record(p50_ms=math.nan, gate="parity packed_is_alone", peak_bytes=0)]
    append_records(path, first)
    append_records(path, [a_record(impl="peer 1.0")])
    lines = path.read_text().splitlines()
    assert lines[0].startswith(
        "date,commit,gpu,driver,torch,triton,op,case,pass,impl,p20_ms,p50_ms,p80_ms,floor_ms,gate,command"
    )
    assert len(lines) == 4
    got = read_records(path)
    assert got[0] == first[0]
    assert math.isnan(got[1].p50_ms)
    assert replace(got[1], p50_ms=0) == replace(first[1], p50_ms=0)
    assert got[2].impl == "peer 1.0"
    assert path.stat().st_mode & 0o777 == 0o644


def test_record_append_is_all_or_nothing(tmp_path):
    path = tmp_path / "taylor.csv"
    append_records(path, [a_record()])
    before = path.read_bytes()
    full = mock.patch.object(os, "fsync", side_effect=OSError("No space left on device"))
    with full, pytest.raises(OSError, match="No space left"):
        append_records(path, [a_record()])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["taylor.csv"]


def test_record_of_an_older_file_has_defaults(tmp_path):
    path = tmp_path / "old.csv"
    append_records(path, [a_record()])
    width = COLUMNS.index("command") + 1
    path.write_text(",".join(COLUMNS[:width]) + "\n" + ",".join(["x"] * 10 + ["1.0"] * 4 + ["ok", "c"]) + "\n")
    (got,) = read_records(path)
    assert (got.p50_ms, got.runs, got.dtype) == (1.0, 0, "")
    append_records(path, [a_record()])
    assert len(read_records(path)) == 2


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "columns that no record has"),
        ("a,b\n1,2\n", r"columns that no record has: \['a', 'b'\]"),
        ("date,p50_ms\nx,fast\n", "line 2: p50_ms is 'fast', not a float"),
        ("date,p50_ms\nx,1.0\n", "line 2: .*missing"),
    ],
)
def test_record_file_that_is_something_else(tmp_path, text, says):
    path = tmp_path / "other.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        append_records(path, [a_record()])
    assert path.read_text() == text


def test_record_commit_marks_a_dirty_tree(tmp_path):
    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    assert commit(tmp_path) == "unknown"
    git("init")
    (tmp_path / "code.py").write_text("1\n")
    git("add", ".")
    git("commit", "-m", "one")
    clean = commit(tmp_path)
    assert len(clean) == 12 and int(clean, 16) >= 0
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "taylor.csv").write_text("results do not make a tree dirty\n")
    assert commit(tmp_path) == clean
    (tmp_path / "new.py").write_text("untracked\n")
    assert commit(tmp_path) == f"{clean}-dirty"
    (tmp_path / "new.py").unlink()
    (tmp_path / "code.py").write_text("2\n")
    assert commit(tmp_path) == f"{clean}-dirty"


def test_record_names_the_machine():
    with mock.patch("sys.argv", ["/somewhere/bin/linattn", "bench", "taylor", "--cases", "two words"]):
        here = machine("cpu")
    assert here.command == "linattn bench taylor --cases 'two words'"
    with mock.patch("sys.argv", ["/somewhere/linattn/cli/main.py", "bench", "taylor"]):
        assert machine("cpu").command == "linattn bench taylor"
    assert here.gpu.startswith("cpu (") and "thread" in here.gpu
    assert here.torch == torch.__version__
    assert machine("cpu", "0123456789ab").commit == "0123456789ab"
    assert results_path("taylor", "cpu", Path("r")) == Path("r/cpu/taylor.csv")


@pytest.mark.parametrize("op", MIXERS)
def test_an_op_is_measured(op, tmp_path):
    console = quiet()
    passes = ["fwd", "fwdbwd", "step"]
    options = {"record": True, "out": tmp_path, "ceilings": H200, "console": console}
    records = bench_op(op, cases=[TINY[op]], passes=passes, repeats=2, **options)
    ours = [r for r in records if r.impl == "linattn"]
    assert [r.pass_ for r in ours] == passes
    for r in ours:
        assert r.gate == "ok"
        assert 0 < r.best_ms <= r.p50_ms <= r.p80_ms
        assert r.floor_ms > 0 and r.runs == 2 and r.peak_bytes > 0
    rivals = {r.impl.split()[0]: r.gate for r in records if r.impl != "linattn"}
    quadratic = {"shortconv": {"conv1d": "ok"}, "softmax": {}}.get(op, {"quadratic": "ok"})
    attention = {} if op == "shortconv" else {"sdpa": "ok" if op == "softmax" else "another op"}
    assert rivals == quadratic | attention
    assert [r.impl for r in read_records(results_path(op, "cpu", tmp_path))] == [r.impl for r in records]
    assert "x floor" in text_of(console)
    unavailable = "without sdpa-flash, sdpa-cudnn, sdpa-efficient" in text_of(console)
    assert unavailable == (op != "shortconv")


def test_backward_of_a_peer_reaches_all_its_inputs():
    inputs = draw_inputs("taylor", parse_case("taylor", TINY["taylor"]), torch.float32, "cpu")
    built = [peer.build("taylor", inputs, True) for peer in peers_of("taylor")]
    ready = [peer for peer in built if isinstance(peer, Ready)]
    assert len(ready) >= 2  # the quadratic form and torch's attention run everywhere
    for peer in ready:
        grads = torch.autograd.grad(peer.run().sum(), peer.leaves)
        assert len(grads) == 3 and all(torch.isfinite(g).all() for g in grads)


def test_a_peer_that_is_not_here_says_why():
    inputs = draw_inputs("lightning", parse_case("lightning", TINY["lightning"]), torch.float32, "cpu")
    reasons = {p.name: p.build("lightning", inputs, False) for p in PEERS if p.name.startswith(("fla", "lightning"))}
    assert set(reasons.values()) == {"runs on CUDA only"}
    few = {n: x[:1, :1].expand(64, 100_000, -1, -1) if x.ndim == 4 else x for n, x in inputs.items()}
    quadratic = next(p for p in PEERS if p.name == "quadratic")
    assert "GiB, more than the 2 allowed" in quadratic.build("lightning", few, False)


def test_a_peer_that_is_wrong_or_fails_is_told_apart():
    def wrong(op, inputs, grad):
        return Ready(lambda: inputs["v"] * 2, (inputs["v"],))

    def failing(op, inputs, grad):
        def run():
            raise NotImplementedError

        return Ready(run, (inputs["v"],))

    peers = tuple(Peer(f.__name__, ("taylor",), True, f, lambda: "0.1") for f in (wrong, failing))
    with mock.patch("linattn.bench.peers.PEERS", peers):
        options = {"cases": [TINY["taylor"]], "passes": ["fwd"], "repeats": 1, "ceilings": H200, "console": quiet()}
        records = bench_op("taylor", **options)
    assert {r.impl: r.gate for r in records} == {
        "linattn": "ok",
        "wrong 0.1": "parity",
        "failing 0.1": "error: NotImplementedError",
    }
    assert math.isnan(records[-1].p50_ms)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown op 'tailor'; choose from \['lightning'"):
        bench_op("tailor")
    with pytest.raises(ValueError, match=r"unknown implementation 'flash'; choose from \['linattn', 'linattn:"):
        bench_op("taylor", impls=["flash"])
    with pytest.raises(ValueError, match=r"unknown pass 'bwd'; choose from"):
        bench_op("taylor", passes=["bwd"])
    with pytest.raises(ValueError, match=r"unknown mixer 'softmax'; choose from \['taylor'"):
        run_bench(BenchConfig(op="cpu", cases=("softmax",)), quiet())
    with pytest.raises(ValueError, match=r"unknown model 'gpt'; choose from \['based_1b'"):
        run_bench(BenchConfig(op="decode", cases=("gpt",)), quiet())
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device is cuda, but torch sees no GPU"):
            run_bench(BenchConfig(device="cuda"), quiet())


def test_memory_is_counted():
    x = torch.randn(1000, requires_grad=True)

    def call():
        a = x.exp()
        b = a + 1
        del a
        return (b * 2).sum()

    # a stays, because exp's backward needs it: a, b, b * 2 and the sum. Without gradients a is freed.
    assert peak_bytes(call, "cpu") == 12_004
    with torch.no_grad():
        assert peak_bytes(call, "cpu") == 8004
    assert peak_bytes(lambda: x.view(10, 100), "cpu") == 0
    assert kept_bytes(call, [x]) == 4000
    assert kept_bytes(lambda: x * x, [x]) == 0


@pytest.mark.parametrize("op", cpu.CPU_CASES)
def test_memory_is_linear(op):
    """A block of work whose size does not grow, and so much a token; scores of T^2 would put the constant below 0."""
    grown = cpu.memory_per_token(op, lengths=(1024, 2048, 4096), console=quiet())
    assert set(grown) == {"forward", "forward+backward", "kept"}
    for name, (constant, a_token) in grown.items():
        assert a_token > 0, name
        assert -0.1 * 4096 * a_token < constant < 2**25, name


def test_cost_per_token_is_measured(tmp_path):
    console = quiet()
    lengths = (256, 512)
    records = cpu.cost_per_token(
        "shortconv", lengths=lengths, runs=2, record=True, out=tmp_path, ceilings=H200, console=console
    )
    assert [(r.pass_, charts.length_in(r.case)) for r in records] == [
        (p, n) for p in ("fwd", "fwdbwd") for n in lengths
    ]
    assert read_records(tmp_path / "cpu" / "shortconv.csv")[0].best_ms == pytest.approx(records[0].best_ms, rel=1e-5)
    assert text_of(console).count("dearest / cheapest token") == 2


def test_flatness_and_growth():
    assert cpu.flatness([1.0, 2.0, 4.0], [10, 20, 40]) == 1
    assert cpu.flatness([1.0, 3.0], [10, 20]) == pytest.approx(1.5)
    assert math.isnan(cpu.flatness([math.nan, 3.0], [10, 20]))
    assert cpu.growth([120.0, 220.0], [10, 20]) == (20, 10)


def test_rivals_are_measured_where_they_must_lose():
    options = {"lengths": {"quadratic": (64,), "sdpa": (128,)}, "passes": ["fwd"], "runs": 1, "ceilings": H200}
    records = cpu.against_rivals("window", console=quiet(), **options)
    assert [(charts.length_in(r.case), r.impl.split()[0]) for r in records] == [
        (64, "linattn:torch"),
        (64, "quadratic"),
        (128, "linattn:torch"),
        (128, "sdpa"),
    ]


def test_decode_counts_what_a_step_reads():
    from linattn.models import JRTConfig, TransformerConfig, build_model

    tiny = {"d_model": 32, "d_hidden": 32, "vocab_size": 97}
    model = build_model(TransformerConfig(n_layers=2, n_heads=2, **tiny))
    assert cpu.step_weight_bytes(model) == sum(p.numel() * 4 for p in model.parameters())
    options = {"linear_layers": (0,), "window_layers": (1,), "n_layers": 2, "n_heads": 2}
    model = build_model(JRTConfig(**options, **tiny)).bfloat16()
    encoder = sum(p.numel() for n, p in model.named_parameters() if "_enc" in n)
    assert encoder > 0
    assert cpu.step_weight_bytes(model) == 2 * (sum(p.numel() for p in model.parameters()) - encoder)


def test_decode_is_measured(tmp_path):
    from linattn.models import BasedConfig

    options = {"linear_layers": (0,), "window_layers": (1,), "n_layers": 3, "n_heads": 2, "window": 5}
    small_model = BasedConfig(d_model=32, d_hidden=32, vocab_size=97, **options)
    console = quiet()
    with (
        mock.patch.dict(cpu.PUBLISHED, {"tiny": lambda: small_model}),
        mock.patch.object(cpu, "COPY_NUMBERS", 2**16),
    ):
        records = cpu.decode(["tiny"], steps=3, record=True, out=tmp_path, console=console)
    assert [(r.op, r.case, r.dtype, r.pass_) for r in records] == [
        ("decode", "tiny", "bfloat16", "step"),
        ("decode", "tiny", "float32", "step"),
    ]
    assert records[1].floor_ms > 0 and records[1].p50_ms > 0
    assert len(read_records(tmp_path / "cpu" / "decode.csv")) == 2
    assert "tiny bfloat16" in text_of(console)


def test_run_bench_tells_a_failed_gate(tmp_path):
    config = BenchConfig(op="lightning", cases=(TINY["lightning"],), passes=("fwd",), impls=("linattn",), device="cpu")
    with mock.patch("linattn.bench.ops.measure_ceilings", return_value=H200):
        assert run_bench(replace(config, record=True, out=tmp_path, repeats=1), quiet()) == 0
        assert (tmp_path / "cpu" / "lightning.csv").exists()
        console = quiet()
        with mock.patch.dict(MIXERS, {"lightning": BUGS["outputs a twentieth too large"][0]}):
            assert run_bench(config, console) == 1
    assert "gate failed, no time taken: lightning: parity" in text_of(console)
