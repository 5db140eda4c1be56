"""LRPE as an op: what it refuses, and its Triton kernels against float64, interpreted and compiled ahead of time."""

import re

import pytest
import torch
from ahead_of_time import Build, usage
from torch._subclasses import FakeTensorMode

from linattn.core import tiles
from linattn.core.dispatch import BackendError, Call
from linattn.core.numerics import relative_error
from linattn.nn import LRPE, apply_lrpe, lrpe

without_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter's kernels would take the place of the GPU's"
)
FAR = 1_048_576


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def theta_of(heads, dim):
    return LRPE(heads, dim).theta.detach()[:, 0]


X, THETA, AT = torch.ones(2, 5, 3, 4), torch.ones(3, 4), torch.arange(5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": X.double()}, r"k must be as q, torch.float32 \[2, 5, 3, 4\]; it is torch.float64 \[2, 5, 3, 4\]"),
        ({"k": X[:, :, :2]}, r"it is torch.float32 \[2, 5, 2, 4\]"),
        ({"theta": THETA[:2]}, r"q has shape \[2, 5, 3, 4\]; this LRPE is for \[B, T, 2, 4\]"),
        ({"positions": AT.float()}, "positions are torch.float32; pass int64"),
        ({"positions": AT.to("meta")}, "move all to one device; .*'positions': 'meta'"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
    ],
)
def test_wrong_inputs(change, message):
    with pytest.raises(ValueError, match=message):
        apply_lrpe(**{"q": X, "k": X, "theta": THETA, "positions": AT, **change})


def call(dtype=torch.bfloat16, positions=(2, 9), device="cuda", capability=(9, 0)):
    shapes = {"q": (2, 9, 4, 128), "k": (2, 9, 4, 128), "theta": (4, 128), "positions": positions}
    return Call("apply_lrpe", shapes, {}, dtype, device, capability)


@pytest.mark.parametrize(
    "refused, reason",
    [
        (call(device="cpu", capability=None), "the inputs are on cpu"),
        (call(dtype=torch.float64), "bfloat16, float16 or float32"),
        (call(positions=(3, 2, 9)), r"expand to q's \[2, 9\], got \[3, 2, 9\]"),
        (call(positions=(8,)), r"expand to q's \[2, 9\], got \[8\]"),
        (call(capability=(7, 5)), "compute capability 8.0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refusals(monkeypatch, refused, reason):
    monkeypatch.setattr(tiles, "TRITON_VERSION", (3, 6))
    words = lrpe.refuses(refused)
    assert len(words) == 1
    assert re.search(reason, words[0])
    assert [b.name for b in lrpe.BACKENDS if not b.refuses(refused)] == ["torch"]
    accepted = (call(), call(torch.float32, (9,)), call(torch.float16, (2, 1), capability=(8, 0)), call(positions=()))
    assert [lrpe.refuses(x) for x in accepted] == [[]] * 4


def test_a_named_backend_obeys_or_raises():
    with pytest.raises(BackendError, match="triton: needs an NVIDIA GPU, the inputs are on cpu"):
        apply_lrpe(X, X, THETA, AT, backend="triton")


def test_fakes_have_the_shapes_of_outputs():
    with FakeTensorMode():
        x, theta, at = torch.empty(2, 5, 3, 4, dtype=torch.bfloat16), torch.empty(3, 4), torch.empty(2, 5).long()
        both = lrpe.lrpe_forward(x, x, theta, at)
        assert [(y.shape, y.dtype) for y in both] == [((2, 5, 3, 8), x.dtype)] * 2
        *grads, d_theta = lrpe.lrpe_backward(*both, x, x, theta, at)
        assert [(g.shape, g.dtype) for g in grads] == [(x.shape, x.dtype)] * 2
        assert (d_theta.shape, d_theta.dtype) == (theta.shape, theta.dtype)
        assert lrpe.lrpe_backward(*both, None, None, theta, at)[2].shape == (0,)


def results(forward, shape, dtype, theta, positions, learn):
    """Both outputs and the gradients of q, k and, where it learns, theta; q and k are parts of wider rows."""
    *rows, heads, dim = shape
    wide = draw(*rows, 4, heads, dim).to(dtype).requires_grad_()
    theta = theta.to(dtype).requires_grad_(learn)
    both = forward(wide[..., 0, :, :], wide[..., 2, :, :], theta, positions)
    dy = [draw(*y.shape, seed=i + 1).to(dtype) for i, y in enumerate(both)]
    dy[1] = dy[1].transpose(-1, -2).contiguous().transpose(-1, -2)
    return [y.detach() for y in both] + list(torch.autograd.grad(both, (wide, theta) if learn else (wide,), dy))


CASES = {
    "packed documents": ((2, 37, 3, 20), torch.arange(37) % 11 + torch.tensor([[0], [FAR]])),
    "one offset for all rows": ((2, 70, 2, 64), torch.arange(70) + FAR),
    "more features than a block": ((1, 19, 2, 150), torch.arange(19).int()),
    "one token a row": ((3, 2, 128), torch.tensor([0, 7, FAR])),
    "before the first": ((1, 3, 2, 16), torch.tensor([[-1, -7, -FAR]])),
    "more axes": ((2, 3, 4, 2, 16), torch.arange(4) * 1001),
    "no axes": ((2, 16), torch.tensor(123_456)),
    "a backward program and a part": ((1, 1100, 1, 16), torch.arange(1100)),
}


@without_gpu
@pytest.mark.parametrize("learn", (True, False), ids=("learned", "frozen"))
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_are_the_definition(name, learn):
    pytest.importorskip("triton")
    shape, positions = CASES[name]
    theta = theta_of(*shape[-2:])
    want = results(lrpe.torch_forward, shape, torch.float64, theta, positions, learn)
    got = results(lrpe.triton_forward, shape, torch.float32, theta, positions, learn)
    assert [relative_error(a, b) < 5e-7 for a, b in zip(got, want, strict=True)] == [True] * (4 if learn else 3)


def encoded_ones(theta, positions):
    """The kernel's cosines and sines of one head, float32 [T, D] each, and float64's."""
    ones = torch.ones(1, len(positions), 1, len(theta))
    got = lrpe.triton_forward(ones, ones, theta[None], positions)[1]
    angle = positions.double()[:, None] * theta.double()
    return got.flatten(0, 2), torch.cat((angle.cos(), angle.sin()), -1)


@without_gpu
def test_angles_are_exact_far_away():
    """Absolute, of cosines up to 1: theta at random, at whole and half turns and quarters, and beyond a turn."""
    pytest.importorskip("triton")
    turns = torch.arange(16, dtype=torch.float64) / 8 - 1
    theta = torch.cat((theta_of(1, 64)[0], draw(32), 10 * draw(16), (2 * torch.pi * turns).float()))
    positions = torch.cat((torch.arange(40), FAR - torch.arange(40), 10_007 * torch.arange(-40, 105)))
    got, want = encoded_ones(theta, positions)
    assert (got - want).abs().max() < 4e-7


@without_gpu
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_theta_that_is_not_finite_shows():
    pytest.importorskip("triton")
    got, want = encoded_ones(torch.tensor([0.5, float("nan"), float("inf"), 0.1]), torch.arange(9))
    assert torch.equal(got.isnan(), want.isnan()) and got.isnan().float().mean() == 0.5


@without_gpu
@pytest.mark.parametrize("bug", ("sine's sign", "halves", "a position"))
def test_a_planted_bug_shows(bug, monkeypatch):
    """The comparison above would fail by far, forward and backward."""
    pytest.importorskip("triton")
    from linattn.nn import triton_lrpe

    right = triton_lrpe._cos_sin.fn

    def wrong(position, turn, unit):
        cos, sin = right(position + (1 if bug == "a position" else 0), turn, unit)
        return {"sine's sign": (cos, -sin), "halves": (sin, cos), "a position": (cos, sin)}[bug]

    monkeypatch.setattr(triton_lrpe, "_cos_sin", wrong)
    shape, positions = CASES["packed documents"]
    theta = theta_of(*shape[-2:])
    want = results(lrpe.torch_forward, shape, torch.float64, theta, positions, True)
    got = results(lrpe.triton_forward, shape, torch.float32, theta, positions, True)
    assert min(relative_error(a, b) for a, b in zip(got, want, strict=True)) > 1e-2


@without_gpu
@pytest.mark.parametrize("learn", (True, False), ids=("learned", "frozen"))
def test_the_operators_are_what_they_say(learn):
    """Schemas, fakes and the registered gradient, by torch's own check."""
    pytest.importorskip("triton")
    q, k = (draw(2, 3, 2, 5, seed=i).requires_grad_() for i in range(2))
    theta = theta_of(2, 5).clone().requires_grad_(learn)
    torch.library.opcheck(lrpe.lrpe_forward, (q, k, theta, torch.arange(6).view(2, 3)))


def build(kernel, dim, dtype, learn):
    from linattn.nn import triton_lrpe

    numbers = triton_lrpe.NUMBERS_FORWARD if kernel == "_lrpe_forward" else triton_lrpe.NUMBERS_BACKWARD
    rows, block = triton_lrpe.tile(dim, numbers)
    constants = dict.fromkeys(("theta_d", "p_i", "q_d", "k_d", "dq_d", "dk_d"), 1)
    constants |= {"H": 32, "D": dim, "ROWS": rows, "BLOCK": block, "STEPS": triton_lrpe.STEPS, "LEARN": learn}
    types = {"*fp32": "theta", "*i64": "positions", "*fp64": "partial"}
    types[dtype] = types.get(dtype, "") + " q k q_out k_out dq dk q_grad k_grad"
    return Build(f"linattn.nn.triton_lrpe.{kernel}", triton_lrpe.WARPS, constants, types, unaligned="blocks inner p_o")


@pytest.mark.parametrize("capability", (80, 89, 90))
def test_every_tile_compiles_ahead_of_time(capability, record_property):
    """For GPUs that are not here; nothing spills."""
    pytest.importorskip("triton")
    widths = [(16, "*bf16"), (64, "*fp16"), (128, "*bf16"), (128, "*fp32"), (150, "*bf16")]
    kernels = [("_lrpe_forward", True), ("_lrpe_backward", True), ("_lrpe_backward", False)]
    builds = {f"{k} {dim} {kind} {learn}": build(k, dim, kind, learn) for dim, kind in widths for k, learn in kernels}
    found = usage(capability, builds)
    for name, values in found.items():
        record_property(name, values)
    assert {n: v for n, v in found.items() if v["spilled"] > 0} == {}
