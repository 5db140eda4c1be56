"""The plain modules against definitions written out here, in float64; positions and the loss have files of their own.

Expected values come from Python's ``math``, from explicit loops or from torch's own operators, never from the module
under test.

    pytest tests/test_nn.py
"""

import math

import pytest
import torch
from nn_shared import EXACT, F64, flat, n_parameters, normal

from linattn.core.numerics import relative_error
from linattn.nn import (
    LRPE,
    SGLU,
    Embedding,
    Head,
    Linear,
    RMSNorm,
    Rotary,
    SimpleRMSNorm,
    SwiGLU,
    cut_logits,
    make_norm,
    padded_vocab,
    rms_norm,
)


def rms_by_loop(x, weight, eps):
    rows = [[float(v) for v in row] for row in x]
    scales = [math.sqrt(sum(v * v for v in row) / len(row) + eps) for row in rows]
    return torch.tensor(
        [[v / s * float(w) for v, w in zip(row, weight, strict=True)] for row, s in zip(rows, scales, strict=True)],
        dtype=F64,
    )


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.5])
def test_norm_is_its_definition(eps):
    x, weight = normal(5, 7), normal(7, seed=1)
    assert relative_error(rms_norm(x, weight, eps), rms_by_loop(x, weight, eps)) < EXACT
    norm = RMSNorm(7, eps).double()
    norm.weight.data = weight
    assert relative_error(norm(x), rms_by_loop(x, weight, eps)) < EXACT
    assert relative_error(SimpleRMSNorm(7, eps)(x), rms_by_loop(x, torch.ones(7), eps)) < EXACT


def test_norm_gradients():
    x, weight = normal(3, 5, grad=True), normal(5, seed=1, grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (x, weight))
    assert torch.autograd.gradcheck(SimpleRMSNorm(5), (x,))


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_norm_in_bf16_rounds_once_and_keeps_the_inputs_dtype(weight_dtype):
    x, weight = normal(64, 1000, dtype=torch.bfloat16), normal(1000, seed=1, dtype=weight_dtype)
    norm = RMSNorm(1000).to(weight_dtype)
    norm.weight.data = weight
    got, want = norm(x), rms_by_loop(x, weight, 1e-5)
    assert got.dtype == torch.bfloat16
    assert ((got.double() - want).abs() <= 2.0**-8 * want.abs() * 1.001).all()  # half a unit in bfloat16's last place


def test_norm_of_large_half_precision_does_not_overflow():
    x = torch.full((1, 8), 1000.0, dtype=torch.float16)  # the square is above float16's 65,504
    assert (SimpleRMSNorm(8)(x) == 1).all()


def test_make_norm():
    assert [type(make_norm(kind, 4)) for kind in ("rms", "simple")] == [RMSNorm, SimpleRMSNorm]
    assert (make_norm("rms", 4).eps, make_norm("simple", 4).eps, make_norm("simple", 4, 0.1).eps) == (1e-5, 1e-6, 0.1)
    assert (n_parameters(make_norm("rms", 4)), n_parameters(make_norm("simple", 4))) == (4, 0)
    with pytest.raises(ValueError, match="'layer' is not one of"):
        make_norm("layer", 4)


@pytest.mark.parametrize("kind", ["rms", "simple"])
def test_norm_of_the_wrong_width_is_refused(kind):
    with pytest.raises(ValueError, match=r"\[2, 5\]"):
        make_norm(kind, 4)(torch.ones(2, 5))


@pytest.mark.parametrize("order", ["value_gate", "gate_value"])
def test_swiglu_is_its_definition(order):
    mlp = SwiGLU(4, 6, order=order).double()
    first, second = mlp.fc1.weight[:6], mlp.fc1.weight[6:]
    value, gate = (first, second) if order == "value_gate" else (second, first)
    x = normal(2, 3, 4)
    g = x @ gate.T
    want = (g / (1 + torch.exp(-g)) * (x @ value.T)) @ mlp.fc2.weight.T
    assert relative_error(mlp(x), want) < EXACT


def test_swiglu_order_matters_and_is_checked():
    a, b = SwiGLU(4, 6).double(), SwiGLU(4, 6, order="gate_value").double()
    b.load_state_dict(a.state_dict())
    assert relative_error(a(normal(3, 4)), b(normal(3, 4))) > 0.1
    with pytest.raises(ValueError, match="'first' is not one of"):
        SwiGLU(4, 6, order="first")


def test_sglu_is_its_definition():
    mlp = SGLU(4, 6).double()
    x = normal(2, 3, 4)
    want = ((x @ mlp.l1.weight.T) * (x @ mlp.l2.weight.T)) @ mlp.l3.weight.T
    assert relative_error(mlp(x), want) < EXACT


def test_glu_sizes_are_the_published_ones():
    with torch.device("meta"):
        assert n_parameters(SwiGLU(1024, 2048)) == 6_291_456  # Based 360M
        assert n_parameters(SwiGLU(1792, 3584)) == 19_267_584  # Based 1.3B
        assert n_parameters(SGLU(1024, 2816)) == 8_650_752  # TransNormerLLM 385M
        assert n_parameters(SwiGLU(4, 6, bias=True)) == 4 * 12 + 12 + 6 * 4 + 4


@pytest.mark.parametrize("kind", [SwiGLU, SGLU])
def test_glu_gradients(kind):
    assert torch.autograd.gradcheck(kind(3, 4).double(), (normal(2, 3, grad=True),))


def test_padded_vocab():
    assert [padded_vocab(50257, 8), padded_vocab(50257, 16), padded_vocab(64000, 8)] == [50264, 50272, 64000]
    assert padded_vocab(1, 1) == 1
    with pytest.raises(ValueError, match="vocab_size is 0"):
        padded_vocab(0, 8)


def test_embedding_looks_up_and_scales():
    plain, scaled = Embedding(10, 4), Embedding(10, 4, scale=2.0)
    assert plain.weight.shape == (16, 4)
    scaled.load_state_dict(plain.state_dict())
    ids = torch.tensor([[0, 9, 3]])
    assert torch.equal(plain(ids), plain.weight[ids])
    assert torch.equal(scaled(ids), 2 * plain.weight[ids])


def test_embedding_init_has_the_published_deviation():
    torch.manual_seed(0)
    std = Embedding(1000, 64).weight.std()
    assert abs(std - 0.02) < 5 * 0.02 / math.sqrt(2 * 64_000)  # five standard errors


@pytest.mark.parametrize("wrong", [-1, 10, 15, 16])
def test_embedding_refuses_ids_that_are_no_tokens(wrong):
    with pytest.raises(ValueError, match=f"token id {wrong} is outside 0 to 9"):
        Embedding(10, 4)(torch.tensor([[1, wrong]]))


def test_embedding_reserved_ids_are_legal_inputs():
    embedding = Embedding(10, 4, reserved_ids=(15,))
    assert torch.equal(embedding(torch.tensor([15])), embedding.weight[[15]])
    with pytest.raises(ValueError, match="token id 14"):
        embedding(torch.tensor([15, 14]))
    with pytest.raises(ValueError, match="not a padded row; those are 10 to 15"):
        Embedding(10, 4, reserved_ids=(9,))


def test_head_never_answers_with_a_padded_row():
    head = Head(10, 4).double()
    with torch.no_grad():
        head.weight[10:] = 1e6
    x = normal(2, 3, 4)
    assert head(x).shape == (2, 3, 10)
    assert relative_error(head(x), x @ head.weight[:10].T) < EXACT
    assert cut_logits(torch.ones(3, 16), 10).shape == (3, 10)
    with pytest.raises(ValueError, match="at least 10"):
        cut_logits(torch.ones(3, 9), 10)


def test_head_tied_to_the_embedding():
    embedding, head = Embedding(10, 4).double(), Head(10, 4, tied=True)
    assert n_parameters(head) == 0 and not head.state_dict()
    x = normal(3, 4)
    assert torch.equal(head(x, embedding.weight), (x @ embedding.weight.T)[:, :10])
    head(x, embedding.weight).sum().backward()
    assert embedding.weight.grad is not None
    with pytest.raises(ValueError, match="this head is tied"):
        head(x)
    with pytest.raises(ValueError, match="its own weight"):
        Head(10, 4)(x, embedding.weight)


IDS = torch.tensor([[1, 5, 2]])
X = torch.linspace(-1, 1, 24).view(1, 3, 8)
HEADS = X.view(1, 3, 2, 4)
MODULES = {
    "rms": (lambda: RMSNorm(8), (X,)),
    "simple": (lambda: SimpleRMSNorm(8), (X,)),
    "rotary": (lambda: Rotary(4), (HEADS, HEADS, torch.arange(3))),
    "lrpe": (lambda: LRPE(2, 4), (HEADS, HEADS, torch.arange(3)[None])),
    "swiglu": (lambda: SwiGLU(8, 6), (X,)),
    "sglu": (lambda: SGLU(8, 6), (X,)),
    "embedding": (lambda: Embedding(10, 8), (IDS,)),
    "head": (lambda: Head(10, 8), (X,)),
}


@pytest.mark.parametrize("name", MODULES)
def test_compiles_whole(name):
    make, args = MODULES[name]
    module = make()
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(flat(compiled(*args)), flat(module(*args)))


@pytest.mark.parametrize("name", MODULES)
def test_built_on_meta_it_is_the_module_built_here(name):
    make, args = MODULES[name]
    with torch.device("meta"):
        module = make()
    assert all(p.is_meta for p in module.parameters())
    module.to_empty(device="cpu")
    torch.manual_seed(0)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    torch.manual_seed(0)
    assert torch.equal(flat(module(*args)), flat(make()(*args)))


@pytest.mark.parametrize("rows", [(), (1,), (2,), (1, 3), (1, 1, 1), (4,), (0,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outputs", [1032, 1030])
def test_linear_is_torchs_for_any_number_of_rows(rows, bias, outputs):
    """One to three rows of a large fp32 weight go another way on a CPU; one row, where 8 divides the outputs."""
    torch.manual_seed(0)
    ours, theirs = Linear(1024, outputs, bias=bias), torch.nn.Linear(1024, outputs, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(*rows, 1024)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        half = ours.bfloat16()(x.bfloat16())
        torch.testing.assert_close(half, theirs.bfloat16()(x.bfloat16()))
    x = x.double().requires_grad_()
    assert ours.double()(x).grad_fn is not None
