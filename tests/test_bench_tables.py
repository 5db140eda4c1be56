"""A GPU's tables, run here on tiny cases: every row has its verdict, nothing crashes, targets are shown.

pytest tests/test_bench_tables.py
"""

import io
import itertools
import math
import warnings
from dataclasses import replace
from unittest import mock

import pytest
import torch
from bench_parts import H200, TINY
from rich.console import Console

from linattn.bench import BenchConfig, ops, run_bench, table5
from linattn.bench.calls import entries_of
from linattn.bench.cases import MIXERS, draw_inputs, length_of, parse_case
from linattn.bench.costs import attention_flops, costs
from linattn.bench.floor import floor_ms
from linattn.bench.ops import bench_table, new_record
from linattn.bench.peers import PEERS, RIVALS, Peer, Ready, flash_call, flash_window, flex_call, peers_of
from linattn.bench.record import machine, read_records
from linattn.bench.setting import HOST, Setting, in_words
from linattn.bench.table5 import PROMPT, RNN, base_case, bench_table5
from linattn.bench.tables import TABLES, Row, Target, table_rows, target_of
from linattn.bench.timing import NOT_TIMED, Timing, sets_beyond_cache, time_host
from linattn.core.dispatch import BackendError
from linattn.mixers.taylor.cases import TaylorCase

HERE = {"device": "cpu", "dtype": torch.float32, "ceilings": H200, "repeats": 2}


def quiet():
    return Console(file=io.StringIO(), width=200)


@pytest.mark.parametrize("op", TABLES)
def test_every_row_of_every_table_can_be_read_and_has_a_floor(op):
    rows = TABLES[op]
    assert len({row.case for row in rows}) == len(rows)
    for row in rows:
        case = parse_case(op, row.case)
        for pass_ in row.passes:
            assert floor_ms(costs(case, pass_, torch.bfloat16), H200, torch.bfloat16) > 0
        assert set(row.targets) <= set(row.passes)


def test_targets_lie_above_the_floors():
    """A target below the floor is a slip of the pen."""
    for op, rows in TABLES.items():
        for row in rows:
            for pass_, target in row.targets.items():
                least = floor_ms(costs(parse_case(op, row.case), pass_, torch.bfloat16), H200, torch.bfloat16)
                assert least < target.limit_ms(least), (op, row.case, pass_)


def test_flat_rows_hold_the_tokens_and_heads_constant():
    for op, tokens in (("lightning", 2**20), ("taylor", 2**19)):
        flat = [parse_case(op, row.case) for row in table_rows(op, sections=["flat"])]
        assert {case.batch * case.length for case in flat} == {tokens}
        assert {case.heads for case in flat} == {16}
        assert (length_of(flat[0]), length_of(flat[-1])) == (1024, tokens)


def test_targets_are_milliseconds_or_times_the_floor():
    assert Target(0.4).limit_ms(0.1) == 0.4
    assert Target(floors=1.25).limit_ms(0.1) == pytest.approx(0.125)
    assert (str(Target(0.4)), str(Target(floors=1.25))) == ("0.4 ms", "1.25x the floor")
    assert target_of("lightning", "b4-h32-t8192-d128", "fwdbwd") == Target(1.4)
    assert target_of("lightning", "b64-h32-d128", "step") == Target(floors=1.25)
    assert target_of("window", "b16-h16-t2048-d64-w129", "fwd") is None


def test_rows_are_chosen_by_case_and_section():
    assert [r.case for r in table_rows("taylor", ["b2-h16-t16384-f16-v64"])] == ["b2-h16-t16384-f16-v64"]
    assert table_rows("taylor", ["b1-h2-t96-f4-v8"]) == [Row("b1-h2-t96-f4-v8")]
    assert {r.section for r in table_rows("lightning", sections=["step", "flat"])} == {"step", "flat"}
    with pytest.raises(ValueError, match=r"prefix: no section 'flat'; choose from \['main'\]"):
        table_rows("prefix", sections=["flat"])


@pytest.mark.parametrize("op", TABLES)
def test_a_table_gives_every_peer_a_line_with_its_reason(op, tmp_path):
    console = quiet()
    rows = [Row(TINY[op], ("fwd", "step"), {"fwd": Target(0.5)}, host=True)]
    records = bench_table(op, rows, record=True, out=tmp_path, console=console, **HERE)
    fwd = {r.impl: r for r in records if r.pass_ == "fwd"}
    assert fwd["linattn"].gate == "ok" and fwd["linattn"].p50_ms > 0
    assert fwd["linattn" + HOST].p50_ms > 0
    # Kernels for GPUs are absent here, each with a line of its own; torch's convolution runs anywhere.
    here = {"conv1d"} if op == "shortconv" else set()
    for peer in [p for p in peers_of(op) if p.name in RIVALS and p.name not in here]:
        assert fwd[peer.name].gate == "runs on CUDA only"
        assert math.isnan(fwd[peer.name].p50_ms)
    assert next(r.impl for r in records if r.pass_ == "step") == "linattn"
    assert len(read_records(tmp_path / "cpu" / f"{op}.csv")) == len(records)
    assert "target 0.500 ms" in console.file.getvalue()


@pytest.mark.parametrize("op", TABLES)
def test_decoding_in_other_ways_is_a_line_each_and_keeps_the_law(op):
    records = bench_table(op, [Row(TINY[op], ("step",))], console=quiet(), **HERE)
    others = ["linattn, deferred fold", "linattn, deferred fold and 16-bit copy"] if op == "taylor" else []
    assert [r.impl for r in records] == ["linattn", *others]
    assert [r.gate for r in records[:2]] == ["ok"] * len(records[:2])
    # A copy of 8 bits of mantissa is no fp32 State, and the law says so at fp32.
    assert [r.gate for r in records[2:]] == ["decode_is_the_fold"] * len(records[2:])


def test_the_16_bit_copy_keeps_the_law_of_16_bit_inputs():
    from linattn.bench.gate import gate
    from linattn.bench.variants import variants_of

    case = parse_case("taylor", "b1-h2-t96-f16-v8")
    options = {"backend": None, "dtype": torch.bfloat16, "device": "cpu", "laws": ["decode_is_the_fold"]}
    for name, variant in variants_of("taylor", torch.bfloat16).items():
        assert gate(variant.mixer, case, **options) == "ok", name


def test_the_steps_of_a_pool_that_folds_every_so_often_are_timed_as_a_whole():
    """So that the dear step is in the mean, whatever the median: as many calls as a period, times the pools."""
    setting = Setting("taylor", MIXERS["taylor"], "cpu", torch.float32, impls=("linattn",), absent=True)
    case = parse_case("taylor", TINY["taylor"])
    with (
        mock.patch.object(Setting, "cuda", True),
        mock.patch("linattn.bench.calls.judge", return_value="ok"),
        mock.patch("linattn.bench.calls.gate", return_value="ok"),
        mock.patch("linattn.bench.calls.graph_replay", return_value=print),
    ):
        entries, _ = entries_of(setting, case, "step")
    assert [e.parts for e in entries] == [1, 8, 8]


def test_a_backend_that_was_passed_over_has_a_line_with_its_reason():
    """Else torch's time would stand there as the kernel's."""
    right = MIXERS["taylor"]

    def forward(inputs, backend=None, **options):
        if backend == "kernel":
            raise BackendError("taylor: no backend can run this call\n  kernel: needs a longer text")
        return right.forward(inputs, **options)

    mixer = replace(right, forward=forward, backends=("kernel", "torch"))
    setting = Setting("taylor", mixer, "cpu", torch.float32, impls=("linattn",), absent=True)
    with mock.patch.object(Setting, "cuda", True), mock.patch("linattn.bench.calls.judge", return_value="ok"):
        entries, missing = entries_of(setting, parse_case("taylor", TINY["taylor"]), "fwd")
    assert [e.impl for e in entries] == ["linattn"]
    assert missing == [("linattn:kernel", "needs a longer text")]


def test_a_table_ends_where_the_gpu_no_longer_answers():
    rows = [Row(TINY["taylor"], ("fwd",)), Row("b1-h2-t64-f4-v8", ("fwd",))]
    console = quiet()
    with mock.patch.object(ops, "answers", return_value=False):
        records = bench_table("taylor", rows, peers=False, console=console, **HERE)
    assert {r.case for r in records} == {TINY["taylor"]}
    assert "no longer answers" in console.file.getvalue()


def test_rows_that_are_compared_are_measured_in_turn_and_the_median_lap_counts():
    """So that what the machine did before one row is not read as that row's cost."""
    rows = [Row("b2-h2-t32-d8", section="flat"), Row(TINY["lightning"], ("fwd",)), Row("b1-h2-t64-d8", section="flat")]
    asked, times = [], {}

    def measured(calls, **options):
        asked.append(options["repeats"])
        ms = times.setdefault(len(asked), [9.0, 1.0, 3.0, 2.0, 5.0, 4.0, 8.0][len(asked) - 1])
        return dict.fromkeys(calls, Timing(ms, ms, ms, ms, options["repeats"]))

    options = {**HERE, "repeats": 30}
    with mock.patch.object(ops, "time_calls", measured):
        records = bench_table("lightning", rows, passes=["fwd"], peers=False, console=quiet(), **options)
    assert asked == [30, *[10] * 6]
    # Flat rows come last: the first in laps 2, 4, 6, the other in laps 3, 5, 7.
    assert [(r.case, r.best_ms, r.p50_ms, r.runs) for r in records] == [
        (TINY["lightning"], 9.0, 9.0, 30),
        ("b2-h2-t32-d8", 1.0, 2.0, 30),
        ("b1-h2-t64-d8", 3.0, 5.0, 30),
    ]


def test_a_row_that_fails_in_one_lap_has_no_time():
    rows = [Row("b2-h2-t32-d8", ("fwd",), section="flat")]
    right, calls = MIXERS["lightning"], []

    def forward(inputs, **options):
        calls.append(1)
        if len(calls) > 4:
            raise torch.OutOfMemoryError("full")
        return right.forward(inputs, **options)

    options = {"mixer": replace(right, forward=forward), "peers": False, "console": quiet()}
    with mock.patch("linattn.bench.calls.gate", return_value="ok"):
        (record,) = bench_table("lightning", rows, **options, **{**HERE, "repeats": 3})
    assert math.isnan(record.p50_ms) and record.gate == "out of memory"


def test_a_backend_that_refuses_is_no_failed_gate_unless_no_other_runs():
    def record(impl, gate):
        return new_record(machine("cpu"), "taylor", "b1-h2-t96-f4-v8", "fwd", impl, NOT_TIMED, verdict=gate)

    for records, status in (
        ([record("linattn", "ok"), record("linattn:cuda", "refused: needs value dims up to 128")], 0),
        ([record("linattn", "refused")], 1),
        ([record("linattn:cuda", "refused: needs value dims up to 128")], 1),
        ([record("linattn:cuda", "parity")], 1),
    ):
        with mock.patch("linattn.bench.run.bench_op", return_value=records):
            assert run_bench(BenchConfig("taylor", device="cpu"), quiet()) == status


def test_what_was_measured_of_compared_rows_is_kept_where_the_gpu_no_longer_answers():
    rows = [Row(case, ("fwd",), section="flat") for case in (TINY["taylor"], "b1-h2-t64-f4-v8", "b1-h2-t32-f4-v8")]
    console = quiet()
    with mock.patch.object(ops, "answers", side_effect=[True, True, True, True, False]):
        records = bench_table("taylor", rows, peers=False, console=console, **{**HERE, "repeats": 3})
    assert sorted((r.case, r.runs) for r in records) == [
        ("b1-h2-t32-f4-v8", 1),
        ("b1-h2-t64-f4-v8", 2),
        (TINY["taylor"], 2),
    ]


def test_a_table_without_peers_has_ours_alone():
    rows = [Row(TINY["taylor"], ("fwd",))]
    assert {r.impl for r in bench_table("taylor", rows, peers=False, console=quiet(), **HERE)} == {"linattn"}
    rows = [Row(TINY["taylor"], ("fwd",), peers=False)]
    assert {r.impl for r in bench_table("taylor", rows, console=quiet(), **HERE)} == {"linattn"}


def test_a_table_runs_only_the_passes_asked_for():
    rows = [Row(TINY["taylor"], ("fwd", "fwdbwd", "step"))]
    records = bench_table("taylor", rows, passes=["step"], peers=False, console=quiet(), **HERE)
    assert {r.pass_ for r in records} == {"step"}


def test_one_date_for_all_rows_of_a_table():
    rows = [Row(TINY["taylor"]), Row("b1-h2-t64-f4-v8")]
    records = bench_table("taylor", rows, peers=False, commit="0123456789ab", console=quiet(), **HERE)
    assert len({r.date for r in records}) == 1
    assert {r.commit for r in records} == {"0123456789ab"}


def test_the_gate_of_a_table_asks_each_question_once():
    rows = [Row("b1-h2-t96-d8"), Row("b3-h2-t64-d8")]
    with mock.patch("linattn.bench.calls.gate", return_value="ok") as asked:
        bench_table("lightning", rows, peers=False, console=quiet(), **HERE)
    assert asked.call_count == 1


def test_a_broken_law_leaves_ours_untimed_and_says_why():
    right = MIXERS["lightning"]
    wrong = replace(right, forward=lambda inputs, **kw: (lambda y, s: (y * 1.05, s))(*right.forward(inputs, **kw)))
    console = quiet()
    options = {"mixer": wrong, "laws": ["parity"], "peers": False, "console": console}
    (record,) = bench_table("lightning", [Row(TINY["lightning"], ("fwd",))], **options, **HERE)
    assert record.gate == "parity" and math.isnan(record.p50_ms)
    assert "lightning b2-h2-t130-d8, parity: " in console.file.getvalue()
    with pytest.raises(ValueError, match=r"unknown law 'speed'; choose from \['parity'"):
        bench_table("lightning", [Row(TINY["lightning"])], **{**options, "laws": ["speed"]}, **HERE)


def test_what_fails_in_a_table_is_a_line_and_the_next_row_is_measured():
    right = MIXERS["taylor"]

    def forward(inputs, **options):
        if inputs["q"].shape[1] == 77:
            raise RuntimeError("an illegal memory access\nand its trace")
        return right.forward(inputs, **options)

    rows = [Row("b1-h2-t77-f4-v8", ("fwd",)), Row("b1-h2-t96-f4-v8", ("fwd",))]
    mixer = replace(right, forward=forward)
    options = {"mixer": mixer, "laws": ["parity"], "peers": False, "console": quiet()}
    first, second = bench_table("taylor", rows, **options, **HERE)
    assert first.gate == "error: RuntimeError: an illegal memory access" and math.isnan(first.p50_ms)
    assert second.gate == "ok" and second.p50_ms > 0


def test_an_error_in_words():
    assert in_words(torch.OutOfMemoryError("a page of numbers")) == "out of memory"
    assert in_words(NotImplementedError()) == "error: NotImplementedError"
    assert in_words(ValueError("x" * 500)) == "error: ValueError: " + "x" * 120


def test_a_slow_call_is_timed_once():
    setting = Setting("taylor", MIXERS["taylor"], "cpu", torch.float32, impls=("linattn",), slow_s=0.0)
    entries, _ = entries_of(setting, parse_case("taylor", TINY["taylor"]), "fwd")
    (row,) = ops.measure_entries(entries, setting, repeats=5, budget_s=1.0)
    assert row.timing.runs == 1 and row.timing.p20_ms == row.timing.p80_ms > 0


def test_a_quadratic_peer_that_would_be_slow_is_not_run():
    """By its FLOPs, before it is built."""

    def build(op, inputs, grad):
        raise AssertionError("it was built")

    slow = Peer("slow", ("taylor",), False, build, lambda: "", quadratic=True)
    setting = Setting("taylor", MIXERS["taylor"], "cpu", torch.float32, impls=("linattn", "slow"), slow_s=1e-12)
    with (
        mock.patch("linattn.bench.peers.PEERS", (slow,)),
        mock.patch.object(Setting, "cuda", True),
        mock.patch("linattn.bench.calls.judge", return_value="not judged"),
    ):
        _, missing = entries_of(setting, parse_case("taylor", TINY["taylor"]), "fwd")
    assert missing == [("slow", "not run: at least 0.0 s a call, more than 1e-12")]


def test_attention_flops_are_those_of_the_known_case():
    """4 x 32 x 32,768 x 128 took FlashAttention-2 102.5 ms on an H200: 343 TFLOP/s."""
    inputs = {n: torch.empty(4, 32768, 32, 128, device="meta") for n in "qv"}
    assert attention_flops(inputs) / 0.1025 == pytest.approx(343e12, rel=0.01)


def test_the_rivals_are_public_kernels():
    assert set(RIVALS) < {p.name for p in PEERS}
    for op in TABLES:
        assert any(p.name in RIVALS for p in peers_of(op))


@pytest.mark.parametrize("case", ["b2-t50-d8-w3-silu-gate", "b2-t50-d8-w4-bias", "b1-t5-d8-w1"])
def test_torch_convolution_is_the_op(case):
    conv = next(p for p in PEERS if p.name == "conv1d")
    inputs = draw_inputs("shortconv", parse_case("shortconv", case), torch.float64, "cpu")
    ready = conv.build("shortconv", inputs, True)
    assert isinstance(ready, Ready)
    want, _ = MIXERS["shortconv"].reference(inputs)
    torch.testing.assert_close(ready.run(), want)
    assert len(torch.autograd.grad(ready.run().sum(), ready.leaves)) == len(ready.leaves)


def test_flash_attention_has_the_ops_window():
    """By a function that takes windows and documents as FlashAttention does: so many keys before, so many behind."""

    def attend(q, k, v, cu_q, cu_k, most_q, most_k, *, window_size):
        assert cu_q.tolist() == cu_k.tolist() == [0, 96, 192] and (most_q, most_k) == (96, 96)
        ys = []
        for begin, end in itertools.pairwise(cu_q.tolist()):
            behind = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
            seen = (behind <= window_size[0]) & (behind >= -window_size[1])
            heads = (x[begin:end].transpose(0, 1) for x in (q, k, v))
            ys.append(torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=seen).transpose(0, 1))
        return torch.cat(ys)

    case = parse_case("window", "b2-h2-t96-d8-w9")
    inputs = draw_inputs("window", case, torch.float32, "cpu")
    ready = flash_call(inputs, True, attend)
    want, _ = MIXERS["window"].forward(inputs)
    torch.testing.assert_close(ready.run(), want)
    assert [x.grad_fn is None and x.requires_grad for x in ready.leaves] == [True] * 3
    assert flash_call({**inputs, "k": inputs["k"][:, :, :1]}, False, attend).startswith("needs as many heads")
    assert flash_window("window", inputs, False) == "runs on CUDA only"


@pytest.mark.parametrize("case", ["b2-h2-t70-d16-w9", "b1-h4-t50-d16-w1-kv2"])
def test_flex_attention_has_the_ops_window(case):
    inputs = draw_inputs("window", parse_case("window", case), torch.float32, "cpu")
    ready = flex_call(inputs, False, lambda function: function)
    want, _ = MIXERS["window"].reference({n: x.double() if n in "qkv" else x for n, x in inputs.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # uncompiled, it says that it is slow
        got = ready.run()
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_the_hosts_time_is_that_of_one_call():
    ticks = iter([0.0, 1.0, 10.0, 10.4, 20.0, 20.8])
    with mock.patch("linattn.bench.timing.time.perf_counter", side_effect=lambda: next(ticks)):
        got = time_host(lambda: None, calls=4, repeats=2)
    assert got.p50_ms == pytest.approx(150.0)
    assert got.runs == 2


def test_pools_may_be_many():
    l2 = mock.Mock(L2_cache_size=60 * 2**20)
    with mock.patch("torch.cuda.get_device_properties", return_value=l2):
        assert sets_beyond_cache(700_000, "cuda") == 64
        assert sets_beyond_cache(700_000, "cuda", most=512) == 180


def test_table5_measures_three_ways_to_read_in_one_run(tmp_path):
    base = TaylorCase(1, 1, 2, 4, 8, "tiny")
    console = quiet()
    options = {"device": "cpu", "dtype": torch.float32, "ceilings": H200, "record": True, "out": tmp_path}
    records = bench_table5([(1, 64), (2, 32)], base=base, console=console, **options)
    impls = [r.impl for r in records if r.case == "b1-h2-t64-f4-v8"]
    assert impls == [PROMPT, RNN, table5.ONCE, "sdpa-flash", "sdpa-cudnn"]
    ours = [r for r in records if r.impl.startswith("linattn")]
    assert all(r.gate == "ok" and r.p50_ms > 0 and r.pass_ == "fwd" for r in ours)
    prompt, rnn, once = (r.floor_ms for r in ours[:3])
    assert prompt == pytest.approx(2 * once) and once < rnn < prompt
    assert len(read_records(tmp_path / "cpu" / "table5.csv")) == len(records) == 10
    assert base_case(16, 32768).name == "b16-h16-t32768-f16-v64"


def test_the_bench_of_table5_reads_its_points():
    with mock.patch("linattn.bench.run.bench_table5", return_value=[]) as called:
        assert run_bench(BenchConfig(op="table5", cases=("b2-t64",), device="cpu"), quiet()) == 0
    assert called.call_args.args[0] == [(2, 64)]
    with pytest.raises(ValueError, match="cannot read the case 'b2'; spell it like b16-t32768"):
        run_bench(BenchConfig(op="table5", cases=("b2",), device="cpu"), quiet())


def test_a_gpu_without_cases_measures_the_table():
    config = BenchConfig(op="window", sections=("main",), peers=False, commit="0123456789ab", laws=("parity",))
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("linattn.bench.run.bench_table", return_value=[]) as called,
    ):
        assert run_bench(config, quiet()) == 0
    assert called.call_args.args == ("window", table_rows("window", sections=["main"]))
    options = called.call_args.kwargs
    assert (options["peers"], options["commit"], options["laws"]) == (False, "0123456789ab", ("parity",))
    assert (options["device"], options["dtype"]) == ("cuda", torch.bfloat16)
