"""Rotary embeddings and LRPE: angles, their precision far away, and what is refused."""

import math

import pytest
import torch
from nn_shared import EXACT, F64, flat, n_parameters, normal

from linattn.core.numerics import relative_error
from linattn.nn import LRPE, Rotary, apply_rotary, rotary_angles, rotary_frequencies


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
