"""Pages of results are what the records give, and nothing else stands on them.

pytest tests/test_bench_pages.py
"""

import math
import re
import sys
from dataclasses import replace

import pytest

from linattn.bench import BenchConfig, pages, run_bench, table5
from linattn.bench.model_pages import prefill_panels, training_panels
from linattn.bench.page_parts import heading, label, markdown, ms, ratio
from linattn.bench.pages import chart_lines, newest_runs, pages_of, section_of, write_pages
from linattn.bench.plot import spread
from linattn.bench.record import Record, append_records, read_records
from linattn.bench.setting import HOST, IN_GRAPH
from linattn.bench.tables import TABLES


def a_record(case, impl="linattn", pass_="fwd", p50=1.0, op="lightning", **changes):
    words = {"date": "2026-01-02T03:04:05Z", "commit": "0123456789ab", "gpu": "NVIDIA H200", "driver": "1"}
    values = {"p20_ms": p50, "p50_ms": p50, "p80_ms": p50, "floor_ms": 0.5, "gate": "ok", "command": "c"}
    words |= {"torch": "2.11", "triton": "3.6", "dtype": "bfloat16"}
    return Record(**{**words, **values, "op": op, "case": case, "pass_": pass_, "impl": impl, "runs": 3, **changes})


def cells(page, start):
    """The cells of the one row of a page that begins with these words."""
    (row,) = [line for line in page.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_every_page_in_the_repository_is_what_its_records_give(request):
    root = request.config.rootpath
    made = pages_of(root / "benchmarks" / "results" / "h200")
    ours = {*TABLES, "table5", "train", "prefill"}  # other pages there have makers of their own
    paths = [path for path in (root / "docs" / "results").glob("*.md") if path.stem in ours]
    stand = {path.stem: path.read_text(encoding="utf-8") for path in paths}
    assert stand == made, "run: linattn bench pages"


def test_every_chart_that_a_page_shows_is_there(request):
    docs = request.config.rootpath / "docs" / "results"
    for path in docs.glob("*.md"):
        for chart in re.findall(r"!\[.*?\]\((.*?)\)", path.read_text(encoding="utf-8")):
            assert (docs / chart).is_file(), (path.name, chart)


@pytest.mark.parametrize(
    "impl, name",
    [
        ("linattn", "linattn"),
        ("linattn" + HOST, "linattn, host included"),
        ("linattn" + IN_GRAPH, "linattn in a CUDA graph"),
        ("fla-chunk_simple_gla 0.6.0", "fla chunk_simple_gla"),
        ("fla 0.6.0 chunk_simple_gla", "fla chunk_simple_gla"),
        ("fla-fused_chunk_based 0.6.0", "fla fused_chunk_based"),
        ("fla-chunk_simple_gla 0.6.0" + HOST, "fla chunk_simple_gla, host included"),
        ("sdpa-flash 2.11.0+cu130", "FA2"),
        ("sdpa-flash 2.11.0+cu130" + HOST, "FA2, host included"),
        ("FA2 (torch 2.11.0+cu130)", "FA2"),
        ("FA2-window 2.11.0+cu130" + HOST, "FA2 with its window, host included"),
        ("cuDNN (torch 2.11.0+cu130)", "cuDNN"),
        ("lightning_attn 0.0.5", "lightning_attn"),
        ("flex_attention 2.11.0+cu130", "flex_attention"),
    ],
)
def test_labels_are_names_without_versions(impl, name):
    assert label(impl) == name


def test_no_two_implementations_share_a_column(request):
    """One would take the other's place in a table, unseen."""
    for op in TABLES:
        records = read_records(request.config.rootpath / "benchmarks" / "results" / "h200" / f"{op}.csv")
        impls = {r.impl for r in newest_runs(records) if not math.isnan(r.p50_ms)}
        assert len({label(impl) for impl in impls}) == len(impls), op


def test_figures_and_ratios():
    assert [ms(x) for x in (0.06244, 1.3486, 14.0, 227.94, 1234.5, math.nan)] == [
        "0.0624",
        "1.35",
        "14",
        "228",
        "1,234",
        "",
    ]
    assert (ratio(3.0, 2.0), ratio(math.nan, 2.0)) == ("1.50", "")
    assert markdown(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"


def test_a_case_is_shown_from_its_newest_run_whole():
    old = [a_record("b1-t64", "linattn", p50=9.0), a_record("b1-t64", "FA2 (torch 1)", p50=8.0)]
    new = [a_record("b1-t64", "linattn", p50=2.0, date="2026-02-01")]
    alone = [a_record("b1-t64", "sdpa-cudnn 1", p50=1.0, date="2026-03-01")]
    assert [(r.impl, r.p50_ms) for r in newest_runs([*old, *new, *alone])] == [("linattn", 2.0)]
    assert [r.p50_ms for r in newest_runs(old)] == [9.0, 8.0]


def test_the_page_of_an_op_tells_targets_peers_and_what_was_not_timed(tmp_path):
    case = "b4-h32-t8192-d128"
    records = [
        a_record(case, p50=0.30, floor_ms=0.25),
        a_record(case, "sdpa-flash 2.11", p50=6.56, floor_ms=0.25),
        a_record(case, "lightning_attn 0.0.5", p50=math.nan, gate="out of memory"),
        a_record(case, pass_="fwdbwd", p50=1.5, floor_ms=0.687),
        a_record("b64-h32-d128", pass_="step", p50=0.07, floor_ms=0.06),
        a_record("b1-h32-d128", pass_="step", p50=math.nan, gate="decode_is_the_fold"),
    ]
    append_records(tmp_path / "lightning.csv", records)
    (page,) = pages_of(tmp_path).values()
    assert cells(page, f"{case} | fwd")[2:] == ["0.25", "0.34 ms", "0.3", "1.20", "yes", "6.56"]
    assert cells(page, f"{case} | fwdbwd")[2:7] == ["0.687", "1.4 ms", "1.5", "2.18", "no"]
    assert cells(page, "b64-h32-d128")[2:] == ["0.06", "1.25x the floor", "0.07", "1.17", "yes"]
    assert cells(page, "b1-h32-d128")[4:] == ["", "", ""]
    assert f"- {case} fwd, lightning_attn: out of memory" in page
    assert "- b1-h32-d128 step, linattn: decode_is_the_fold" in page
    assert "NVIDIA H200, driver 1, torch 2.11, triton 3.6" in page
    assert "0123456789ab (2026-01-02T03:04:05Z)" in page


def test_records_of_another_way_of_timing_make_no_page(tmp_path):
    """Those of the first recorder, whose column of runs is empty."""
    append_records(tmp_path / "lightning.csv", [a_record("b4-h32-t8192-d128", runs=0)])
    assert pages_of(tmp_path) == {}
    append_records(tmp_path / "lightning.csv", [a_record("b4-h32-t8192-d128", p50=0.33, date="2026-03-01")])
    assert cells(pages_of(tmp_path)["lightning"], "b4-h32-t8192-d128")[4] == "0.33"


def test_a_targets_verdict_turns_at_the_target(tmp_path):
    for p50, verdict in ((0.34, "yes"), (0.3401, "no")):
        page = pages.op_page([a_record("b4-h32-t8192-d128", p50=p50)], "x.csv")
        assert cells(page, "b4-h32-t8192-d128")[6] == verdict


def test_the_page_tells_what_a_token_costs():
    records = [
        a_record("b1024-h16-t1024-d128", p50=4.0),
        a_record("b8-h16-t131072-d128", p50=4.5),
        a_record("b1-h16-t1048576-d128", p50=5.9),
    ]
    page = pages.op_page(records, "x.csv")
    per = 4.0 * 1e6 / (16 * 2**20)
    assert cells(page, "b1024-h16-t1024-d128")[3:] == [f"{per:.3f}", "1.06", "1.00", "1.1", "yes"]
    assert cells(page, "b8-h16-t131072-d128")[4:] == ["1.00", "1.12", "1.1", "no"]
    assert cells(page, "b1-h16-t1048576-d128")[4:] == ["1.00", "1.48", "1.5", "yes"]


def test_a_row_that_does_not_fill_the_places_for_programs_may_cost_more():
    """128 rows of heads are one program a multiprocessor, and taylor's fit two."""
    records = [a_record(f"b{b}-h16-t{2**19 // b}-f16-v64", p50=p50, op="taylor") for b, p50 in ((32, 1.0), (8, 1.3))]
    page = pages.op_page(records, "x.csv")
    assert cells(page, "b32-h16-t16384-f16-v64 | fwd")[5:] == ["1.00", "1.1", "yes"]
    assert cells(page, "b8-h16-t65536-f16-v64 | fwd")[5:] == ["1.30", "1.5", "yes"]


def test_the_page_tells_memory_over_what_the_tensors_hold():
    """Seven tensors of 4 x 32 x 32,768 x 128 in bfloat16: q, k, v, o, dq, dk, dv, 1 GiB each."""
    case = "b4-h32-t32768-d128"
    records = [
        a_record(case, pass_="fwdbwd", peak_bytes=8 * 2**30),
        a_record(case, "sdpa-flash 2.11", "fwdbwd", peak_bytes=15 * 2**30),
        a_record(case, "linattn" + IN_GRAPH, "fwdbwd", peak_bytes=2**30),
    ]
    page = pages.op_page(records, "x.csv")
    assert f"| {case} | 8.00 | 1.14 | 15.00 |" in page
    assert "## Memory" not in pages.op_page([replace(r, peak_bytes=0) for r in records], "x.csv")


def test_sections_are_those_of_the_table():
    assert section_of("lightning", "b4-h32-t8192-d128", "fwd") == "main"
    assert section_of("lightning", "b4-h32-t4096-d128", "fwd") == "lengths"
    assert section_of("lightning", "b8-h16-t131072-d128", "fwd") == "flat"
    assert section_of("lightning", "b7-h32-d128", "step") == "step"
    assert section_of("lightning", "b7-h7-t7-d128", "fwd") == "main"


def test_a_chart_shows_one_shape_and_plain_timings():
    family = [a_record(f"b4-h32-t{n}-d128", impl) for n in (2048, 1024) for impl in ("linattn", "sdpa-flash 1")]
    others = [a_record("b4-h32-t1024-d128", "linattn" + IN_GRAPH), a_record("b1-h16-t8192-d128")]
    name, lines = chart_lines([*family, *others], "fwd")
    assert name == "b4-h32-d128"
    assert {k: list(v) for k, v in lines.items()} == {"linattn": [1024, 2048], "FA2": [1024, 2048]}
    assert chart_lines(others, "fwd") == ("", {})
    assert chart_lines(family, "fwdbwd") == ("", {})


def test_table5_tells_how_many_times_faster(tmp_path):
    main, sweep = "b16-h16-t32768-f16-v64", "b2-h16-t16384-f16-v64"
    records = [
        a_record(main, table5.PROMPT, p50=3.0, op="table5"),
        a_record(main, table5.RNN, p50=2.5, op="table5"),
        a_record(main, "sdpa-flash 2.11", p50=114.0, op="table5"),
        a_record(sweep, table5.PROMPT, p50=0.2, op="table5"),
        a_record(sweep, table5.RNN, p50=math.nan, op="table5", gate="parity"),
        a_record(sweep, "sdpa-flash 2.11", p50=3.6, op="table5"),
    ]
    append_records(tmp_path / "table5.csv", records)
    page = pages_of(tmp_path)["table5"]
    assert cells(page, "JRT-Prompt (2N)") == ["JRT-Prompt (2N)", "3", "0.5", "38.00", "30", "yes", "11.9"]
    assert cells(page, "JRT-RNN (M = N/2)") == ["JRT-RNN (M = N/2)", "2.5", "0.5", "45.60", "50", "no", "19.2"]
    assert cells(page, "FA2")[3:] == ["1.00", "", "", ""]
    assert cells(page, sweep) == [sweep, "0.2", "", "", "3.6", "", "18.00", ""]
    assert f"- {sweep}, linattn JRT-RNN (M = N/2): parity" in page


def speeds():
    def row(case, p50, impl="linattn", **changes):
        return a_record(case, impl, "train", p50, op="train", peak_bytes=2**31, **changes)

    like = "attention_like_transnormer_1b"
    return [
        row("transnormer_1b-b64-t1024", 1000.0),
        row("transnormer_1b-b1-t65536", 1040.0),
        row("transnormer_1b-b1-t131072", 2200.0),
        row("transnormer_1b-b1-t131072-compiled", 1500.0),
        row(f"{like}-b64-t1024", 900.0, "sdpa-flash"),
        row(f"{like}-b1-t131072", math.nan, "sdpa-flash", gate="out of memory"),
        row("based_360m+fla-parallel_based-b32-t2048", 700.0, "fla parallel_based"),
    ]


def test_the_page_of_training_tells_speed_flatness_and_utilisation(tmp_path):
    append_records(tmp_path / "train.csv", speeds())
    page = pages_of(tmp_path)["train"]
    assert cells(page, "transnormer_1b | linattn | 64 x 1,024")[3:5] == ["65,536", "1.00"]
    flat = cells(page, "transnormer_1b | linattn | 1 x 65,536")
    assert (flat[4], flat[-1]) == ("0.96", "flat")
    assert cells(page, "transnormer_1b | linattn | 1 x 131,072")[-1] == "not flat"
    assert cells(page, "transnormer_1b-compiled | linattn | 1 x 131,072")[4] == "1.00"
    mfu = cells(page, "transnormer_1b | linattn | 64 x 1,024")[5]
    # 6 x 1.02 G parameters and the States' share, at 65,536 tokens a second, over 989 TFLOP/s.
    assert 40 < float(mfu.rstrip("%")) < 45
    assert cells(page, "attention_like_transnormer_1b | FA2 | 1 x 131,072")[3:] == ["", "", "", "", "out of memory"]
    assert cells(page, "based_360m+fla-parallel_based | fla parallel_based | 32 x 2,048")[-1] == ""


def test_the_chart_of_training_has_a_panel_a_size():
    ((name, lines),) = training_panels(speeds())
    assert name == "transnormer_1b"
    assert {k: list(v) for k, v in lines.items()} == {
        "TransNormerLLM": [1024, 65536, 131072],
        "attention, FA2": [1024],
    }


def test_labels_at_the_ends_of_lines_do_not_overlap():
    assert spread({"a": 10.0, "b": 1.0, "c": 10.0, "d": 10.5}, 1.1) == pytest.approx(
        {"b": 1.0, "a": 10.0, "c": 11.0, "d": 12.1}
    )


def test_pages_and_charts_are_written_by_one_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    lengths = (1024, 2048)
    records = [
        replace(a_record(f"b4-h32-t{n}-d128", impl, pass_, n / 1e4), peak_bytes=n * 1000)
        for n in lengths
        for impl in ("linattn", "sdpa-flash 2")
        for pass_ in ("fwd", "fwdbwd")
    ]
    append_records(tmp_path / "h200" / "lightning.csv", records)
    append_records(tmp_path / "h200" / "train.csv", speeds())
    config = BenchConfig(op="pages", out=tmp_path, docs=tmp_path / "docs")
    assert run_bench(config) == 0
    written = {path.name for path in (tmp_path / "docs").iterdir()}
    assert written == {"lightning.md", "train.md", "lightning-fwd.png", "lightning-fwdbwd.png", "train.png"}
    assert "lightning-fwd.png" in (tmp_path / "docs" / "lightning.md").read_text()
    assert capsys.readouterr().out.count("written: ") == 5


def test_pages_need_no_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    append_records(
        tmp_path / "h200" / "lightning.csv",
        [a_record(f"b4-h32-t{n}-d128", impl) for n in (1024, 2048) for impl in ("linattn", "sdpa-flash 2")],
    )
    said = []
    (page,) = write_pages(tmp_path / "h200", tmp_path / "docs", said.append)
    assert page.name == "lightning.md"
    assert said == ["charts need matplotlib: pip install 'linattn[plot]'"]


def test_prefill_is_drawn_with_attention_under_one_name(tmp_path):
    speeds = [a_record(f"based_1b-b{4096 // t}-t{t}", op="prefill", pass_="prefill", p50=1e3) for t in (1024, 2048)]
    rival = a_record("transformer_1b_fast-b4-t1024", "sdpa-flash", op="prefill", pass_="prefill", p50=2e3)
    append_records(tmp_path / "h200" / "prefill.csv", [*speeds, rival])
    ((_, lines),) = prefill_panels([*speeds, rival])
    assert lines == {"based_1b": {1024: 4096.0, 2048: 4096.0}, "attention, FA2": {1024: 2048.0}}
    written = write_pages(tmp_path / "h200", tmp_path / "docs")
    assert [path.name for path in written] == ["prefill.md", "prefill.png"]
    assert "(prefill.png)" in (tmp_path / "docs" / "prefill.md").read_text()


def test_one_length_is_no_chart_and_a_prefix_grows_with_its_text():
    def pair(t, op="prefix"):
        case = f"b16-h16-t{t}-f16-v64-m{t // 2}"
        return [a_record(case, op=op), a_record(case, "sdpa-flash 2.11", op=op)]

    assert chart_lines(pair(2048), "fwd") == ("", {})
    family, lines = chart_lines([*pair(2048), *pair(8192)], "fwd")
    assert family == "b16-h16-f16-v64"
    assert {name: list(line) for name, line in lines.items()} == {"linattn": [2048, 8192], "FA2": [2048, 8192]}


def test_the_peers_named_are_those_that_were_timed():
    records = [a_record("b4-h32-t2048-d128"), a_record("b4-h32-t2048-d128", "sdpa-flash 2.11")]
    records += [a_record("b4-h32-t2048-d128", "sdpa-flash 2.11" + HOST), a_record("b1-h1-t64-d8", "fla", p50=math.nan)]
    assert "Peers: sdpa-flash 2.11." in heading("title", records, "source")
