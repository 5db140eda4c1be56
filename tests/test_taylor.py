"""What is particular to Taylor attention: its features, its count, and what it refuses."""

import pytest
import torch

from linattn.core.numerics import relative_error
from linattn.mixers.prefix import prefix_attention
from linattn.mixers.taylor import MIXER, TaylorState, features, n_features, taylor_attention
from linattn.mixers.taylor.reference import features_153, features_273, taylor_reference


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dim, count", [(8, 45), (16, 153), (24, 325), (32, 561)])
def test_both_feature_maps_are_the_polynomial(dim, count):
    q, k = draw(50, dim), draw(50, dim, seed=1)
    s = q @ k.T
    want = 1 + s + s * s / 2
    for phi in (features_273, features_153, features):
        assert relative_error(phi(q) @ phi(k).T, want) < 1e-14
    assert features(q).shape[-1] == n_features(dim) == count
    assert features_273(q).shape[-1] == 1 + dim + dim * dim
    assert relative_error(features(q), features_153(q), (1,)) < 1e-15


def test_the_order_of_features_is_public():
    x = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    root = 2**0.5
    want = [1, 2, 3, 5, 4 / root, 6, 10, 9 / root, 15, 25 / root]
    torch.testing.assert_close(features(x), torch.tensor(want, dtype=torch.float64))


def test_the_features_of_one_vector():
    x = torch.randn(3, 16)
    torch.testing.assert_close(torch.stack([features(row) for row in x]), features(x))


def test_the_state_of_273_features_gives_the_same_outputs():
    """The published 273 form folded to a State and read, against ours."""
    q, k, v = draw(1, 40, 1, 16), draw(1, 40, 1, 16, seed=1), draw(1, 40, 1, 8, seed=2)
    fq, fk = features_273(q[0, :, 0] / 4), features_273(k[0, :, 0])
    S, z = torch.zeros(273, 8, dtype=torch.float64), torch.zeros(273, dtype=torch.float64)
    ys = []
    for t in range(40):
        S, z = S + fk[t, :, None] * v[0, t, 0], z + fk[t]
        ys.append(fq[t] @ S / (fq[t] @ z))
    got, _ = taylor_attention(q, k, v)
    assert relative_error(got[0, :, 0], torch.stack(ys)) < 1e-13


@pytest.mark.parametrize("tokens", [1_000, 70_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_count_is_exact(tokens, dtype):
    """With k = 0 the first feature counts tokens; 16-bit sums stop at 256, and 1,000 is past that."""
    k, v = torch.zeros(1, tokens, 1, 4, dtype=dtype), torch.ones(1, tokens, 1, 1, dtype=dtype)
    y, state = taylor_attention(k, k, v)
    assert float(state.z[0, 0, 0]) == float(state.S[0, 0, 0, 0]) == tokens
    assert state.z.dtype == torch.float32
    assert torch.equal(y, torch.ones_like(y))


def test_decoding_counts_past_256_in_bf16():
    pool = MIXER.new_pool(TaylorState(torch.zeros(1, 1, 15, 1), torch.zeros(1, 1, 15)), 1)
    x, v, slot = torch.zeros(1, 1, 4).bfloat16(), torch.ones(1, 1, 1).bfloat16(), torch.zeros(1, dtype=torch.int32)
    for _ in range(600):
        y = MIXER.step_({"q": x, "k": x, "v": v}, pool, slot)
    assert float(pool.z[0, 0, 0]) == 600
    assert float(y) == 1


def test_weights_stay_positive_in_16_bits():
    """q and k of std 3: rounded features can make a weight negative; scores in fp32 cannot (weights >= 1/2)."""
    for seed in range(5):
        q, k = (3 * draw(1, 4, 64, 16, seed=seed + i) for i in (0, 100))
        v = torch.ones(1, 4, 64, 1, dtype=torch.float64)
        y, _ = taylor_attention(*(x.bfloat16() for x in (q, k, v)), normalize=False)
        want, _ = taylor_reference(*(x.bfloat16().double() for x in (q, k, v)), normalize=False)
        assert (y > 0).all()
        assert relative_error(y, want, (1, 2)) < 1e-2


def test_memory_of_a_forward_pass_does_not_grow_with_the_features():
    """No tensor of T x 153 x H is made: the largest is a block's."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return out

    T, H = 16384, 2
    q, k, v = torch.randn(1, T, H, 16), torch.randn(1, T, H, 16), torch.randn(1, T, H, 64)
    with torch.no_grad(), Largest():
        taylor_attention(q, k, v)
    assert largest <= max(v.numel(), 2048 * 153)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v: (q[0], k, v), r"q must be \[B, T, H, D\], got \[10, 2, 4\]"),
        (lambda q, k, v: (q, k[:, 1:], v), "B and T must agree"),
        (lambda q, k, v: (q, k.float(), v), "must share dtype and device"),
        (lambda q, k, v: (q[..., 1:], k, v), "one head dim, got 3 and 4"),
        (lambda q, k, v: (q, k, v[:, :, [0, 1, 0]]), "q has 2 heads, which does not divide 3"),
        (lambda q, k, v: (q.long(), k.long(), v.long()), "must be floating point, got torch.int64"),
    ],
)
def test_wrong_inputs(change, message):
    q, k, v = draw(1, 10, 2, 4), draw(1, 10, 2, 4), draw(1, 10, 2, 3)
    with pytest.raises(ValueError, match=message):
        taylor_attention(*change(q, k, v))


@pytest.mark.parametrize(
    "cu, message",
    [
        ([0, 5], "must run from 0 to the 10 tokens given, got 0 to 5"),
        ([0, 7, 3, 10], "must not decrease: entry 1 is 7, entry 2 is 3"),
        ([10], r"int32 or int64 of shape \[N\+1\]"),
    ],
)
def test_wrong_documents(cu, message):
    q, k, v = draw(1, 10, 2, 4), draw(1, 10, 2, 4), draw(1, 10, 2, 3)
    with pytest.raises(ValueError, match=message):
        taylor_attention(q, k, v, cu_seqlens=torch.tensor(cu, dtype=torch.int32))


@pytest.mark.parametrize("group", [1, 2])
def test_a_huge_key_leaves_the_past_as_it_is(group):
    q, k, v = (draw(1, 140, heads, 4, seed=i).float() for i, heads in enumerate((2 * group, 2, 2)))
    want, _ = taylor_attention(q, k, v)
    huge = k.clone()
    huge[:, 135] = 1e20
    got, _ = taylor_attention(q, huge, v)
    assert torch.equal(got[:, :135], want[:, :135])


def test_lengths_of_prefixes():
    q, k, v = draw(1, 10, 2, 4), draw(1, 10, 2, 4), draw(1, 10, 2, 3)
    cu = torch.tensor([0, 3, 10])

    def read(lengths):
        return prefix_attention(q, k, v, k, v, prefix_lengths=lengths, cu_prefix=cu, cu_seqlens=cu)

    read(torch.tensor([3, 7]))
    for lengths, message in (
        (torch.tensor([4, 7]), "0 to 3 in row 0, its prefix, got 4"),
        (torch.tensor([3, -1]), "0 to 7 in row 1, its prefix, got -1"),
        (torch.tensor([3.0, 7.0]), r"int32 or int64 \[2\], got torch.float32 \[2\]"),
        ([3, 7], r"an int tensor \[2\], got \[3, 7\]"),
    ):
        with pytest.raises(ValueError, match=message):
            read(lengths)
    with pytest.raises(ValueError, match="cu_prefix must be an int32 tensor"):
        prefix_attention(q, k, v, k, v, cu_prefix=[0, 3, 10], cu_seqlens=cu)


def test_wrong_states():
    q, k, v = draw(2, 10, 2, 4), draw(2, 10, 2, 4), draw(2, 10, 2, 3)
    _, state = taylor_attention(q, k, v)
    with pytest.raises(ValueError, match=r"initial_state.S must be \[1, 2, 15, 3\], got \[2, 2, 15, 3\]"):
        taylor_attention(q[:1], k[:1], v[:1], initial_state=state)
    with pytest.raises(ValueError, match="packs documents into one row, but the batch is 2"):
        taylor_attention(q, k, v, cu_seqlens=torch.tensor([0, 20], dtype=torch.int32))
    with pytest.raises(TypeError, match="gama"):
        taylor_attention(q, k, v, gama=1)
