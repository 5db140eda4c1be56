"""The loss in chunks is torch's, in values, gradients and what it holds in memory."""

import pytest
import torch
from nn_shared import EXACT, F64, normal
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from linattn.core.numerics import relative_error
from linattn.nn import cross_entropy

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
