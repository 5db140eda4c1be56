"""What is timed and against what: cases by name, floors counted by hand, clocks."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from bench_parts import H200, TINY

from linattn.bench import timing as clocks
from linattn.bench.cases import MIXERS, at_length, batch_of, case_name, draw_inputs, length_of, parse_case, real_cases
from linattn.bench.costs import costs
from linattn.bench.floor import Ceilings, copy_bytes_per_s, floor_ms
from linattn.bench.timing import Timing, rotate, sets_beyond_cache, summary, time_call, time_calls


@pytest.mark.parametrize("op", MIXERS)
def test_case_names_are_read_back(op):
    published = [c for c in real_cases(op) if not any(w in c.name for w in ("decay", "-x"))]
    assert published
    for case in published:
        read = parse_case(op, case.name)
        assert read.name == case.name
        assert (batch_of(read), length_of(read)) == (batch_of(case), length_of(case))
        for pass_ in ("fwd", "fwdbwd", "step"):
            assert costs(read, pass_, torch.bfloat16) == costs(case, pass_, torch.bfloat16)


def test_case_of_a_step_has_no_length():
    step = parse_case("lightning", "b128-h32-d128")
    assert length_of(step) == 1
    assert case_name(step, "step") == "b128-h32-d128"
    assert case_name(parse_case("softmax", "b2-h2-t4096-d64"), "step") == "b2-h2-t4096-d64"
    assert case_name(parse_case("shortconv", "b8-d2048-w3-silu-gate"), "step") == "b8-d2048-w3-silu-gate"


@pytest.mark.parametrize(
    "op, name, says",
    [
        (
            "tailor",
            "b1-h2-t96-f4-v8",
            r"unknown op 'tailor'; choose from \['lightning', 'prefix', .*'taylor', 'window'\]",
        ),
        ("taylor", "b1-h2-t96-f4", r"lacks \['v'\]; spell it like b16-h16-t2048-f16-v64"),
        ("taylor", "b1-h2-t96-f4-v8-d3", r"cannot read 'd3'"),
        ("taylor", "b1-b2-h2-f4-v8", r"cannot read 'b2'"),
        ("window", "b0-h2-t96-d8-w9", r"'b0' in the case .* at least 1"),
        ("lightning", "four heads", r"cannot read 'four heads'"),
        ("lightning", "", r"cannot read ''"),
    ],
)
def test_case_that_cannot_be_read(op, name, says):
    with pytest.raises(ValueError, match=says):
        parse_case(op, name)


@pytest.mark.parametrize("op", MIXERS)
def test_case_inputs_have_full_size(op):
    case = at_length(parse_case(op, TINY[op]), 50)
    inputs = draw_inputs(op, replace(case, batch=3) if op != "prefix" else case, torch.bfloat16, "cpu")
    first = inputs["x" if op == "shortconv" else "q"]
    assert first.shape[:2] == (1 if op == "prefix" else 3, 50)
    assert first.dtype == torch.bfloat16
    y, _ = MIXERS[op].forward(inputs)
    assert torch.isfinite(y).all()
    assert 0.9 < float(first.float().std()) < 1.1


def test_case_at_another_length_keeps_its_share_of_prefix():
    assert at_length(parse_case("prefix", "b1-h2-t1024-f16-v64-m512"), 4096).name == "b1-h2-t4096-f16-v64-m2048"


@pytest.mark.parametrize(
    "op, case, pass_, milliseconds",
    [
        ("lightning", "b4-h32-t2048-d128", "fwd", 0.062),
        ("lightning", "b4-h32-t8192-d128", "fwd", 0.250),
        ("lightning", "b4-h32-t8192-d128", "fwdbwd", 0.687),
        ("lightning", "b1-h16-t524288-d128", "fwdbwd", 5.494),
        ("taylor", "b16-h16-t2048-f16-v64", "fwd", 0.039),
        ("taylor", "b16-h16-t8192-f16-v64", "fwd", 0.156),
        ("taylor", "b16-h16-t32768-f16-v64", "fwd", 0.625),
        ("taylor", "b16-h16-t8192-f16-v112", "fwd", 0.267),
        ("prefix", "b16-h16-t32768-f16-v64-m16384", "fwd", 0.780),
        ("taylor", "b32-h16-t2048-f16-v64", "fwdbwd", 0.269),
        ("lightning", "b1024-h32-d128", "step", 1.007),
    ],
)
def test_floors_are_the_known_ones(op, case, pass_, milliseconds):
    got = floor_ms(costs(parse_case(op, case), pass_, torch.bfloat16), H200, torch.bfloat16)
    assert round(got, 3) == milliseconds


def test_floor_counts_bytes_by_hand():
    """A token and head, bf16: what is read and written once."""
    one = parse_case("lightning", "b1-h1-t1-d128")
    assert costs(one, "fwd", torch.bfloat16).bytes == 1024
    assert costs(one, "fwdbwd", torch.bfloat16).bytes == 2816
    assert costs(one, "fwd", torch.bfloat16).flops == 98_304
    assert costs(one, "step", torch.bfloat16).bytes == 1024 + 2 * 4 * 128 * 128
    one = parse_case("taylor", "b1-h1-t1-f16-v64")
    assert costs(one, "fwd", torch.bfloat16).bytes == 320
    assert costs(one, "fwdbwd", torch.bfloat16).bytes == 832
    assert costs(one, "fwd", torch.bfloat16).flops == 4 * 153 * 65 + 2 * 64 * (16 + 65)
    assert costs(parse_case("taylor", "b1-h1-t1-f16-v64-sum"), "fwd", torch.bfloat16).flops < 50_148
    one = parse_case("shortconv", "b1-t1-d1-w3-silu-gate")
    assert [costs(one, p, torch.float32).bytes for p in ("fwd", "fwdbwd", "step")] == [12, 32, 28]


def test_floor_of_attention_grows_with_length_and_of_a_window_does_not():
    def flops(op, name):
        return costs(parse_case(op, name), "fwd", torch.float32).flops

    assert flops("softmax", "b1-h1-t2000-d64") == 4 * flops("softmax", "b1-h1-t1000-d64")
    assert flops("window", "b1-h1-t2000-d64-w9") == 2 * flops("window", "b1-h1-t1000-d64-w9")
    assert flops("softmax", "b1-h1-t1000-d64") == 1000 * 1000 * 128


def test_floor_takes_the_larger_of_bytes_and_flops():
    slow = Ceilings(1e3, {torch.float32: 1e6})
    assert (
        floor_ms(costs(parse_case("lightning", "b1-h1-t1-d128"), "fwd", torch.bfloat16), slow, torch.bfloat16) == 1024
    )
    hot = Ceilings(1e15, {torch.float32: 98_304.0})
    assert floor_ms(costs(parse_case("lightning", "b1-h1-t1-d128"), "fwd", torch.float32), hot, torch.float32) == 1000
    assert H200.rate(torch.float16) == 673e12


@pytest.mark.slow
def test_floor_bandwidth_is_measured():
    assert 1e9 < copy_bytes_per_s("cpu") < 1e13


def test_timing_interleaves():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = time_calls(calls, repeats=3, warmup=1)
    assert "".join(order) == "abc" * 4
    assert [t.runs for t in times.values()] == [3, 3, 3]


def test_timing_reads_the_clock():
    ticks = [0.0, 10.0, 10.003, 20.0, 20.001, 30.0, 30.002]
    with mock.patch.object(clocks.time, "perf_counter", side_effect=ticks):
        got = time_call(lambda: None, repeats=3, warmup=0)
    assert got.best_ms == pytest.approx(1.0)
    assert got.p50_ms == pytest.approx(2.0)
    assert (got.p20_ms, got.p80_ms) == (pytest.approx(1.4), pytest.approx(2.6))
    assert got.over(2).p50_ms == pytest.approx(1.0)


def test_timing_stops_at_its_budget_after_three_rounds():
    assert time_call(lambda: None, repeats=50, budget_s=0.0).runs == 3
    assert time_call(lambda: None, repeats=2, budget_s=0.0).runs == 2
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        time_call(lambda: None, repeats=0)


def test_timing_summary_and_rotation():
    assert summary([5.0]) == Timing(5.0, 5.0, 5.0, 5.0, 1)
    turns = rotate([lambda i=i: i for i in range(3)])
    assert sorted(turns() for _ in range(3)) == [0, 1, 2]
    assert sets_beyond_cache(1, "cpu") == 1
