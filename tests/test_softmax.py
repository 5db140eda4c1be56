"""Softmax attention beyond the laws: the State, pools, refusals and the layer. Command: pytest tests/test_softmax.py"""

import pytest
import torch
import torch.nn.functional as F

from linattn.core.numerics import relative_error
from linattn.core.shapes import Segment
from linattn.mixers.softmax import MIXER, SoftmaxState, chunked, softmax_attention, softmax_step_
from linattn.mixers.softmax.cases import REAL, SMALL
from linattn.mixers.softmax.layer import SoftmaxConfig
from linattn.mixers.softmax.reference import softmax_reference


def draw(T, H=4, kv=2, D=4, B=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, T, H, D), (B, T, kv, D), (B, T, kv, D)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def uneven(counts=(7, 0, 4), capacity=9, H=2, D=4, dtype=torch.float64):
    """A State whose rows hold different numbers of tokens."""
    _, k, v = draw(capacity, B=len(counts), kv=H, D=D, dtype=dtype, seed=5)
    count = torch.tensor(counts, dtype=torch.int32)
    real = (torch.arange(capacity) < count[:, None])[..., None, None]
    return SoftmaxState(k * real, v * real, count)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def segment(B, T):
    return Segment(torch.arange(T).expand(B, T))


# The op --------------------------------------------------------------------------------------------------------------


def test_the_reference_is_torchs_attention():
    q, k, v = draw(20)
    o, _ = softmax_reference(q, k, v)
    k, v = (x.repeat_interleave(2, 2) for x in (k, v))
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)
    assert relative_error(o, want) < 1e-14


@pytest.mark.parametrize("T", [1, 30, 1100])
def test_rows_of_a_state_may_hold_different_numbers(T):
    q, k, v = draw(T, B=3)
    results = []
    for op in (softmax_attention, softmax_reference):
        before = uneven()
        leaves = [x.clone().requires_grad_() for x in (q, k, v, before.k, before.v)]
        state = SoftmaxState(leaves[3], leaves[4], before.count)
        o, end = op(*leaves[:3], initial_state=state)
        grads = torch.autograd.grad(o.square().sum() + sum(x.square().sum() for x in end[:2]), leaves)
        results.append((o, *end, *grads))
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want, (0,)) < 1e-13


def test_combine_gathers_by_count_over_any_leading_axes():
    a, b = uneven((7, 0, 4)), uneven((1, 5, 9))
    joined = MIXER.combine(a, b)
    assert joined.count.tolist() == [8, 5, 13] and joined.k.shape[1] == 18
    for n in range(3):
        want = torch.cat([a.k[n, : a.count[n]], b.k[n, : b.count[n]]])
        assert torch.equal(joined.k[n, : joined.count[n]], want)
        assert (joined.k[n, joined.count[n] :] == 0).all() and (joined.v[n, joined.count[n] :] == 0).all()
    stacked = (SoftmaxState(*(leaf.unflatten(0, (3, 1)) for leaf in s)) for s in (a, b))
    for got, want in zip(MIXER.combine(*stacked), joined, strict=True):
        assert torch.equal(got.flatten(0, 1), want)


def test_packed_documents_from_states():
    lengths = (5, 0, 600)
    q, k, v = draw(605, B=1)
    before = uneven()
    o, end = softmax_attention(q, k, v, initial_state=before, cu_seqlens=int32(0, 5, 5, 605))
    assert end.count.tolist() == [12, 0, 604] and end.k.shape[1] == 9 + 600
    pieces, got = list(zip(*(x.split(lengths, 1) for x in (q, k, v)), strict=True)), o.split(lengths, 1)
    for n in (0, 2):  # document 1 is empty
        want, state = softmax_reference(*pieces[n], initial_state=tuple(leaf[n : n + 1] for leaf in before))
        assert relative_error(got[n], want) < 1e-13
        assert torch.equal(end.k[n, : end.count[n]], state[0][0, : end.count[n]])


def test_a_state_is_a_copy():
    q, k, v = draw(3)
    _, state = softmax_attention(q, k, v)
    assert state.k.untyped_storage().data_ptr() != k.untyped_storage().data_ptr()


def test_nothing_quadratic_is_kept_for_backward():
    def kept(T, state):
        q, k, v = (x.requires_grad_() for x in draw(T, B=1, dtype=torch.float32))
        seen = {}

        def pack(x):
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            softmax_attention(q, k, v, initial_state=state, return_state=False)
        return sum(seen.values())

    for state in (None, uneven((7,), dtype=torch.float32)):
        assert kept(4096, state) <= 2.05 * kept(2048, state)


def test_a_step_at_300_tokens_and_after():
    q, k, v = draw(330, dtype=torch.float32)
    want, _ = softmax_reference(*(x.double() for x in (q, k, v)))
    _, state = softmax_attention(q[:, :300], k[:, :300], v[:, :300])
    pool, slots = MIXER.new_pool(state, 3, capacity=330), int32(2, 0)
    MIXER.put_(pool, slots, state)
    got = torch.stack([softmax_step_(q[:, t], k[:, t], v[:, t], pool, slots) for t in range(300, 330)], 1)
    assert relative_error(got, want[:, 300:], (0, 2)) < 1e-6


def test_slots_of_different_ages_and_reuse():
    before = uneven()
    pool = MIXER.new_pool(before, 4, capacity=12)
    spoiled = before._replace(k=torch.full_like(before.k, float("nan")), count=int32(9, 9, 9))
    MIXER.put_(pool, int32(0, 1, 2), spoiled)
    MIXER.put_(pool, int32(2, 0, 1), before)
    q, k, v = (x[:, 0] for x in draw(1, B=3))
    o = softmax_step_(q, k, v, pool, int32(2, 0, 1))
    want, end = softmax_attention(q[:, None], k[:, None], v[:, None], initial_state=before)
    torch.testing.assert_close(o, want[:, 0])
    got = MIXER.take(pool, int32(2, 0, 1))
    assert torch.equal(got.count, end.count) and torch.equal(got.k, end.k[:, :8]) and torch.equal(got.v, end.v[:, :8])


def test_a_full_slot_is_refused_and_nothing_is_written():
    q, k, v = (x[:, 0] for x in draw(1, dtype=torch.float32))
    pool = MIXER.new_pool(chunked.identity(1, 2, 4, 4, k), 2, capacity=3)
    for _ in range(3):
        softmax_step_(q, k, v, pool, int32(1, -1))
    softmax_step_(q, k, v, pool, int32(0, -1))
    before = [leaf.clone() for leaf in pool]
    with pytest.raises(ValueError, match=r"slot 1 is full.*3 tokens.*capacity"):
        softmax_step_(q, k, v, pool, int32(0, 1))
    assert all(torch.equal(a, b) for a, b in zip(before, pool, strict=True))
    with pytest.raises(ValueError, match="4 tokens.*capacity is 3"):
        MIXER.put_(pool, int32(0), uneven((4,), dtype=torch.float32))
    for capacity in (None, 0):
        with pytest.raises(ValueError, match="capacity"):
            MIXER.new_pool(chunked.identity(1, 2, 4, 4, k), 2, capacity=capacity)


@pytest.mark.parametrize("before", [None, uneven((7, 4), dtype=torch.float32)], ids=["from nothing", "from a State"])
def test_it_compiles_to_one_graph(before):
    q, k, v = (x.requires_grad_() for x in draw(600, dtype=torch.float32))

    def op(q, k, v):
        return softmax_attention(q, k, v, initial_state=before)

    want, got = op(q, k, v), torch.compile(op, fullgraph=True, backend="eager")(q, k, v)
    torch.testing.assert_close(got, want)


def test_packed_documents_compile_in_pieces():
    q, k, v = draw(50, B=1)

    @torch.compile(backend="eager")
    def op(q, k, v, cu):
        return softmax_attention(q, k, v, cu_seqlens=cu)

    for cu in (int32(0, 20, 20, 50), int32(0, 1, 49, 50)):
        (got, state), (want, end) = op(q, k, v, cu), softmax_attention(q, k, v, cu_seqlens=cu)
        longest = end.k.shape[1]
        torch.testing.assert_close(got, want)
        assert torch.equal(state.k[:, :longest], end.k) and torch.equal(state.count, end.count)
        assert (state.k[:, longest:] == 0).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.zeros(2, 5, 3, 4), "v": torch.zeros(2, 5, 3, 4)}, "3 heads"),
        ({"v": torch.zeros(2, 5, 1, 4)}, "one head count"),
        ({"q": torch.zeros(2, 5, 1, 4)}, "one head count"),
        ({"k": torch.zeros(2, 5, 2, 3)}, "head dim"),
        ({"v": torch.zeros(2, 5, 2, 4, dtype=torch.float16)}, "float16"),
        ({"backend": "abacus"}, "abacus"),
        ({"cu_seqlens": int32(0, 10)}, "batch is 2"),
        ({"initial_state": uneven((1, 2, 3), dtype=torch.float32)}, "initial_state.k"),
        ({"initial_state": uneven((1, 2), dtype=torch.float32)._replace(count=int32(1))}, "initial_state.count"),
        ({"initial_state": (None, None)}, "State"),
    ],
)
def test_refusals_name_the_value(change, message):
    q, k, v = draw(5, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        softmax_attention(**{"q": q, "k": k, "v": v} | change)


def test_names_of_cases_differ():
    names = [case.name for case in (*SMALL, *REAL)]
    assert len(set(names)) == len(names) and "b16-h16-t2048-d64" in names


# The layer -----------------------------------------------------------------------------------------------------------

LAYERS = [
    SoftmaxConfig(n_heads=2),
    SoftmaxConfig(n_heads=4, n_kv_heads=2, head_dim=6, rotary_fraction=0.5),
    SoftmaxConfig(n_heads=4, n_kv_heads=1, rotary_fraction=0.0, bias=True),
]


def layer_of(config, d_model=16):
    torch.manual_seed(0)
    return config.build(d_model, 0, 1).double()


def test_the_layer_is_attention_with_its_rows_in_order():
    layer = layer_of(LAYERS[2])
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    W, b = layer.Wqkv.weight, layer.Wqkv.bias
    q, k, v = (x @ W[rows].T + b[rows] for rows in (slice(0, 16), slice(16, 20), slice(20, 24)))
    o, _ = softmax_reference(q.view(2, 7, 4, 4), k.view(2, 7, 1, 4), v.view(2, 7, 1, 4))
    want = o.reshape(2, 7, 16) @ layer.out_proj.weight.T + layer.out_proj.bias
    torch.testing.assert_close(layer(x, None, segment(2, 7))[0], want)


def test_published_baselines_are_built():
    small = SoftmaxConfig(n_heads=16, rotary_fraction=0.5).build(1024, 0, 24)
    large = SoftmaxConfig(n_heads=24, rotary_fraction=0.5).build(1680, 0, 36)
    assert {n: tuple(p.shape) for n, p in small.state_dict().items()} == {
        "Wqkv.weight": (3072, 1024),
        "out_proj.weight": (1024, 1024),
    }
    assert large.head_dim == 70 and large.rotary.angles(torch.arange(3))[0].shape == (3, 18)


@pytest.mark.parametrize("config", LAYERS, ids=str)
def test_layer_steps_as_it_reads(config):
    layer = layer_of(config)
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    want, end = layer(x, None, segment(2, 12))
    y, state = layer(x[:, :5], layer.identity(2), segment(2, 5))
    pool, slots = layer.mixer.new_pool(state, 4, capacity=20), int32(3, 1)
    layer.mixer.put_(pool, slots, state)
    steps = [layer.step_(x[:, t], pool, slots, torch.full((2,), t)) for t in range(5, 12)]
    torch.testing.assert_close(torch.cat([y, torch.stack(steps, 1)], 1), want)
    torch.testing.assert_close(layer.mixer.take(pool, slots), end)


def test_the_layer_refuses_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match="n_kv_heads 3"):
        SoftmaxConfig(n_heads=4, n_kv_heads=3).build(16, 0, 1)
    with pytest.raises(ValueError, match="d_model 17"):
        SoftmaxConfig(n_heads=4).build(17, 0, 1)
