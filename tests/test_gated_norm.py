"""The gated norm: its definition, what it refuses, and its Triton kernels interpreted and compiled ahead of time."""

import pytest
import torch
from ahead_of_time import Build, usage
from torch._subclasses import FakeTensorMode

from linattn.core import tiles
from linattn.core.dispatch import BackendError, Call
from linattn.core.numerics import relative_error
from linattn.nn import SimpleRMSNorm, gated_norm, gated_rms_norm

without_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter's kernels would take the place of the GPU's"
)


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_on_a_cpu_it_is_the_norm_and_a_product(dtype):
    x, gate = draw(2, 9, 12, dtype=dtype), draw(2, 9, 12, dtype=dtype, seed=1)
    norm = SimpleRMSNorm(12, 1e-3)
    assert torch.equal(gated_rms_norm(x, gate, 1e-3), norm(x) * gate)
    assert torch.equal(gated_rms_norm(x, gate, 1e-3, activation="sigmoid"), norm(x) * gate.sigmoid())


@pytest.mark.parametrize("activation", gated_norm.ACTIVATIONS)
def test_gradients(activation):
    x, gate = draw(3, 5).requires_grad_(), draw(3, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, g: gated_rms_norm(x, g, activation=activation), (x, gate))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gate": draw(2, 4)}, r"the gate must be as x, torch.float64 \[2, 5\] on cpu; it is torch.float64 \[2, 4\]"),
        ({"gate": draw(2, 5).float()}, "it is torch.float32"),
        ({"gate": draw(2, 5).to("meta")}, "on meta"),
        ({"activation": "silu"}, "activation must be one of .*, got 'silu'"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
    ],
)
def test_wrong_inputs(change, message):
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(**{"x": draw(2, 5), "gate": draw(2, 5), **change})


def call(dtype=torch.bfloat16, dim=1024, device="cuda", capability=(9, 0)):
    shapes, strides = (dict.fromkeys(("x", "gate"), x) for x in ((2, 9, dim), (9 * dim, dim, 1)))
    return Call("gated_rms_norm", shapes, strides, dtype, device, capability)


@pytest.mark.parametrize(
    "refused, reason",
    [
        (call(device="cpu", capability=None), "the inputs are on cpu"),
        (call(dtype=torch.float64), "bfloat16, float16 or float32"),
        (call(dim=20_000), "at most 16384, got 20000"),
        (call(capability=(7, 5)), "compute capability 8.0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refusals(monkeypatch, refused, reason):
    monkeypatch.setattr(tiles, "TRITON_VERSION", (3, 6))
    assert any(reason in words for words in gated_norm.refuses(refused))
    assert [b.name for b in gated_norm.BACKENDS if not b.refuses(refused)] == ["torch"]
    assert gated_norm.refuses(call()) == gated_norm.refuses(call(torch.float32, 16384, capability=(8, 0))) == []


def test_a_named_backend_obeys_or_raises():
    with pytest.raises(BackendError, match="triton: needs an NVIDIA GPU, the inputs are on cpu"):
        gated_rms_norm(draw(2, 5), draw(2, 5), backend="triton")


def test_fakes_have_the_shapes_of_outputs():
    with FakeTensorMode():
        x = torch.empty(2, 5, 8, dtype=torch.bfloat16)
        y = gated_norm.gated_norm_forward(x, x, 1e-6, True)
        grads = gated_norm.gated_norm_backward(y, x, x, 1e-6, True)
        assert [(t.shape, t.dtype) for t in (y, *grads)] == [(x.shape, x.dtype)] * 3


@without_gpu
@pytest.mark.parametrize("sigmoid", (False, True))
@pytest.mark.parametrize("shape", ((40,), (3, 5), (2, 7, 1000), (2, 3, 2, 64)))
def test_the_kernels_are_the_definition(shape, sigmoid):
    """Strided: a third of a wider row. More rows than one program holds, and the last program not full."""
    pytest.importorskip("triton")
    wide = (*shape[:-1], 3 * shape[-1])
    x, gate, dy = (draw(*wide, seed=i).chunk(3, -1)[1] for i in range(3))
    leaves = [t.detach().requires_grad_() for t in (x, gate)]
    want = gated_norm.torch_forward(*leaves, 1e-3, sigmoid)
    want = [want, *torch.autograd.grad(want, leaves, dy)]
    leaves = [draw(*wide, dtype=torch.float32, seed=i).chunk(3, -1)[1].requires_grad_() for i in range(2)]
    got = gated_norm.triton_forward(*leaves, 1e-3, sigmoid)
    got = [got, *torch.autograd.grad(got, leaves, dy.float())]
    keep = tuple(range(len(shape) - 1))
    assert [relative_error(a, b, keep) < 2e-6 for a, b in zip(got, want, strict=True)] == [True] * 3


@without_gpu
def test_the_operators_are_what_they_say():
    """Schemas, fakes and the registered gradient, by torch's own check."""
    pytest.importorskip("triton")
    x, gate = (draw(2, 3, 5, dtype=torch.float32, seed=i).requires_grad_() for i in range(2))
    torch.library.opcheck(gated_norm.gated_norm_forward, (x, gate, 1e-6, True))


def build(kernel, dim, dtype):
    from linattn.nn import triton_gated_norm

    rows, block, warps = triton_gated_norm.tile(dim)
    constants = {"D": dim, "SIGMOID": True, "ROWS": rows, "BLOCK": block, "x_d": 1, "gate_d": 1, "dy_d": 1}
    types = {"fp32": "eps", dtype: "x gate y dy dx d_gate"}
    return Build(f"linattn.nn.triton_gated_norm.{kernel}", warps, constants, types, unaligned="rows inner")


@pytest.mark.parametrize("capability", (80, 89, 90))
def test_every_tile_compiles_ahead_of_time(capability, record_property):
    """For GPUs that are not here; nothing spills."""
    pytest.importorskip("triton")
    dims = [(1 << power, "*bf16") for power in range(4, 15)] + [(4096, "*fp32")]
    kernels = ("_norm_forward", "_norm_backward")
    found = usage(capability, {f"{k} {dim} {dtype}": build(k, dim, dtype) for dim, dtype in dims for k in kernels})
    for name, values in found.items():
        record_property(name, values)
    assert {n: v for n, v in found.items() if v["spilled"] > 0} == {}
