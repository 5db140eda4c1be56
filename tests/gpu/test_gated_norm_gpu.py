"""The gated norm's kernels on a GPU: against float64, strided, captured, compiled, and in TransNormerLLM's layer.

Command: pytest -m gpu tests/gpu/test_gated_norm_gpu.py
"""

import pytest
import torch

from linattn.core.laws import poisoned_memory
from linattn.core.numerics import TORCH_TOLERANCE, relative_error
from linattn.core.shapes import Segment
from linattn.mixers.lightning.layer import LightningConfig
from linattn.nn import gated_norm, gated_rms_norm
from linattn.nn.gated_norm import LARGEST_DIM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def results(x, gate, dy, activation, backend, eps=1e-6):
    x, gate = x.detach().requires_grad_(), gate.detach().requires_grad_()
    y = gated_rms_norm(x, gate, eps, activation=activation, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, (x, gate), dy)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", (None, "sigmoid"))
@pytest.mark.parametrize("shape", ((3, 7, 5), (2, 65, 64), (5, 3, 1000), (2, 9, 2048), (3, 4096), (16384,)))
def test_it_is_its_definition_row_by_row(shape, activation, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    x, gate, dy = (torch.randn(*shape, device="cuda", generator=generator).to(dtype) for _ in range(3))
    want = results(x.double(), gate.double(), dy.double(), activation, "torch")
    with poisoned_memory():
        got = results(x, gate, dy, activation, "triton")
    keep = tuple(range(len(shape) - 1))
    assert max(relative_error(a, b, keep) for a, b in zip(got, want, strict=True)) <= 2 * TORCH_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", (None, "sigmoid"))
@pytest.mark.parametrize("rows", (1, 5000))
def test_rows_of_one_number(rows, activation, dtype):
    """n = x / rms is within eps of 1 or -1, and dx = r dn (1 - n^2) cancels: to eps r^2 of r dn, 1e-6 where x is 1.

    Nothing cancels with eps 1, where the usual tolerance holds. With 1e-6, n's error, rsqrt's 2^-22.9 the most of it,
    counts twice: 10 units of 2^-24 of r dn in all, and 1.5e-6 is allowed, beside what 16 bits hold.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    x, gate, dy = (torch.randn(rows, 1, device="cuda", generator=generator).to(dtype) for _ in range(3))
    wide = (x.double(), gate.double(), dy.double())
    both = [results(x, gate, dy, activation, "triton", 1.0), results(*wide, activation, "torch", 1.0)]
    assert max(relative_error(a, b, (0,)) for a, b in zip(*both, strict=True)) <= 2 * TORCH_TOLERANCE[dtype]
    y, dx, d_gate = results(x, gate, dy, activation, "triton")
    want_y, want_dx, want_gate = results(*wide, activation, "torch")
    assert max(relative_error(y, want_y), relative_error(d_gate, want_gate)) <= 2 * TORCH_TOLERANCE[dtype]
    before = (wide[2] * (wide[1].sigmoid() if activation else wide[1]) / (wide[0].square() + 1e-6).sqrt()).abs()
    assert ((dx - want_dx).abs() <= 1.5e-6 * before + 2**-8 * want_dx.abs() + 6e-8).all()


def test_every_width_of_a_power_of_two_and_its_neighbours():
    wrong = {}
    for power in range(4, 15):
        for D in {2**power - 1, 2**power, min(2**power + 8, LARGEST_DIM)}:
            x, gate, dy = (torch.randn(2, 5, D, device="cuda") for _ in range(3))
            want = results(x.double(), gate.double(), dy.double(), "sigmoid", "torch")
            got = results(x, gate, dy, "sigmoid", "triton")
            error = max(relative_error(a, b, (0, 1)) for a, b in zip(got, want, strict=True))
            if not error < 2e-5:
                wrong[D] = error
    assert wrong == {}


def test_a_gate_is_read_where_it_lies():
    qkvu = torch.randn(2, 300, 4096, device="cuda", dtype=torch.bfloat16)
    gate, x, dy = (
        qkvu.chunk(4, -1)[3],
        qkvu.chunk(4, -1)[0],
        torch.ones((), device="cuda").bfloat16().expand(2, 300, 1024),
    )
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = gated_rms_norm(x, gate, backend="triton")
    assert torch.cuda.max_memory_allocated() - before < 1.1 * y.numel() * y.element_size()
    # Not bit by bit: of other strides Triton makes other layouts, which sum a row in another order.
    want = results(x.double(), gate.double(), dy.double(), None, "torch")
    got = results(x, gate, dy, None, "triton")
    assert max(relative_error(a, b, (0, 1)) for a, b in zip(got, want, strict=True)) <= 2 * TORCH_TOLERANCE[x.dtype]


@pytest.mark.parametrize("form", ("tnl", "tnl3"))
def test_the_layer_is_as_before_within_rounding(form, monkeypatch):
    torch.manual_seed(0)
    layer = LightningConfig(n_heads=4, head_dim=64, form=form).build(256, 1, 4).to("cuda", torch.bfloat16)
    x = torch.randn(2, 200, 256, device="cuda", dtype=torch.bfloat16)
    segment = Segment(torch.arange(200, device="cuda").expand(2, 200))
    results = []
    for backends in (gated_norm.BACKENDS, gated_norm.BACKENDS[1:]):
        monkeypatch.setattr(gated_norm, "BACKENDS", backends)
        layer.zero_grad()
        y, _ = layer(x, None, segment)
        y.float().square().sum().backward()
        results.append([y, *(p.grad for p in layer.parameters())])
    assert max(relative_error(a, b) for a, b in zip(*results, strict=True)) < 1e-2


def test_the_layer_compiles_without_a_graph_break():
    layer = LightningConfig(n_heads=4, head_dim=64).build(256, 1, 4).to("cuda", torch.bfloat16)
    x = torch.randn(2, 200, 256, device="cuda", dtype=torch.bfloat16)
    segment = Segment(torch.arange(200, device="cuda").expand(2, 200))
    want = layer(x, None, segment, return_state=False)[0]
    got = torch.compile(layer, fullgraph=True)(x, None, segment, return_state=False)[0]
    assert relative_error(got, want) < 1e-2
    got.float().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.parameters())


def test_runs_in_a_cuda_graph():
    x, gate = (torch.randn(7, 1024, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    gated_rms_norm(x, gate, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = gated_rms_norm(x, gate, backend="triton")
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, gated_rms_norm(x, gate, backend="triton"))
