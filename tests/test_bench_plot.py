"""Charts of the bench's records."""

import math
import struct
from unittest import mock

import pytest
from bench_parts import a_record

from linattn.bench import plot as charts
from linattn.bench.plot import MemoryRow, plot_lengths, plot_memory


def png_size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def some_rows():
    return [MemoryRow(n, 6.1e6, 98304.0 * n, 2000.0 - n / 1000) for n in range(1000, 200_000, 9000)]


def test_plot_memory(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "charts" / "memory.png"
    plot_memory(some_rows(), path)
    assert png_size(path) == (1512, 792)
    assert path.stat().st_size > 20_000
    svg = path.with_suffix(".svg")
    plot_memory(some_rows(), svg, title="A novel, read as one stream")
    text = svg.read_text()
    for words in ("A novel, read as one stream", "6.1 MB", "tokens/s", "tokens read"):
        assert words in text
    with pytest.raises(ValueError, match="at least two moments, got 1"):
        plot_memory(some_rows()[:1], path)


def test_plot_lengths(tmp_path):
    pytest.importorskip("matplotlib")
    lengths = (1024, 2048, 4096)
    records = [a_record(case=f"b2-h2-t{n}-f4-v8", p50_ms=n / 100) for n in lengths]
    records += [a_record(case=f"b2-h2-t{n}-f4-v8", p50_ms=n * n / 1e5, impl="quadratic") for n in lengths]
    records += [a_record(case="b2-h2-t4096-f4-v8", p50_ms=math.nan, impl="broken")]
    path = tmp_path / "taylor.png"
    plot_lengths(records, path)
    assert png_size(path) == (2070, 828)
    assert path.stat().st_size > 20_000
    plot_lengths(records, tmp_path / "taylor.svg")
    text = (tmp_path / "taylor.svg").read_text()
    assert "quadratic" in text and "broken" not in text and "4K" in text
    with pytest.raises(ValueError, match="no timed record of pass 'step' among 7"):
        plot_lengths(records, path, pass_="step")


def test_plot_takes_the_latest_of_each_length():
    records = [a_record(case="b1-t64-d8", p50_ms=9.0), a_record(case="b1-t64-d8", p50_ms=3.0)]
    assert charts.latest_by_length(records, "fwd")["linattn"][64].p50_ms == 3.0


def test_plot_without_matplotlib_says_how_to_get_it(tmp_path):
    absent = mock.patch.dict("sys.modules", {"matplotlib": None, "matplotlib.figure": None})
    with absent, pytest.raises(ModuleNotFoundError, match=r"pip install 'linattn\[plot\]'"):
        plot_memory(some_rows(), tmp_path / "x.png")
