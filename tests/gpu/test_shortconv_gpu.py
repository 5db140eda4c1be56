"""Short convolution's Triton backend on a GPU: the contract, every length to 130, every tile, in place and captured.

Command: pytest -m gpu tests/gpu/test_shortconv_gpu.py
"""

import pytest
import torch

from linattn.core.laws import LAWS, Subject, poisoned_memory
from linattn.core.numerics import TORCH_TOLERANCE, relative_error
from linattn.mixers import shortconv
from linattn.mixers.shortconv import ShortConvState, short_conv, short_conv_step_
from linattn.mixers.shortconv.cases import SMALL, ShortConvCase
from linattn.mixers.shortconv.layer import ShortConvConfig
from linattn.mixers.shortconv.reference import short_conv_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),
]

CASES = (
    *SMALL,
    ShortConvCase(2, 130, 2048, 3, "Based 360M", gate=True, activation="silu"),
    ShortConvCase(2, 130, 600, 4, "channels that no power of two holds", bias=True, activation="silu"),
    ShortConvCase(2, 130, 96, 16, "the most taps", bias=True, gate=True, activation="silu"),
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("law", LAWS)
def test_laws(law, case, dtype):
    assert LAWS[law](Subject(shortconv.MIXER, case, "triton", dtype, "cuda")) == []


def draw(B, T, D, W, dtype):
    """x, weight, bias, gate, the initial State's rows, and gradients of y and of the final State's."""
    generator = torch.Generator("cuda").manual_seed(T)
    shapes = ((B, T, D), (D, W), (D,), (B, T, D), (B, W - 1, D), (B, T, D), (B, W - 1, D))
    return [torch.randn(*s, device="cuda", generator=generator).to(dtype) for s in shapes]


def wanted(x, weight, bias, gate, initial, dy, d_final):
    leaves = [t.double().requires_grad_() for t in (x, weight, bias, gate, initial)]
    count = torch.zeros(x.shape[0], dtype=torch.int32, device="cuda")
    y, (final, _) = short_conv_reference(
        *leaves[:3], gate=leaves[3], activation="silu", initial_state=(leaves[4], count)
    )
    loss = (y * dy.double()).sum() + (final * d_final.double()).sum()
    return [t.detach() for t in (y, final, *torch.autograd.grad(loss, leaves))]


def errors(inputs, want, tiles=(None, None)):
    from linattn.mixers.shortconv import triton as kernels

    *given, dy, d_final = inputs
    with poisoned_memory():
        got = kernels.forward(*given, None, True, True, tiles[0])
        got += kernels.backward(dy, d_final, *given, None, True, tiles[1])
    return [relative_error(a, b) for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", (range(1, 131), (523, 2049, 8192)), ids=str)
def test_every_length(lengths, dtype):
    """From a State and with the final State's gradient."""
    wrong = {}
    for T in lengths:
        inputs = draw(2, T, 136, 4, dtype)
        found = errors(inputs, wanted(*inputs))
        if not max(found) <= 2 * TORCH_TOLERANCE[dtype]:
            wrong[T] = found
    assert wrong == {}


def every_tile():
    """Tiles of the forward and of the backward, as numbers: the kernels cannot be imported where triton is not."""
    pytest.importorskip("triton")
    from linattn.mixers.shortconv import triton as kernels

    forward, backward = (
        [*tiles, chosen(16)]
        for tiles, chosen in (
            (kernels.FORWARD, kernels.forward_tile),
            (kernels.BACKWARD, kernels.backward_tile),
        )
    )
    return list(zip(forward, backward, strict=True))


@pytest.mark.parametrize("W, dtype", [*((w, torch.bfloat16) for w in (1, 3, 4, 16)), *((4, d) for d in DTYPES[1:])])
@pytest.mark.parametrize("D", (1000, 2048))
def test_every_tile(D, W, dtype):
    inputs = draw(2, 300, D, W, dtype)
    want = wanted(*inputs)
    for tiles in every_tile():
        found = errors(inputs, want, tiles)
        assert max(found) <= 2 * TORCH_TOLERANCE[dtype], (tiles, found)


def test_the_halves_of_a_projection_are_read_in_place():
    u, gate = torch.randn(4, 2000, 4096, device="cuda", dtype=torch.bfloat16).chunk(2, -1)
    weight = torch.randn(2048, 3, device="cuda", dtype=torch.bfloat16)
    options = {"activation": "silu", "return_state": False, "backend": "triton"}
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y, _ = short_conv(u, weight, gate=gate, **options)
    assert torch.cuda.max_memory_allocated() - before < 1.1 * y.numel() * y.element_size()
    assert torch.equal(y, short_conv(u.contiguous(), weight, gate=gate.contiguous(), **options)[0])
    turned = u.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(y, short_conv(turned, weight, gate=gate, **options)[0])


def test_long_packed_documents_are_the_torch_backends():
    generator = torch.Generator().manual_seed(0)
    cuts = torch.randint(0, 20_000, (300,), generator=generator).sort().values
    cu = torch.cat([torch.tensor([0]), cuts, torch.tensor([20_000])]).to("cuda", torch.int32)
    x, weight, _, gate, *_ = draw(1, 20_000, 256, 4, torch.float32)
    x, weight, gate = (t.requires_grad_() for t in (x, weight, gate))
    initial = torch.randn(301, 3, 256, device="cuda", requires_grad=True)
    state = ShortConvState(initial, torch.full((301,), 3, device="cuda", dtype=torch.int32))
    results = []
    for backend in ("triton", "torch"):
        y, final = short_conv(
            x, weight, gate=gate, activation="silu", initial_state=state, cu_seqlens=cu, backend=backend
        )
        loss = (y * y.detach().cos()).sum() + final.x.square().sum()
        results.append([y, final.x, final.count, *torch.autograd.grad(loss, (x, weight, gate, initial))])
    assert [relative_error(a, b) < 2e-5 for a, b in zip(*results, strict=True)] == [True] * 7


def test_compiles_without_a_graph_break():
    x, weight, bias, gate, _, dy, _ = draw(2, 300, 256, 3, torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, weight, bias, gate)]

    def run(x, weight, bias, gate):
        y, state = short_conv(x * 1.5, weight, bias, gate=gate, activation="silu", backend="triton")
        return y * 2, state.x

    want = run(*leaves)
    gradients = torch.autograd.grad(want[0], leaves, dy)
    got = torch.compile(run, fullgraph=True)(*leaves)
    for a, b in zip((*got, *torch.autograd.grad(got[0], leaves, dy)), (*want, *gradients), strict=True):
        assert relative_error(a, b) < 1e-2


def test_the_layer_compiles_and_trains():
    torch.manual_seed(0)
    layer = ShortConvConfig().build(128, 0, 1).to("cuda", torch.bfloat16)
    x = torch.randn(2, 100, 128, device="cuda", dtype=torch.bfloat16)
    from linattn.core.shapes import Segment

    segment = Segment(torch.arange(100, device="cuda").expand(2, 100))
    want = layer(x, None, segment, return_state=False)[0]
    got = torch.compile(layer, fullgraph=True)(x, None, segment, return_state=False)[0]
    assert relative_error(got, want) < 1e-2
    got.float().square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.parameters())


def test_runs_in_a_cuda_graph():
    x, weight, bias, gate, initial, *_ = draw(3, 40, 600, 4, torch.bfloat16)
    options = {"gate": gate, "activation": "silu", "backend": "triton"}
    want, state = short_conv(x, weight, bias, **options)
    pool = ShortConvState(torch.zeros(5, 3, 600, device="cuda", dtype=x.dtype), torch.zeros(5, device="cuda").int())
    slots = torch.tensor([2, -1, 0], device="cuda", dtype=torch.int32)
    step = {"pool": pool, "slots": slots, "gate": gate[:, 0], "activation": "silu", "backend": "triton"}
    short_conv_step_(x[:, 0], weight, bias, **step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got, got_state = short_conv(x, weight, bias, **options)
        y = short_conv_step_(x[:, 0], weight, bias, **step)
    pool.x.copy_(torch.cat([initial, initial[:2]]))
    pool.count.fill_(1)
    before = pool.x.clone()
    graph.replay()
    assert torch.equal(got, want) and torch.equal(got_state.x, state.x)
    rows, touched = [0, 2], [2, 0]
    window = torch.cat([before[touched], x[rows, :1]], 1)
    assert torch.equal(pool.x[touched], window[:, 1:])
    assert torch.equal(pool.x[[1, 3, 4]], before[[1, 3, 4]])
    assert pool.count.tolist() == [2, 1, 2, 1, 1]
    s = (window.double() * weight.double().t()).sum(1) + bias.double()
    assert relative_error(y[rows], s * s.sigmoid() * gate[rows, 0].double(), (0,)) < 1e-2


@pytest.mark.parametrize("batch", (1, 7, 1024))
def test_steps_are_the_torch_backends(batch):
    generator = torch.Generator("cuda").manual_seed(0)
    x, gate = (torch.randn(batch, 2048, device="cuda", generator=generator) for _ in range(2))
    weight = torch.randn(2048, 3, device="cuda", generator=generator)
    pools = [
        ShortConvState(torch.ones(batch + 1, 2, 2048, device="cuda"), torch.zeros(batch + 1, device="cuda").int())
        for _ in range(2)
    ]
    slots = torch.randperm(batch, device="cuda").to(torch.int32)
    ys = [
        short_conv_step_(x, weight, pool=pool, slots=slots, gate=gate, activation="silu", backend=backend)
        for pool, backend in zip(pools, ("triton", "torch"), strict=True)
    ]
    assert relative_error(*ys, keep=(0,)) < 2e-5
    assert torch.equal(pools[0].x, pools[1].x) and torch.equal(pools[0].count, pools[1].count)
