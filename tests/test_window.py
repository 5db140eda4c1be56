"""What is particular to window attention: its ring, its State, its cost, its layer, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from linattn.core.mixer import map_state
from linattn.core.numerics import relative_error
from linattn.core.shapes import Segment
from linattn.mixers.window import MIXER, WindowState, combine, summarize, window_attention, window_step_
from linattn.mixers.window.layer import WindowConfig
from linattn.mixers.window.reference import window_reference


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(batch, tokens, heads=2, dim=4):
    return tuple(draw(batch, tokens, heads, dim, seed=i) for i in range(3))


def test_it_is_softmax_under_the_published_mask():
    """FlashAttention's (128, 0): 128 before and self."""
    q, k, v = qkv(1, 300)
    i, j = torch.arange(300)[:, None], torch.arange(300)
    mask = (j <= i) & (j >= i - 128)
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)
    assert relative_error(window_attention(q, k, v, window=129)[0], want, (0, 2)) < 1e-13


def test_a_window_longer_than_the_text_is_causal_attention():
    q, k, v = qkv(2, 200)
    want = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)
    y, state = window_attention(q, k, v, window=1000)
    assert relative_error(y, want, (0, 2)) < 1e-13
    assert state.count.tolist() == [200, 200]
    assert torch.equal(state.k[:, -200:], k)
    assert not state.k[:, :-200].any()


@pytest.mark.parametrize("window", [1, 2, 5, 64, 129])
def test_the_ring_wraps(window):
    """400 tokens one by one: 400 turns at W 1, three at W 129; the State taken midway continues in forward."""
    q, k, v = qkv(2, 400)
    want, final = window_reference(q, k, v, window=window)
    pool = MIXER.new_pool(MIXER.identity({"k": k, "v": v, "window": window}, 2), 3)
    slots = torch.tensor([2, 0], dtype=torch.int32)
    steps, states = [], []
    for t in range(400):
        states.append(MIXER.take(pool, slots))
        steps.append(window_step_(q[:, t], k[:, t], v[:, t], pool, slots, window=window))
    y, _ = window_attention(q[:, 333:], k[:, 333:], v[:, 333:], window=window, initial_state=states[333])
    assert relative_error(y, want[:, 333:], (0, 2)) < 1e-13
    assert relative_error(torch.stack(steps, 1), want, (0, 1, 2)) < 1e-12
    state = MIXER.take(pool, slots)
    for got, wanted in zip(state, final, strict=True):
        assert torch.equal(got, wanted)
    assert pool.tokens.tolist() == [400, 0, 400, 0]


def test_a_slot_forgets_what_was_in_it():
    """A NaN left by the last request must not come back through a weight of zero."""
    q, k, v = qkv(1, 3)
    pool = MIXER.new_pool(MIXER.identity({"k": k, "v": v, "window": 5}, 1), 1)
    slot = torch.zeros(1, dtype=torch.int32)
    for t in (0, 1, 2):
        window_step_(q[:, t], k[:, t], v[:, t] * float("nan"), pool, slot, window=5)
    MIXER.put_(pool, slot, MIXER.identity({"k": k, "v": v, "window": 5}, 1))
    steps = [window_step_(q[:, t], k[:, t], v[:, t], pool, slot, window=5) for t in range(3)]
    assert relative_error(torch.stack(steps, 1), window_reference(q, k, v, window=5)[0]) < 1e-13


def test_the_state_is_a_copy_in_the_dtype_of_the_inputs():
    q, k, v = (x.bfloat16() for x in qkv(1, 300))
    _, state = window_attention(q, k, v, window=5)
    assert state.k.dtype == state.v.dtype == torch.bfloat16
    assert state.count.dtype == torch.int32
    assert state.k.untyped_storage().nbytes() == 4 * 2 * 4 * 2
    assert window_attention(q, k, v, window=5, return_state=False)[1] is None


def test_combine_takes_any_leading_axes():
    _, k, v = qkv(6, 3)
    texts = [summarize(k[i : i + 1], v[i : i + 1], 5) for i in range(6)]
    together = map_state(lambda *leaves: torch.stack(leaves).unflatten(0, (2, 3)), *texts)
    got = combine(together, map_state(lambda leaf: leaf.flip(0, 1), together))
    for i in range(6):
        want = combine(texts[i], texts[5 - i])
        for leaf, wanted in zip(map_state(lambda x: x.flatten(0, 1), got), want, strict=True):
            assert torch.equal(leaf[i], wanted)


def test_documents_shorter_than_the_window_keep_what_came_before():
    _, k, v = qkv(1, 9)
    long = summarize(k, v, 8)
    for tokens in (0, 1, 6):
        state = combine(long, summarize(k[:, :tokens], v[:, :tokens], 8))
        assert torch.equal(state.k, torch.cat([k, k[:, :tokens]], 1)[:, -7:])
        assert state.count.tolist() == [7]


@pytest.mark.parametrize("window", [5, 129])
def test_memory_is_linear_in_the_text(window):
    """No tensor of T x T, nor of T x W scores: the largest is the text's keys with those before each chunk."""
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

    q = torch.randn(1, 16384, 2, 8)
    with torch.no_grad(), Largest():
        window_attention(q, q, q, window=window)
    assert largest <= 2**18 + q.numel()


@pytest.mark.parametrize("packed", [False, True])
def test_it_compiles_in_one_graph(packed):
    q, k, v = qkv(1, 150)
    cu = torch.tensor([0, 40, 40, 150], dtype=torch.int32) if packed else None
    compiled = torch.compile(window_attention, fullgraph=True, backend="eager")
    y, state = compiled(q, k, v, window=9, cu_seqlens=cu)
    want, final = window_attention(q, k, v, window=9, cu_seqlens=cu)
    assert torch.equal(y, want)
    assert all(torch.equal(a, b) for a, b in zip(state, final, strict=True))


def test_gradients_of_gradients():
    q, k, v = (x.requires_grad_() for x in qkv(1, 5, heads=1, dim=2))
    assert torch.autograd.gradgradcheck(lambda *x: window_attention(*x, window=3, return_state=False)[0], (q, k, v))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v: (q[0], k, v), r"q must be \[B, T, H, D\], got \[10, 4, 3\]"),
        (lambda q, k, v: (q, k[:, 1:], v), "B and T must agree"),
        (lambda q, k, v: (q, k.float(), v), "must share dtype and device"),
        (lambda q, k, v: (q, k[:, :, :1], v), "one head count that divides q's, got q 4, k 1, v 2"),
        (lambda q, k, v: (q[:, :, :1], k, v), "one head count that divides q's, got q 1, k 2, v 2"),
    ],
)
def test_wrong_inputs(change, message):
    q, k, v = draw(1, 10, 4, 3), draw(1, 10, 2, 3), draw(1, 10, 2, 5)
    with pytest.raises(ValueError, match=message):
        window_attention(*change(q, k, v), window=5)


def test_wrong_windows_documents_and_states():
    q, k, v = qkv(2, 10)
    with pytest.raises(ValueError, match="self included: at least 1, got 0"):
        window_attention(q, k, v, window=0)
    for window in (2.5, True, "4", None):
        with pytest.raises(ValueError, match=f"window must be an int, the number of keys seen, got {window!r}"):
            window_attention(q, k, v, window=window)
    with pytest.raises(ValueError, match="packs documents into one row, but the batch is 2"):
        window_attention(q, k, v, window=5, cu_seqlens=torch.tensor([0, 20], dtype=torch.int32))
    with pytest.raises(ValueError, match="must run from 0 to the 10 tokens given, got 0 to 7"):
        window_attention(q[:1], k[:1], v[:1], window=5, cu_seqlens=torch.tensor([0, 7], dtype=torch.int32))
    _, state = window_attention(q, k, v, window=5)
    with pytest.raises(ValueError, match=r"initial_state.k must be \[2, 5, 2, 4\], got \[2, 4, 2, 4\]"):
        window_attention(q, k, v, window=6, initial_state=state)
    with pytest.raises(ValueError, match=r"initial_state.count must be \[2\], got \[1\]"):
        window_attention(q, k, v, window=5, initial_state=WindowState(state.k, state.v, state.count[:1]))
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        window_attention(q, k, v, window=5, backend="cuda")
    pool = MIXER.new_pool(state, 2)
    with pytest.raises(ValueError, match="the pool's rings hold 5 tokens, the window is 6"):
        window_step_(q[:, 0], k[:, 0], v[:, 0], pool, torch.tensor([0, 1], dtype=torch.int32), window=6)


def layer_of(**changes):
    torch.manual_seed(0)
    return WindowConfig(n_heads=2, window=7, **changes).build(8, 0, 4).double()


@pytest.mark.parametrize("changes", [{}, {"head_dim": 6}, {"rotary_fraction": 0.5, "rotary_base": 100.0}], ids=str)
def test_the_layer_step_by_step_is_the_layer(changes):
    layer, x = layer_of(**changes), draw(2, 40, 8)
    positions = torch.arange(40).expand(2, 40)
    with torch.no_grad():
        want, final = layer(x, None, Segment(positions))
        first, state = layer(x[:, :15], layer.identity(2), Segment(positions[:, :15]))
        pool = layer.mixer.new_pool(state, 2)
        slots = torch.tensor([1, 0], dtype=torch.int32)
        layer.mixer.put_(pool, slots, state)
        rest = [layer.step_(x[:, t], pool, slots, positions[:, t]) for t in range(15, 40)]
    assert relative_error(torch.cat([first, torch.stack(rest, 1)], 1), want, (0, 1)) < 1e-12
    for got, wanted in zip(layer.mixer.take(pool, slots), final, strict=True):
        torch.testing.assert_close(got, wanted)


def test_the_layer_sees_distances_not_places():
    layer, x = layer_of(), draw(1, 40, 8)
    positions = torch.arange(40)[None]
    near, far = (layer(x, None, Segment(p), return_state=False)[0] for p in (positions, positions + 1_000_000))
    assert relative_error(far, near, (1,)) < 1e-8


def test_the_layer_packed():
    layer, x = layer_of(), draw(1, 40, 8)
    cu = torch.tensor([0, 25, 25, 40], dtype=torch.int32)
    positions = torch.cat([torch.arange(25), torch.arange(15)])[None]
    y, state = layer(x, layer.identity(3), Segment(positions, cu))
    assert state.count.tolist() == [6, 0, 6]
    for a, b in ((0, 25), (25, 40)):
        alone = layer(x[:, a:b], None, Segment(positions[:, a:b]))[0]
        assert relative_error(y[:, a:b], alone, (1,)) < 1e-12


def test_the_layer_has_the_published_parameters():
    assert {n: list(p.shape) for n, p in layer_of().named_parameters()} == {
        "Wqkv.weight": [24, 8],
        "out_proj.weight": [8, 8],
    }
    with pytest.raises(ValueError, match="d_model 9 is not a multiple of n_heads 2"):
        WindowConfig(n_heads=2).build(9, 0, 1)
    with pytest.raises(ValueError, match="WindowConfig.window is 0; it must be at least 1"):
        WindowConfig(window=0)


def test_a_nan_reaches_no_gradient_of_another_document():
    q, k, v = qkv(1, 300)
    cu = torch.tensor([0, 90, 90, 250, 300], dtype=torch.int32)
    spoiled = [x.index_fill(1, torch.arange(90, 250), float("nan")).requires_grad_() for x in (q, k, v)]
    y, _ = window_attention(*spoiled, window=70, cu_seqlens=cu)
    others = torch.cat([torch.arange(90), torch.arange(250, 300)])
    for gradient in torch.autograd.grad(y[:, others].sum(), spoiled):
        assert torch.isfinite(gradient[:, others]).all()
