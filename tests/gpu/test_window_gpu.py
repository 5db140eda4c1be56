"""Window attention's Triton backend on a GPU: the contract, every length to 130, every tile, in place and captured.

Command: pytest -m gpu tests/gpu/test_window_gpu.py
"""

import pytest
import torch

from linattn.core.laws import LAWS, Subject, parity, poisoned_memory
from linattn.core.numerics import TORCH_TOLERANCE, relative_error
from linattn.mixers import window
from linattn.mixers.window import MIXER, WindowState, window_attention, window_step_
from linattn.mixers.window.cases import WindowCase
from linattn.mixers.window.reference import window_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),
]

CASES = (
    WindowCase(2, 130, 4, 64, 129, "Based 360M"),
    WindowCase(2, 130, 4, 112, 129, "Based 1.3B"),
    WindowCase(2, 130, 2, 64, 64, "Based's window 64"),
    WindowCase(2, 130, 2, 32, 1, "self alone: a State of no rows"),
    # At scale 1.5 half of the State's keys have gradients of 1e-8, under fp32's noise: they have a test of their own.
    WindowCase(2, 130, 2, 64, 2, "self and one before, a scale of one's own", scale=0.25),
    WindowCase(2, 130, 6, 64, 65, "grouped queries: k and v have fewer heads", value_dim=128, kv_heads=2),
    WindowCase(2, 130, 2, 70, 100, "a head dim whose rows start anywhere", value_dim=40),
    WindowCase(2, 130, 2, 128, 600, "a window longer than the text"),
)
DTYPES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("law", LAWS)
def test_laws(law, case, dtype):
    assert LAWS[law](Subject(window.MIXER, case, "triton", dtype, "cuda")) == []


def draw(T, D, V, W, dtype, B=1, heads=2, kv_heads=2, count=None):
    """q, k, v, a State (its real rows from the right) and dy."""
    generator = torch.Generator("cuda").manual_seed(T)
    past = W - 1
    shapes = ((T, heads, D), (T, kv_heads, D), (T, kv_heads, V), (past, kv_heads, D), (past, kv_heads, V))
    shapes += ((T, heads, V),)
    q, k, v, state_k, state_v, dy = (torch.randn(B, *s, device="cuda", generator=generator).to(dtype) for s in shapes)
    real = past // 2 if count is None else count
    state_k[:, : past - real], state_v[:, : past - real] = 0, 0
    return (q, k, v, state_k, state_v), torch.full((B,), real, dtype=torch.int32, device="cuda"), dy


def wanted(inputs, count, dy, W, scale):
    q, k, v, state_k, state_v = leaves = [x.double().requires_grad_() for x in inputs]
    y, _ = window_reference(q, k, v, window=W, scale=scale, initial_state=(state_k, state_v, count))
    gradients = torch.autograd.grad(y, leaves, dy.double(), allow_unused=True)
    return [y.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True))]


def found(inputs, count, dy, W, scale, tile=None):
    from linattn.mixers.window import triton as kernels

    q, k, v, *state = inputs
    with poisoned_memory():
        y, lse = kernels.forward(q, k, v, *state, count, None, W, scale, tile)
        return y, *kernels.backward(dy, y, lse, q, k, v, *state, count, None, W, scale, tile, tile)


def errors(inputs, count, dy, W, scale, want, tile=None):
    got = found(inputs, count, dy, W, scale, tile)
    return [relative_error(a, b, (0, 2)) for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize("W", (1, 5, 64, 65, 129, 200))
@pytest.mark.parametrize("lengths", (range(1, 64), range(64, 131), (523, 1000, 2049)), ids=str)
def test_every_length(W, lengths):
    """From a State that is half full."""
    wrong = {}
    for T in lengths:
        inputs, count, dy = draw(T, 64, 64, W, torch.bfloat16)
        off = errors(inputs, count, dy, W, 0.125, wanted(inputs, count, dy, W, 0.125))
        if not max(off) <= 2 * TORCH_TOLERANCE[torch.bfloat16]:
            wrong[T] = off
    assert wrong == {}


TILES = (
    (64, 64, 4, 1),
    (64, 64, 4, 2),
    (64, 64, 4, 3),
    (64, 64, 8, 1),
    (64, 64, 8, 2),
    (128, 64, 8, 2),
    (64, 128, 8, 2),
)
"""Those that ship and those that the benchmark tries: Triton 3.4 to 3.7 miscompiles some products on Hopper."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D, V", ((64, 64), (112, 112), (8, 128), (70, 40)))
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile(tile, D, V, dtype):
    from linattn.mixers.window import triton as kernels

    inputs, count, dy = draw(300, D, V, 129, dtype, heads=4)
    want = wanted(inputs, count, dy, 129, D**-0.5)
    off = errors(inputs, count, dy, 129, D**-0.5, want, kernels.Tile(*tile))
    assert max(off) <= 2 * TORCH_TOLERANCE[dtype], off


def test_the_tiles_that_ship_are_among_those_checked():
    from linattn.mixers.window import triton as kernels

    shipped = {(t.queries, t.keys, t.warps, t.stages) for t in (*kernels.HOPPER.values(), *kernels.PLAIN.values())}
    assert shipped <= set(TILES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_long_text_at_the_width_of_based(dtype):
    case = WindowCase(2, 2048, 4, 64, 129, "as long as Based trains")
    assert parity(Subject(window.MIXER, case, "triton", dtype, "cuda"), 2048) == []


def test_scores_far_apart():
    """A softmax of one key: scores of several hundred must neither overflow nor lose the rest."""
    inputs, count, dy = draw(300, 64, 64, 129, torch.bfloat16)
    want = wanted(inputs, count, dy, 129, 8.0)
    assert max(errors(inputs, count, dy, 129, 8.0, want)[:1]) <= 2 * TORCH_TOLERANCE[torch.bfloat16]


def test_the_gradient_of_a_key_that_one_query_reads():
    """scale ds q of one ds = p (dp - delta), which cancels where p is near 1: every State's key within bounds.

    ds and the result are rounded to bf16, 2^-8 of the gradient together. Scores to 2^6 in fp32 leave p off by 4e-6,
    which meets |dp| about 8 and the scale: 5e-5, and twice that is allowed. delta from the rounded y is off by 8e-2.
    """
    inputs, count, dy = draw(5, 64, 64, 2, torch.bfloat16, B=64, count=1)
    want = wanted(inputs, count, dy, 2, 1.5)[4]
    got = found(inputs, count, dy, 2, 1.5)[4].double()
    off, size = (x.square().mean((1, 3)).sqrt() for x in (got - want, want))
    assert (size < 1e-3).sum() > 20 and (size > 0.1).sum() > 10
    assert (off <= 2**-7 * size + 1e-4).all(), (off - 2**-7 * size).max()


@pytest.mark.parametrize("D", (64, 112))
def test_a_packed_qkv_is_read_in_place(D):
    qkv = torch.randn(2, 300, 3, 4, D, device="cuda", dtype=torch.bfloat16)
    views = [qkv[:, :, i] for i in range(3)]
    window_attention(*views, window=129, return_state=False, backend="triton")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y, _ = window_attention(*views, window=129, return_state=False, backend="triton")
    assert torch.cuda.max_memory_allocated() - before < 2 * y.numel() * y.element_size()
    copies = [x.contiguous() for x in views]
    assert torch.equal(y, window_attention(*copies, window=129, return_state=False, backend="triton")[0])


def test_groups_are_indexed_not_repeated():
    q = torch.randn(1, 4096, 16, 64, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(1, 4096, 2, 64, device="cuda", dtype=torch.bfloat16)
    window_attention(q, k, k, window=129, return_state=False, backend="triton")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y, _ = window_attention(q, k, k, window=129, return_state=False, backend="triton")
    assert torch.cuda.max_memory_allocated() - before < 1.2 * y.numel() * y.element_size()


def test_an_expanded_gradient():
    inputs, _, _ = draw(200, 64, 64, 65, torch.bfloat16)
    q, k, v = (x.requires_grad_() for x in inputs[:3])
    y, _ = window_attention(q, k, v, window=65, return_state=False, backend="triton")
    got = torch.autograd.grad(y.sum(), (q, k, v), retain_graph=True)
    want = torch.autograd.grad(y, (q, k, v), torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_compiles_without_a_graph_break():
    inputs, count, dy = draw(300, 64, 64, 129, torch.bfloat16)
    q, k, v = (x.requires_grad_() for x in inputs[:3])
    state = WindowState(*inputs[3:], count)

    def run(q, k, v):
        y, after = window_attention(q * 1.5, k, v, window=129, initial_state=state, backend="triton")
        return y * 2, after.k

    want = run(q, k, v)
    gradients = torch.autograd.grad(want[0], (q, k, v), dy)
    got = torch.compile(run, fullgraph=True)(q, k, v)
    for x, y in zip((*got, *torch.autograd.grad(got[0], (q, k, v), dy)), (*want, *gradients), strict=True):
        assert relative_error(x, y) < 1e-2


@pytest.mark.parametrize("D, W, heads", ((64, 129, 2), (112, 129, 2), (64, 64, 8), (70, 1, 2)))
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float32), ids=str)
@pytest.mark.parametrize("rows", (70, 140), ids=("few", "many"))
def test_steps_replayed_from_a_cuda_graph(rows, dtype, D, W, heads):
    """300 tokens by both walks of a ring, more programs than fit at a time; idle rows, slots that nobody named."""
    T = 300
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(rows, T, h, D, device="cuda", generator=generator).to(dtype) for h in (heads, 2, 2))
    want, final = window_reference(q.double(), k.double(), v.double(), window=W)
    pool = MIXER.new_pool(MIXER.identity({"k": k, "v": v, "window": W}, 1), rows + 3)
    slots = torch.randperm(rows + 3, device="cuda")[:rows].to(torch.int32)
    named = slots.clone()
    slots[-1] = -1
    token = [x[:, 0].clone() for x in (q, k, v)]
    window_step_(*token, pool, slots, window=W, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = window_step_(*token, pool, slots, window=W, backend="triton")
    got = [want[:, 0]]
    for t in range(1, T):
        for held, x in zip(token, (q, k, v), strict=True):
            held.copy_(x[:, t])
        graph.replay()
        got.append(y.double())
    tolerance = 2 * TORCH_TOLERANCE[dtype]
    assert relative_error(torch.stack(got, 1)[:-1], want[:-1], (0, 2)) <= tolerance
    state = MIXER.take(pool, named[:-1])
    assert torch.equal(state.k.double(), final[0][:-1]) and torch.equal(state.v.double(), final[1][:-1])
    assert pool.tokens[named[:-1].long()].eq(T).all() and pool.tokens.sum() == T * (rows - 1)
    unnamed = torch.ones(rows + 4, dtype=torch.bool, device="cuda").index_fill(0, named[:-1].long(), False)
    assert not pool.k[unnamed].any()


def test_agrees_with_flex_attention():
    """An independent implementation of the same window, at full width."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = (torch.randn(2, 2048, 16, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    mask = create_block_mask(lambda b, h, i, j: (j <= i) & (j > i - 129), None, None, 2048, 2048, device="cuda")
    want = torch.compile(flex_attention)(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)
    y, _ = window_attention(q, k, v, window=129, return_state=False, backend="triton")
    assert relative_error(y, want, (0, 2)) < 1e-2
