"""The dispatcher: who is chosen, what a refusal says, and that torch.compile sees through it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from linattn.core.dispatch import Backend, BackendError, Call, anything, choose, describe, in_place
from linattn.mixers.taylor import taylor_attention


def call(**changes):
    base = Call("op", {"q": (1, 64, 2, 16)}, {"q": (2048, 32, 16, 1)}, torch.float32)
    return base._replace(**changes)


def only_hopper(c):
    reasons = [] if c.device == "cuda" else [f"needs a CUDA device, got {c.device}"]
    if c.capability is not None and c.capability < (9, 0):
        reasons.append("needs compute capability 9.0, this GPU has {}.{}".format(*c.capability))
    return reasons


FAST = Backend("fast", only_hopper, lambda: "fast")
SLOW = Backend("slow", anything, lambda: "slow")


@pytest.mark.parametrize(
    "changes, wanted, name",
    [
        ({}, None, "slow"),
        ({"device": "cuda", "capability": (9, 0)}, None, "fast"),
        ({"device": "cuda", "capability": (8, 0)}, None, "slow"),
        ({"device": "cuda", "capability": (9, 0)}, "slow", "slow"),
    ],
)
def test_the_first_that_does_not_refuse(changes, wanted, name):
    assert choose((FAST, SLOW), call(**changes), wanted).name == name


def test_a_named_backend_obeys_or_raises():
    with pytest.raises(BackendError, match="fast: needs a CUDA device, got cpu"):
        choose((FAST, SLOW), call(), "fast")
    with pytest.raises(ValueError, match=r"unknown backend 'fats'; choose from \['fast', 'slow'\]"):
        choose((FAST, SLOW), call(), "fats")


def test_an_error_prints_every_backends_reasons():
    with pytest.raises(BackendError) as error:
        choose((FAST, SLOW), call(dtype=torch.int64, device="cuda", capability=(8, 6)))
    text = str(error.value)
    assert "needs compute capability 9.0, this GPU has 8.6" in text
    assert "slow: needs floating-point inputs, got torch.int64" in text
    assert "q [1, 64, 2, 16]" in text


def test_describe_reads_shapes_strides_and_gradients():
    q = torch.zeros(1, 64, 3, 16).transpose(1, 2).requires_grad_()
    c = describe("op", {"q": q, "bias": None}, normalize=True)
    assert c.shapes == {"q": (1, 3, 64, 16)}
    assert c.strides == {"q": (3072, 16, 48, 1)}
    assert c.needs_grad
    assert c.options == {"normalize": True}
    with torch.no_grad():
        assert not describe("op", {"q": q}).needs_grad


def test_compiles_without_a_graph_break():
    q, k, v = (torch.randn(1, 200, 2, d) for d in (4, 4, 8))
    compiled = torch.compile(taylor_attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v)[0], taylor_attention(q, k, v)[0])
    cu = torch.tensor([0, 50, 200], dtype=torch.int32)
    torch.testing.assert_close(compiled(q, k, v, cu_seqlens=cu)[0], taylor_attention(q, k, v, cu_seqlens=cu)[0])


def test_what_is_written_past_the_dispatcher_says_so():
    """As a mutating operator's arguments do: autograd then refuses what it saved before."""
    state, weight = torch.zeros(2), torch.ones(2, requires_grad=True)
    y = (weight * state).sum()

    def body(x, state):
        state.numpy()[:] += x.numpy()  # as a kernel writes: torch does not see it
        return state.clone()

    assert torch.equal(in_place(pytest.fail, body, (state, None), torch.ones(2), state), torch.ones(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_mode_sees_the_operator():
    with FakeTensorMode():
        x = torch.ones(2)
        assert in_place(lambda x: x + 1, pytest.fail, (), x).shape == (2,)


def test_an_inference_tensor_has_no_version():
    with torch.inference_mode():
        state = torch.zeros(2)
        assert in_place(pytest.fail, lambda x: x.add_(1).clone(), (state,), state).sum() == 2
