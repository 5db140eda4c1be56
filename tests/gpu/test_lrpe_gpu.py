"""LRPE's kernels on a GPU: against float64, far away, strided, captured, compiled, and in TransNormerLLM's layer.

Command: pytest -m gpu tests/gpu/test_lrpe_gpu.py
"""

import pytest
import torch

from linattn.core.laws import poisoned_memory
from linattn.core.numerics import TORCH_TOLERANCE, relative_error
from linattn.core.shapes import Segment
from linattn.mixers.lightning.layer import LightningConfig
from linattn.nn import LRPE, apply_lrpe, lrpe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FAR = 1_048_576


def draw(*shape, seed=0):
    return torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))


def theta_of(heads, dim):
    return LRPE(heads, dim).cuda().theta.detach()[:, 0]


def at(tokens, first=(0, FAR)):
    return torch.arange(tokens, device="cuda") + torch.tensor(first, device="cuda")[:, None]


def results(qk, theta, positions, dys, backend, learn=True):
    """Both encoded, and the gradients of qk [..., 2, H, D], where q and k lie by turns, and of theta."""
    qk, theta = qk.detach().requires_grad_(), theta.detach().requires_grad_(learn)
    q, k = qk.unbind(-3)
    both = apply_lrpe(q, k, theta, positions, backend=backend)
    return [*(y.detach() for y in both), *torch.autograd.grad(both, (qk, theta) if learn else (qk,), dys)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, dim", ((3, 5), (4, 64), (4, 128), (1, 300)))
@pytest.mark.parametrize("tokens", (1, 700))
def test_it_is_its_definition_head_by_head(tokens, heads, dim, dtype):
    qk, positions = draw(2, tokens, 2, heads, dim).to(dtype), at(tokens)
    dys = [draw(2, tokens, heads, 2 * dim, seed=i).to(dtype) for i in (1, 2)]
    theta = theta_of(heads, dim)
    want = results(qk.double(), theta.double(), positions, [x.double() for x in dys], "torch")
    with poisoned_memory():
        got = results(qk, theta, positions, dys, "triton")
    errors = [relative_error(a, b, (-2,)) for a, b in zip(got[:3], want[:3], strict=True)]
    assert max(errors) <= TORCH_TOLERANCE[dtype]
    assert relative_error(got[3], want[3]) < 2e-6, "of theta, which is float32 and summed wider"


def test_angles_are_exact_far_away():
    theta = torch.cat((theta_of(4, 128).flatten(), draw(64), 10 * draw(64)))
    positions = torch.cat((at(4096, (0, FAR - 4096)).flatten(), 4093 * torch.arange(-256, 257, device="cuda")))
    angle = positions.double()[:, None] * theta.double()
    ones = torch.ones(len(positions), 1, len(theta), device="cuda")
    got = apply_lrpe(ones, ones, theta[None], positions, backend="triton")[1][:, 0]
    assert (got - torch.cat((angle.cos(), angle.sin()), -1)).abs().max() < 4e-7


def test_positions_and_gradients_are_read_where_they_lie():
    """Parts of one projection, packed documents, expanded gradients: no copy of any, and the same numbers."""
    wide, theta = draw(2, 1000, 4 * 8 * 128).bfloat16(), theta_of(8, 128)
    q, _, k, _ = (x.unflatten(-1, (8, 128)) for x in wide.chunk(4, -1))
    positions = (torch.arange(1000, device="cuda") % 300).expand(2, 1000)
    dy = torch.ones((), device="cuda").bfloat16().expand(2, 1000, 8, 256)
    q, k, before = q.requires_grad_(), k.requires_grad_(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both = apply_lrpe(q, k, theta, positions)
    assert torch.cuda.max_memory_allocated() - before < 2.1 * both[0].numel() * both[0].element_size()
    grads = torch.autograd.grad(both, (q, k), (dy, dy))
    dense = torch.stack((q, k), -3).contiguous()
    want = results(dense, theta, positions.contiguous(), [dy.contiguous()] * 2, "triton", learn=False)
    assert torch.equal(torch.stack(both), torch.stack(want[:2]))
    assert torch.equal(torch.stack(grads, -3), want[2])


def test_one_token_a_row_is_that_token_of_many():
    q, k, theta, positions = draw(2, 40, 4, 128).bfloat16(), draw(2, 40, 4, 128).bfloat16(), theta_of(4, 128), at(40)
    many = torch.stack(apply_lrpe(q, k, theta, positions, backend="triton"))
    one = torch.stack(apply_lrpe(q[:, 17], k[:, 17], theta, positions[:, 17], backend="triton"))
    assert torch.equal(one, many[:, :, 17])


@pytest.mark.parametrize("form", ("tnl", "tnl3"))
def test_the_layer_is_as_before_within_rounding(form, monkeypatch):
    """In float32 and near the first token: a shift of positions changes nothing, so that theta's gradient cancels.

    In bfloat16 both paths keep a tenth of it uncertain here, and more the further away.
    """
    torch.manual_seed(0)
    layer = LightningConfig(n_heads=4, head_dim=64, lrpe=True, form=form).build(256, 0, 4).to("cuda")
    x = draw(2, 200, 256)
    results = []
    for backends in (lrpe.BACKENDS, lrpe.BACKENDS[1:]):
        monkeypatch.setattr(lrpe, "BACKENDS", backends)
        layer.zero_grad()
        y, _ = layer(x, None, Segment(at(200, (0, 100))))
        y.float().square().sum().backward()
        results.append([y, *(p.grad for p in layer.parameters())])
    assert max(relative_error(a, b) for a, b in zip(*results, strict=True)) < 1e-2


def test_the_layer_compiles_without_a_graph_break():
    layer = LightningConfig(n_heads=4, head_dim=64, lrpe=True).build(256, 0, 4).to("cuda", torch.bfloat16)
    x, segment = draw(2, 200, 256).bfloat16(), Segment(at(200))
    want = layer(x, None, segment, return_state=False)[0]
    got = torch.compile(layer, fullgraph=True)(x, None, segment, return_state=False)[0]
    assert relative_error(got, want) < 1e-2
    got.float().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.parameters())


def test_runs_in_a_cuda_graph():
    x, theta, positions = draw(7, 4, 128).bfloat16(), theta_of(4, 128), torch.arange(7, device="cuda")
    apply_lrpe(x, x, theta, positions, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both = apply_lrpe(x, x, theta, positions, backend="triton")
    x.copy_(draw(7, 4, 128, seed=1))
    positions.add_(FAR)
    graph.replay()
    assert torch.equal(torch.stack(both), torch.stack(apply_lrpe(x, x, theta, positions, backend="triton")))
