"""The plain modules against definitions written out here, in float64, one section a file of ``linattn.nn``.

Expected values come from Python's ``math``, from explicit loops or from torch's own operators, never from the module
under test.

    pytest tests/test_nn.py
"""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

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
    apply_rotary,
    cross_entropy,
    cut_logits,
    make_norm,
    padded_vocab,
    rms_norm,
    rotary_angles,
    rotary_frequencies,
)

F64 = torch.float64
EXACT = 1e-12  # relative, float64


def normal(*shape, seed=0, dtype=F64, grad=False):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=F64, generator=generator).to(dtype).requires_grad_(grad)


def n_parameters(module):
    return sum(p.numel() for p in module.parameters())


# norm


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


# rotary


def test_rotary_frequencies_golden():
    full = rotary_frequencies(64)
    assert full.dtype == F64 and full.shape == (32,)
    want = torch.tensor([10000 ** (-2 * i / 64) for i in range(32)], dtype=F64)
    assert relative_error(full, want) < EXACT
    torch.testing.assert_close(full[[1, 8, 31]].tolist(), [0.7498942093324559, 0.1, 1.333521432163324e-4])


def test_rotary_frequencies_of_the_published_attention_baseline():
    got = rotary_frequencies(70, fraction=0.5)
    assert got.shape == (18,)
    want = torch.tensor([10000 ** (-2 * i / 35) for i in range(18)], dtype=F64)
    assert relative_error(got, want, keep=(0,)) < EXACT
    x = normal(1, 3, 2, 70)
    y = apply_rotary(x, *rotary_angles(torch.arange(1, 4), got, F64))
    assert torch.equal(y[..., 36:], x[..., 36:])
    assert (y[..., :36] != x[..., :36]).all()


@pytest.mark.parametrize("head_dim, fraction", [(64, 0.0), (64, 1.5), (7, 1.0), (1, 0.5)])
def test_rotary_refuses_what_it_cannot_rotate(head_dim, fraction):
    with pytest.raises(ValueError):
        Rotary(head_dim, fraction=fraction)


def test_rotary_turns_pairs_half_a_head_apart():
    x, positions, frequencies = normal(2, 5, 3, 8), torch.arange(10).view(2, 5) * 7, rotary_frequencies(8)
    want = torch.empty_like(x)
    for b in range(2):
        for t in range(5):
            for h in range(3):
                for i in range(4):
                    turn = complex(math.cos(a := int(positions[b, t]) * 10000 ** (-2 * i / 8)), math.sin(a))
                    turned = complex(x[b, t, h, i], x[b, t, h, i + 4]) * turn
                    want[b, t, h, i], want[b, t, h, i + 4] = turned.real, turned.imag
    got = apply_rotary(x, *rotary_angles(positions, frequencies, F64))
    assert relative_error(got, want) < EXACT


def test_rotary_module_is_its_functions_and_keeps_dtypes():
    q, k = normal(2, 5, 4, 8, dtype=torch.bfloat16), normal(2, 5, 2, 8, seed=1, dtype=torch.float32)
    positions = torch.arange(5)
    rotary = Rotary(8, base=500.0)
    got_q, got_k = rotary(q, k, positions)
    cos, sin = rotary_angles(positions, rotary_frequencies(8, 500.0))
    assert got_q.dtype == torch.bfloat16 and got_k.dtype == torch.float32
    assert torch.equal(got_q, apply_rotary(q.float(), cos, sin).bfloat16())
    assert torch.equal(got_k, apply_rotary(k, cos, sin))
    assert not list(rotary.parameters()) and not list(rotary.buffers())


def test_rotary_of_one_token_a_row_is_that_of_the_sequence():
    x, positions = normal(3, 6, 2, 8), torch.arange(18).view(3, 6)
    cos, sin = Rotary(8).angles(positions, F64)
    whole = apply_rotary(x, cos, sin)
    assert torch.equal(apply_rotary(x[:, 4], cos[:, 4], sin[:, 4]), whole[:, 4])


def test_rotary_scores_depend_on_the_distance_alone():
    rotary, q, k = Rotary(16), normal(1, 1, 1, 16), normal(1, 1, 1, 16, seed=1)

    def score(at_q, at_k):
        turned_q, _ = rotary(q, q, torch.tensor([[at_q]]))
        turned_k, _ = rotary(k, k, torch.tensor([[at_k]]))
        return (turned_q * turned_k).sum()

    torch.testing.assert_close(score(100, 93), score(7, 0), rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(score(1_000_000, 999_993), score(7, 0), rtol=1e-8, atol=1e-8)
    assert abs(score(7, 0) - score(8, 0)) > 0.01


def test_rotary_angles_are_right_at_a_million():
    positions = torch.tensor([999_872, 999_937, 1_000_000])
    angles = [[p * 10000 ** (-2 * i / 64) for i in range(32)] for p in positions.tolist()]
    want_cos = torch.tensor([[math.cos(a) for a in row] for row in angles], dtype=F64)
    want_sin = torch.tensor([[math.sin(a) for a in row] for row in angles], dtype=F64)
    tolerance = 5e-7  # a float32 angle in one turn, and float32's own cosine
    cos, sin = rotary_angles(positions, rotary_frequencies(64))
    assert cos.dtype == sin.dtype == torch.float32
    assert (cos.double() - want_cos).abs().max() < tolerance
    assert (sin.double() - want_sin).abs().max() < tolerance
    in_float32 = positions.float()[:, None] * rotary_frequencies(64).float()
    assert (in_float32.cos().double() - want_cos).abs().max() > 1e4 * tolerance


def test_rotary_gradients_and_refusals():
    cos, sin = Rotary(6, fraction=0.5).angles(torch.arange(3), F64)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, cos, sin), (normal(1, 3, 2, 6, grad=True),))
    with pytest.raises(ValueError, match="positions are torch.float32"):
        rotary_angles(torch.arange(3.0), rotary_frequencies(4))
    with pytest.raises(ValueError, match="float64 of rotary_frequencies"):
        rotary_angles(torch.arange(3), rotary_frequencies(4).float())
    with pytest.raises(ValueError, match="rotate 4 features"):
        apply_rotary(torch.ones(1, 3, 1, 3), *rotary_angles(torch.arange(3), rotary_frequencies(4)))


# LRPE


def test_lrpe_starts_at_the_published_values():
    lrpe = LRPE(n_heads=8, head_dim=128)
    assert lrpe.theta.shape == (8, 1, 128) and n_parameters(lrpe) == 1024
    want = torch.tensor([10000 ** (-2 * i / 1024) for i in range(1024)], dtype=F64).view(8, 1, 128)
    assert torch.equal(lrpe.theta.detach(), want.float())


def test_lrpe_is_its_definition():
    lrpe = LRPE(3, 4).double()
    theta = lrpe.theta.detach()
    x, positions = normal(2, 5, 3, 4), torch.arange(10).view(2, 5) * 11
    want = torch.empty(2, 5, 3, 8, dtype=F64)
    for b in range(2):
        for t in range(5):
            for h in range(3):
                for i in range(4):
                    angle = float(theta[h, 0, i]) * int(positions[b, t])
                    want[b, t, h, i] = float(x[b, t, h, i]) * math.cos(angle)
                    want[b, t, h, i + 4] = float(x[b, t, h, i]) * math.sin(angle)
    both = lrpe(x, 2 * x, positions)
    assert max(relative_error(both[0], want), relative_error(both[1], 2 * want)) < EXACT
    assert relative_error(lrpe(x.float(), x.float(), positions)[1], want) < 1e-6
    assert {y.dtype for y in lrpe(x.bfloat16(), x.bfloat16(), positions)} == {torch.bfloat16}


def test_lrpe_products_depend_on_the_distance_alone_at_a_million():
    lrpe = LRPE(1, 16)
    q, k = normal(1, 1, 1, 16, dtype=torch.float32), normal(1, 1, 1, 16, seed=1, dtype=torch.float32)

    def score(at_q, at_k):
        return (lrpe(q, k, torch.tensor([[at_q]]))[0] * lrpe(q, k, torch.tensor([[at_k]]))[1]).sum()

    cosines = (lrpe.theta[0, 0].double() * 9).cos()
    want = (q.double() * k.double() * cosines).sum()
    assert abs(score(1_000_000, 999_991) - want) < 2e-6
    assert abs(score(9, 0) - want) < 2e-6


def test_lrpe_gradients():
    lrpe = LRPE(2, 3).double()
    q, k = (normal(1, 4, 2, 3, seed=i, grad=True) for i in range(2))
    positions = torch.arange(4)[None]

    def run(q, k, theta):
        return torch.func.functional_call(lrpe, {"theta": theta}, (q, k, positions))

    def theta_grad(lrpe, dtype):
        return torch.autograd.grad(flat(lrpe(q.to(dtype), k.to(dtype), positions)).sum(), lrpe.theta)[0]

    assert torch.autograd.gradcheck(run, (q, k, lrpe.theta.detach().clone().requires_grad_()))
    grad, want = theta_grad(LRPE(2, 3), torch.float32), theta_grad(lrpe, F64)
    assert relative_error(grad, want) < 1e-6


def test_lrpe_refuses_other_heads():
    with pytest.raises(ValueError, match="this LRPE is for"):
        LRPE(2, 3)(torch.ones(1, 4, 3, 2), torch.ones(1, 4, 3, 2), torch.arange(4))


# mlp


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


# embedding


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


# loss

N, D, V, VOCAB = 23, 6, 16, 13


def loss_case(seed=0, dtype=F64):
    hidden = normal(N, D, seed=seed, dtype=dtype, grad=True)
    weight = normal(V, D, seed=seed + 1, dtype=dtype, grad=True)
    targets = torch.randint(0, VOCAB, (N,), generator=torch.Generator().manual_seed(seed))
    targets[[0, 7, 8, 22]] = -100
    return hidden, weight, targets


def torch_loss(hidden, weight, targets, reduction, vocab_size=VOCAB):
    return F.cross_entropy((hidden @ weight.T)[:, :vocab_size], targets, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk", [None, 1, 5, 23, 100])
@pytest.mark.parametrize("vocab_size", [VOCAB, None])
def test_loss_is_torchs(reduction, chunk, vocab_size):
    hidden, weight, targets = loss_case()
    got = cross_entropy(hidden, weight, targets, vocab_size=vocab_size, chunk=chunk, reduction=reduction)
    want = torch_loss(hidden, weight, targets, reduction, vocab_size or V)
    assert relative_error(got, want) < EXACT
    incoming = normal(*want.shape, seed=5)
    got_grads = torch.autograd.grad(got, (hidden, weight), incoming)
    want_grads = torch.autograd.grad(want, (hidden, weight), incoming)
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        assert relative_error(got_grad, want_grad, keep=(0,)) < EXACT
    with torch.no_grad():
        again = cross_entropy(hidden, weight, targets, vocab_size=vocab_size, chunk=chunk, reduction=reduction)
    assert relative_error(again, want) < EXACT


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_gradcheck_and_a_second_backward(reduction):
    hidden, weight, targets = loss_case()

    def run(hidden, weight):
        return cross_entropy(hidden, weight, targets, vocab_size=VOCAB, chunk=5, reduction=reduction)

    assert torch.autograd.gradcheck(run, (hidden, weight))
    loss = run(hidden, weight).sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("chunk", [None, 5])
def test_loss_gives_padding_and_ignored_rows_no_gradient(chunk):
    hidden, weight, targets = loss_case()
    cross_entropy(hidden, weight, targets, vocab_size=VOCAB, chunk=chunk).backward()
    assert (weight.grad[VOCAB:] == 0).all() and (weight.grad[:VOCAB] != 0).all()
    assert torch.equal((hidden.grad == 0).all(1), targets == -100)


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_of_nothing_is_zero(chunk, reduction):
    hidden, weight, targets = loss_case()
    loss = cross_entropy(hidden, weight, torch.full_like(targets, -100), chunk=chunk, reduction=reduction)
    loss.sum().backward()
    assert (loss == 0).all() and (hidden.grad == 0).all() and (weight.grad == 0).all()
    empty = cross_entropy(hidden[:0], weight, targets[:0], chunk=chunk, reduction=reduction)
    assert empty.sum() == 0


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_loss_leaves_a_frozen_tensor_alone(chunk, reduction):
    hidden, weight, targets = loss_case()
    want = torch.autograd.grad(torch_loss(hidden, weight, targets, "sum"), (hidden, weight))
    for i in range(2):
        tensors = [hidden.detach(), weight.detach()]
        tensors[i].requires_grad_()
        cross_entropy(*tensors, targets, vocab_size=VOCAB, chunk=chunk, reduction=reduction).sum().backward()
        assert relative_error(tensors[i].grad, want[i]) < EXACT
        assert tensors[1 - i].grad is None


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_loss_in_low_precision(chunk, dtype, tolerance):
    hidden, weight, targets = loss_case(dtype=dtype)
    got = cross_entropy(hidden, weight, targets, vocab_size=VOCAB, chunk=chunk)
    want = torch_loss(hidden.double(), weight.double(), targets, "mean")
    assert got.dtype == torch.float32
    assert relative_error(got, want) < tolerance
    got_grads = torch.autograd.grad(got, (hidden, weight))
    want_grads = torch.autograd.grad(want, (hidden, weight))
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        assert got_grad.dtype == dtype
        assert relative_error(got_grad, want_grad) < tolerance


def test_loss_in_bf16_sums_the_weights_gradient_in_float32():
    # 4,096 rows that all push one way: a bfloat16 sum would stop growing at 256 of them.
    hidden = torch.ones(4096, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    cross_entropy(hidden, weight, torch.zeros(4096, dtype=torch.int64), chunk=1, reduction="sum").backward()
    assert weight.grad.flatten().tolist() == [-2048.0, 2048.0]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_under_autocast_is_that_of_cast_tensors(reduction):
    hidden, weight, targets = loss_case(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(hidden, weight, targets, chunk=5, reduction=reduction)
    grads = torch.autograd.grad(loss.sum(), (hidden, weight))
    cast = cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets, chunk=5, reduction=reduction)
    cast_grads = torch.autograd.grad(cast.sum(), (hidden, weight))
    assert loss.dtype == torch.float32 and torch.equal(loss, cast)
    assert all(g.dtype == torch.float32 for g in grads)
    assert all(torch.equal(a, b) for a, b in zip(grads, cast_grads, strict=True))


class LargestTensor(TorchDispatchMode):
    """Notes the most elements of any tensor that an operator gives back."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *(t.numel() for t in tensors)])
        return out


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_in_chunks_never_holds_all_logits(reduction):
    n, d, v, chunk = 96, 4, 50, 8
    hidden, weight = normal(n, d, grad=True), normal(v, d, seed=1, grad=True)
    targets = torch.arange(n) % v

    def largest(chunk):
        saved = []
        with (
            LargestTensor() as seen,
            torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t),
        ):
            cross_entropy(hidden, weight, targets, chunk=chunk, reduction=reduction).sum().backward()
        return seen.elements, max(saved)

    assert largest(None) == (n * v, n * v)  # the measure sees the logits where they are
    assert largest(chunk) == (chunk * v, n * d)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": torch.ones(2, 3, 4)}, "flatten B and T"),
        ({"weight": torch.ones(5, 3)}, "must be \\[N, D\\]"),
        ({"weight": torch.ones(5, 4, dtype=F64)}, "cast one"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "needs torch.int64 \\[2\\]"),
        ({"targets": torch.zeros(2, dtype=torch.int32)}, "torch.int32"),
        ({"targets": torch.tensor([0, 5])}, "target 5 is outside 0 to 4"),
        ({"targets": torch.tensor([0, -1])}, "target -1"),
        ({"targets": torch.tensor([0, 3]), "vocab_size": 3}, "target 3 is outside 0 to 2"),
        ({"vocab_size": 6}, "1 to the weight's 5 rows"),
        ({"chunk": 0}, "chunk is 0"),
        ({"reduction": "max"}, "'max' is not one of"),
    ],
)
def test_loss_refuses(change, message):
    call = {"hidden": torch.ones(2, 4), "weight": torch.ones(5, 4), "targets": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        cross_entropy(**(call | change))


# all of them: torch.compile, the meta device

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


def flat(out):
    return torch.cat([t.flatten() for t in (out if isinstance(out, tuple) else (out,))])


@pytest.mark.parametrize("name", MODULES)
def test_compiles_whole(name):
    make, args = MODULES[name]
    module = make()
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(flat(compiled(*args)), flat(module(*args)))


# Dynamo instantiates autograd.Function and so trips torch's own warning against that.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunk", [None, 8])
def test_loss_compiles_whole(reduction, chunk):
    hidden, weight, targets = loss_case()

    def run(hidden, weight):
        return cross_entropy(hidden, weight, targets, vocab_size=VOCAB, chunk=chunk, reduction=reduction).sum()

    torch.compiler.reset()
    got = torch.compile(run, fullgraph=True, backend="eager")(hidden, weight)
    want = run(hidden, weight)
    assert relative_error(got, want) < EXACT
    got_grads = torch.autograd.grad(got, (hidden, weight))
    want_grads = torch.autograd.grad(want, (hidden, weight))
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        assert relative_error(got_grad, want_grad) < EXACT


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
