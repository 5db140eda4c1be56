"""The speed of whole models, run here on tiny ones: what a row means, what it leaves out, what survives.

pytest tests/test_bench_models.py
"""

import io
import math
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from rich.console import Console

from linattn.bench import BenchConfig, models, run_bench
from linattn.bench.floor import Ceilings
from linattn.bench.models import Effort, bench_models, train_lengths, training_step
from linattn.bench.record import read_records
from linattn.bench.subjects import (
    PREFILL_SUBJECTS,
    TRAIN_SUBJECTS,
    attention_like,
    implementation,
    model_flops,
    read_case,
    subject_config,
    taylor_by_fla,
    tokens_per_s,
    utilisation,
)
from linattn.mixers.prefix.layer import PrefixLayer
from linattn.mixers.taylor import layer as taylor_layer
from linattn.mixers.taylor import taylor_attention
from linattn.models import BasedConfig, JRTConfig, TransformerConfig, TransNormerConfig, transnormer_1b
from linattn.models.costs import model_costs

FAST = Ceilings(1e12, {torch.float32: 1e13, torch.bfloat16: 1e14})
HERE = {"device": "cpu", "ceilings": FAST}
SIZES = {"d_model": 32, "d_hidden": 32, "vocab_size": 97}
LAYERS = {"n_layers": 3, "n_heads": 2, "linear_layers": (0,), "window_layers": (1,), "window": 5, "feature_dim": 4}
BASED = BasedConfig(**SIZES, **LAYERS)
JRT = JRTConfig(**SIZES, **LAYERS, prefix_length=4)
TRANSNORMER = TransNormerConfig(**SIZES, n_layers=2, n_heads=2, head_dim=16)
TRANSFORMER = TransformerConfig(**SIZES, n_layers=2, n_heads=2)


def quiet():
    return Console(file=io.StringIO(), width=200)


@pytest.mark.parametrize("name", [*TRAIN_SUBJECTS, *PREFILL_SUBJECTS])
def test_every_subject_can_be_built_and_costed(name):
    config = subject_config(name)
    assert model_costs(config.decoder()).parameters > 3e8
    flops = [model_flops(config, length, "train") for length in (1024, 65536)]
    assert 0 < flops[0] <= flops[1]


def test_a_subject_that_is_not_known_is_refused():
    for name in ("gpt", "attention_like_based_360m"):
        with pytest.raises(ValueError, match=rf"unknown model '{name}'; choose from \['attention_like_trans"):
            subject_config(name)


@pytest.mark.parametrize("name", ["transnormer_385m", "transnormer_1b", "transnormer_3b"])
def test_attention_like_a_transnormer_has_its_parameters(name):
    theirs, ours = (model_costs(subject_config(n).decoder()).parameters for n in (name, f"attention_like_{name}"))
    assert ours == pytest.approx(theirs, rel=0.01)
    config = attention_like(transnormer_1b())
    assert config.d_model // config.n_heads == 128


def test_flops_of_training_are_six_a_parameter_and_three_times_the_mixers():
    """By hand, for one layer of attention: weights, and half of T keys and values on average."""
    config = TransformerConfig(d_model=32, n_layers=1, n_heads=2, d_hidden=64, vocab_size=96)
    weights = 4 * 32 * 32 + 3 * 32 * 64 + 96 * 32
    # Norms are a rounding; scores and values are 2 products of 32 numbers a key, two FLOPs each.
    got = model_flops(config, 1000, "train")
    assert got == pytest.approx(6 * weights + 3 * 4 * 32 * 500, rel=0.01)
    assert model_flops(config, 1000, "prefill") == pytest.approx(2 * (weights - 96 * 32) + 4 * 32 * 500, rel=0.01)
    flat = [model_flops(BASED, length, "train") for length in (64, 4096)]
    assert flat[0] == flat[1]


@pytest.mark.parametrize("config", [BASED, TRANSNORMER, TRANSFORMER], ids=lambda c: type(c).__name__)
def test_training_is_timed_at_constant_tokens(config, tmp_path):
    records = bench_models(
        "train", [("tiny", config)], lengths=(8, 16), tokens=32, record=True, out=tmp_path, console=quiet(), **HERE
    )
    assert [r.case for r in records] == ["tiny-b4-t8", "tiny-b2-t16"]
    for r in records:
        assert (r.op, r.pass_, r.gate, r.runs) == ("train", "train", "ok", 4)
        assert r.p50_ms > 0 and tokens_per_s(r) == pytest.approx(32 / r.p50_ms * 1e3)
        assert r.floor_ms == pytest.approx(32 * model_flops(config, read_case(r.case)[2], "train") / 1e14 * 1e3)
    assert len(read_records(tmp_path / "cpu" / "train.csv")) == 2


def test_an_update_learns():
    """It is a real one: the optimizer moves every weight, and the loss of a model that overfits 1 token falls."""
    config = replace(TRANSFORMER, vocab_size=1)
    step = training_step(config, "cpu", recompute=True, compiled=False)
    assert float(step(2, 8)) == pytest.approx(0.0, abs=1e-4)  # one possible token: nothing to lose
    step = training_step(TRANSFORMER, "cpu", recompute=True, compiled=False)
    with mock.patch("torch.randint", return_value=torch.arange(9)[None] % 97):
        losses = [float(step(1, 8)) for _ in range(30)]
    assert losses[-1] < losses[0] - 0.05


def test_recomputing_blocks_is_said_and_changes_no_loss():
    losses = []
    for recompute in (True, False):
        step = training_step(TRANSNORMER, "cpu", recompute=recompute, compiled=False)
        torch.manual_seed(1)
        losses.append([float(step(2, 8)) for _ in range(2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    options = {"lengths": (8,), "tokens": 8, "console": quiet(), **HERE}
    (record,) = bench_models("train", [("tiny", TRANSNORMER)], recompute=False, **options)
    assert record.case == "tiny-b1-t8-kept" and read_case(record.case) == ("tiny", 1, 8)


@pytest.mark.parametrize("config", [BASED, JRT, TRANSFORMER], ids=lambda c: type(c).__name__)
def test_prefill_reads_prompts_into_a_state(config, tmp_path):
    records = bench_models(
        "prefill", [("tiny", config)], lengths=(8, 32), tokens=32, record=True, out=tmp_path, console=quiet(), **HERE
    )
    assert [(r.case, r.gate) for r in records] == [("tiny-b4-t8", "ok"), ("tiny-b1-t32", "ok")]
    assert all(r.p50_ms > 0 for r in records)
    assert len(read_records(tmp_path / "cpu" / "prefill.csv")) == 2


def test_a_jrt_prompt_has_half_of_itself_as_prefix():
    seen = []
    whole = PrefixLayer._prefix

    def spy(layer, x, segment):
        got = whole(layer, x, segment)
        seen.append((x.shape[1], got["k_prefix"].shape[1], got["prefix_lengths"].tolist()))
        return got

    with mock.patch.object(PrefixLayer, "_prefix", spy):
        step = models.prefill_step(JRT, "cpu", True, False)
        step(2, 8)
        step(1, 20)
    assert seen == [(8, 4, [4, 4]), (20, 10, [10])]


def test_a_length_that_does_not_fit_is_a_row_and_the_next_model_is_measured(tmp_path):
    def step(config, *options):
        def run(batch, length):
            if config is BASED and length == 16:
                raise torch.OutOfMemoryError("no room")

        return run

    with mock.patch.object(models, "training_step", step):
        pairs, console = [("one", BASED), ("two", TRANSFORMER)], quiet()
        records = bench_models("train", pairs, lengths=(8, 16), tokens=16, console=console, **HERE)
    assert [r.gate for r in records] == ["ok", "out of memory", "ok", "ok"]
    assert math.isnan(records[1].p50_ms) and math.isnan(records[1].best_ms)
    assert "out of memory" in console.file.getvalue()


def test_a_row_that_would_take_too_long_is_not_run():
    effort = Effort(expected_s=1e-12)
    with mock.patch.object(models, "training_step", side_effect=AssertionError):
        (record,) = bench_models(
            "train", [("tiny", BASED)], lengths=(8,), tokens=8, effort=effort, console=quiet(), **HERE
        )
    assert record.gate == "not run: about 0 s a batch" and record.runs == 0


@pytest.mark.parametrize("seconds, runs, calls", [(1.0, 4, 6), (3.0, 2, 3), (7.0, 1, 2)])
def test_slow_batches_are_timed_less_often(seconds, runs, calls):
    count, clock = [], [0.0]

    def step():
        count.append(1)
        clock[0] += seconds

    with mock.patch.object(models.time, "perf_counter", side_effect=lambda: clock[0]):
        timing, _, verdict = models._time_row(step, "cpu", Effort())
    assert (timing.runs, len(count), verdict) == (runs, calls, "ok")
    assert timing.p50_ms == pytest.approx(seconds * 1e3)


def test_the_same_model_through_other_kernels():
    """Inside, Taylor layers call fla's function; outside, ours again, whatever was raised."""
    calls = []

    def fused_chunk_based(q, k, v, scale=None, use_norm=True):
        calls.append((tuple(q.shape), use_norm))
        return taylor_attention(q, k, v, normalize=use_norm)[0]

    based = SimpleNamespace(fused_chunk_based=fused_chunk_based)
    packages = {"fla": SimpleNamespace(ops=SimpleNamespace(based=based)), "fla.ops": SimpleNamespace(based=based)}
    ours = taylor_layer.taylor_attention
    with mock.patch.dict(sys.modules, {**packages, "fla.ops.based": based}):
        name = "tiny+fla-fused_chunk_based"
        (theirs,) = bench_models("train", [(name, BASED)], lengths=(8,), tokens=16, console=quiet(), **HERE)
        assert theirs.gate == "ok" and theirs.impl == "fla fused_chunk_based"
        assert set(calls) == {((2, 8, 2, 4), True)}
        q = torch.zeros(1, 4, 2, 4)
        with taylor_by_fla("fused_chunk_based"), pytest.raises(ValueError, match="takes no cu_seqlens"):
            taylor_layer.taylor_attention(q, q, q, cu_seqlens=torch.tensor([0, 4]))
    assert taylor_layer.taylor_attention is ours
    assert implementation("x", TRANSFORMER) == "sdpa-flash" and implementation("x", BASED) == "linattn"


def test_an_absent_peer_is_a_row_with_its_reason():
    with mock.patch.dict(sys.modules, {"fla": None, "fla.ops": None, "fla.ops.based": None}):
        name = "tiny+fla-parallel_based"
        (record,) = bench_models("train", [(name, BASED)], lengths=(8,), tokens=8, console=quiet(), **HERE)
    assert record.gate.startswith("error: ModuleNotFoundError")


def test_utilisation_is_of_the_data_sheet():
    options = {"lengths": (8,), "tokens": 8, "console": quiet(), **HERE}
    (record,) = bench_models("train", [("tiny", BASED)], **options)
    assert math.isnan(utilisation(record, BASED))
    fixed = replace(record, gpu="NVIDIA H200", p50_ms=1e3)
    assert utilisation(fixed, BASED) == pytest.approx(8 * model_flops(BASED, 8, "train") / 989e12)


def test_lengths_of_the_table():
    assert train_lengths("based_360m") == (2048, 16384)
    assert train_lengths("transnormer_3b")[0] == 1024
    assert train_lengths("transnormer_3b", (5,)) == (5,)


def test_run_bench_tells_an_error_from_what_does_not_fit():
    config = BenchConfig(op="train", cases=("based_360m",), device="cpu", lengths=(8,), recompute=False)
    for gate, code in (("ok", 0), ("out of memory", 0), ("error: RuntimeError", 1)):
        with mock.patch("linattn.bench.run.bench_models", return_value=[SimpleNamespace(gate=gate)]) as called:
            assert run_bench(config, quiet()) == code
    assert called.call_args.args == ("train", ("based_360m",))
    assert called.call_args.kwargs["recompute"] is False
