"""Lightning attention's Triton backend as torch sees it, without triton: refusals in words, schemas and fakes."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from linattn.core import tiles
from linattn.core.dispatch import Call, choose
from linattn.mixers.lightning import BACKENDS, operators


def call(
    dtype=torch.bfloat16, dim=128, op="lightning_attention", device="cuda", capability=(9, 0), stride=None, rows=2
):
    shape = (rows, 100, 4, dim)
    strides = stride or (100 * 4 * dim, 4 * dim, dim, 1)
    shapes, strides = (dict.fromkeys(("q", "k", "v"), x) for x in (shape, strides))
    return Call("lightning_attention", shapes, strides, dtype, device, capability)


@pytest.fixture
def triton_is_here(monkeypatch):
    monkeypatch.setattr(tiles, "TRITON_VERSION", (3, 6))


@pytest.mark.parametrize(
    "refused, reason",
    [
        (call(device="cpu", capability=None), "the inputs are on cpu"),
        (call(dtype=torch.float32), "bfloat16 or float16"),
        (call(dim=100), "multiples of 8"),
        (call(dim=512), "up to 256"),
        (call(capability=(7, 5)), "compute capability 8.0"),
        (call(stride=(1, 2, 3, 1)), "multiples of 16 bytes"),
        (call(stride=(8, 8, 8, 2)), "contiguous along its last axis"),
        (call(rows=70_000), "at most 60000 rows"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refusals(triton_is_here, refused, reason):
    assert any(reason in words for words in operators.refuses(refused))
    fallback = [b.name for b in BACKENDS if not b.refuses(refused)]
    assert fallback == (["torch"] if refused.dtype.is_floating_point else [])


def test_what_is_not_refused(triton_is_here):
    packed_qkv = (100 * 3 * 4 * 128, 3 * 4 * 128, 128, 1)
    for fine in (call(), call(dtype=torch.float16, capability=(8, 0)), call(dim=96), call(stride=packed_qkv)):
        assert choose(BACKENDS, fine).name == "triton"


def test_without_triton(monkeypatch):
    monkeypatch.setattr(tiles, "TRITON_VERSION", None)
    assert any("pip install triton" in words for words in operators.refuses(call()))
    monkeypatch.setattr(tiles, "TRITON_VERSION", (3, 2))
    assert any("3.4 or newer, found 3.2" in words for words in operators.refuses(call()))


@pytest.mark.parametrize("packed", (False, True), ids=("rows", "packed"))
def test_fakes_have_the_shapes_of_outputs(packed):
    """q has more heads than the State, which has more than k."""
    with FakeTensorMode():
        B, T, K, V = (1 if packed else 2), 50, 64, 32
        q, k = torch.empty(B, T, 4, K, dtype=torch.bfloat16), torch.empty(B, T, 1, K, dtype=torch.bfloat16)
        v, log_decay = torch.empty(B, T, 2, V, dtype=torch.bfloat16), torch.empty(2)
        cu = torch.empty(4, dtype=torch.int32) if packed else None
        N = 3 if packed else B
        initial = torch.empty(N, 2, K, V)
        o, S = operators.lightning_forward(q, k, v, log_decay, 1.0, initial, cu, True)
        assert (o.shape, o.dtype, S.shape, S.dtype) == ((B, T, 4, V), torch.bfloat16, (N, 2, K, V), torch.float32)
        assert operators.lightning_forward(q, k, v, log_decay, 1.0, None, cu, False)[1].shape[0] == 0
        grads = operators.lightning_backward(o, S, q, k, v, log_decay, 1.0, initial, cu, True)
        assert [g.shape for g in grads] == [x.shape for x in (q, k, v, log_decay, initial)]
        grads = operators.lightning_backward(o, None, q, k, v, log_decay, 1.0, None, cu, False)
        assert (grads[3].numel(), grads[4].numel()) == (0, 0)
