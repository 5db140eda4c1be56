"""Taylor attention's sweeps on a GPU, CUDA's and Triton's: the contract on Based's shapes, every length, every tile.

Command: pytest -m gpu tests/gpu/test_taylor_gpu.py
"""

import pytest
import torch
from taylor_truth import STATES, above, draw, errors, off, run

from linattn.core.laws import LAWS, Subject
from linattn.core.numerics import TORCH_TOLERANCE, relative_error
from linattn.mixers import taylor
from linattn.mixers.prefix import prefix_attention
from linattn.mixers.prefix.reference import prefix_reference
from linattn.mixers.taylor import TaylorState, chunked, taylor_attention
from linattn.mixers.taylor.cases import TaylorCase

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),
]

BACKENDS = ("cuda", "triton")
HALVES = (torch.bfloat16, torch.float16)
LIMITS = {
    torch.bfloat16: {"": 8e-3, "S": 4e-3, "z": 1e-5, "dz0": 1.2e-2},
    torch.float16: {"": 1e-3, "S": 6e-4, "z": 1e-5, "dz0": 1.5e-3},
}
"""z's terms are exact products, S's rounded ones; all else is rounded twice or more, and dz0 is from a rounded y."""
SMALL_64 = TaylorCase(2, 130, 2, 16, 64, "Based 360M, two of its heads")
SMALL_112 = TaylorCase(2, 130, 2, 16, 112, "Based 1.3B, two of its heads")
GROUPED = (
    TaylorCase(2, 130, 4, 16, 64, "grouped queries", k_heads=2, v_heads=2),
    TaylorCase(2, 130, 4, 16, 64, "grouped values", q_heads=2, k_heads=2),
)
UNDIVIDED = TaylorCase(2, 130, 2, 16, 64, "sums", normalize=False)
OTHER_DIMS = tuple(TaylorCase(2, 130, 2, F, 64, "not Based's feature dim") for F in (8, 24, 32))
FEW_LAWS = ("parity_from_state", "packed_is_alone", "decode_is_the_fold")
"""Where each law compiles its own kernels, for what differs from the case that runs all of them."""

CASES = [("cuda", case, dtype, law) for case in (SMALL_64, SMALL_112) for dtype in HALVES for law in LAWS]
CASES += [("cuda", case, torch.bfloat16, law) for case in (*GROUPED, UNDIVIDED) for law in FEW_LAWS]
CASES += [("triton", SMALL_64, torch.bfloat16, law) for law in LAWS]
CASES += [("triton", SMALL_112, dtype, "parity_from_state") for dtype in HALVES]
CASES += [("triton", case, torch.bfloat16, "parity_from_state") for case in (*GROUPED, UNDIVIDED, *OTHER_DIMS)]
CASES += [("triton", SMALL_64, torch.float16, "packed_is_alone")]


def subject(backend, case, dtype):
    return Subject(taylor.MIXER, case, backend, dtype, "cuda")


@pytest.mark.parametrize("backend, case, dtype, law", CASES, ids=lambda x: getattr(x, "name", str(x)))
def test_laws(backend, case, dtype, law):
    assert LAWS[law](subject(backend, case, dtype)) == []


def overstepped(backend, T, V, dtype=torch.bfloat16, heads=(2, 2, 2), **settings):
    return above(LIMITS[dtype], errors(backend, T, V, dtype, heads, device="cuda", **settings))


@pytest.mark.parametrize("V", (64, 112))
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_length(backend, V):
    """y and the State for every T from 1 to 130; CUDA's gradients too, which nothing compiles again for."""
    wrong = {}
    for T in range(1, 131):
        over = overstepped(backend, T, V, heads=(1, 1, 1), backward=backend == "cuda")
        wrong |= {T: over} if over else {}
    assert wrong == {}


@pytest.mark.parametrize("lengths", ((1,), (15, 63, 65, 129, 523), (64, 128, 1000), (2049,), (8192,)), ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_spread_of_lengths(backend, dtype, lengths):
    """From a State, with gradients of y alone and of the State's, too."""
    wrong = {}
    for T in lengths:
        for given in ((True, False, False), (True, True, True)):
            over = overstepped(backend, T, 64, dtype, heads=(1, 1, 1), given=given)
            wrong |= {(T, given): over} if over else {}
    assert wrong == {}


@pytest.mark.parametrize("V", (32, 48, 64, 80, 96, 112, 128))
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_value_dim_of_cuda(V, dtype):
    assert overstepped("cuda", 200, V, dtype) == {}


TILES = [(16, V, torch.bfloat16) for V in (8, 64, 112, 128)] + [(F, 64, torch.bfloat16) for F in (8, 24, 32)]
TILES += [(16, 64, torch.float16), (16, 112, torch.float16)]


@pytest.mark.parametrize("F, V, dtype", TILES, ids=str)
def test_every_tile_of_triton(F, V, dtype):
    """Triton 3.4 to 3.7 miscompiles some products on Hopper, so no tile goes unchecked."""
    assert overstepped("triton", 200, V, dtype, F=F) == {}


@pytest.mark.parametrize("heads", ((4, 2, 2), (2, 2, 4), (4, 1, 2)), ids=str)
def test_grouped_heads(heads):
    """Heads of q, k and v; the State's are the larger of k's and v's. Triton's are among the laws' cases."""
    assert overstepped("cuda", 130, 64, heads=heads, scale=0.6, rows=2) == {}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_segments_change_nothing(backend, dtype):
    wrong = {}
    for segments in range(1, 6):
        over = overstepped(backend, 1100, 64, dtype, segments=segments, rows=2)
        wrong |= {segments: over} if over else {}
    assert wrong == {}


@pytest.mark.parametrize("backend", BACKENDS)
def test_segments_of_packed_documents(backend):
    """Empty ones among them and last, one token, one that fills the row's middle, and ends inside segments."""
    wrong = {}
    for segments in range(1, 6):
        over = overstepped(backend, 1100, 64, cu=(0, 0, 1, 64, 900, 900, 1037, 1100, 1100), segments=segments)
        wrong |= {segments: over} if over else {}
    assert wrong == {}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_thousand_documents(backend):
    """Of 0 to 20 tokens, each from its own State, beside the torch backend in float64."""
    lengths = torch.randint(0, 21, (1000,), generator=torch.Generator().manual_seed(0))
    cu = [0, *lengths.cumsum(0).tolist()]
    inputs, gradients = draw(cu[-1], 16, 64, torch.bfloat16, (2, 2, 2), 1000, device="cuda")
    leaves = [x.double().requires_grad_() for x in inputs]
    offsets = torch.tensor(cu, device="cuda", dtype=torch.int32)
    settings = {"cu_seqlens": offsets, "return_state": True, "scale": 0.25, "normalize": True}
    y, state = chunked.forward(*leaves[:3], initial_state=TaylorState(*leaves[3:]), **settings)
    found = torch.autograd.grad([y, *state], leaves, [g.double() for g in gradients])
    want = dict(zip(("y", "S", "z", "dq", "dk", "dv", "dS0", "dz0"), (y, *state, *found), strict=True))
    got = run(backend, inputs, gradients, cu)
    assert above(LIMITS[torch.bfloat16], {n: relative_error(x, want[n]) for n, x in got.items()}) == {}
    each = {n: relative_error(got[n], want[n], (0, 1)) for n in STATES}
    assert above({"": 3e-2, "S": 8e-3, "z": 2e-5}, each) == {}


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_qkv_is_read_in_place(backend):
    qkv = torch.randn(2, 300, 4, 16 + 16 + 64, device="cuda", dtype=torch.bfloat16)
    views = qkv.split((16, 16, 64), -1)
    copies = [x.contiguous() for x in views]
    want, _ = taylor_attention(*copies, return_state=False, backend=backend)
    taylor_attention(*views, return_state=False, backend=backend)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    got, _ = taylor_attention(*views, return_state=False, backend=backend)
    # The output and its divisors, no copy of v.
    assert torch.cuda.max_memory_allocated() - before < 1.5 * got.numel() * got.element_size()
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_views_are_those_of_copies(backend):
    """A packed qkv, and a gradient of y that is an expanded scalar."""
    qkv = torch.randn(2, 150, 4, 16 + 16 + 64, device="cuda", dtype=torch.bfloat16)
    found = []
    for make in (lambda x: x, lambda x: x.contiguous()):
        leaf = qkv.clone().requires_grad_()
        y, _ = taylor_attention(*(make(x) for x in leaf.split((16, 16, 64), -1)), return_state=False, backend=backend)
        found.append(torch.autograd.grad(y.sum(), leaf)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("before", (1, 2, 3, 4))
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_divisors_over_short_states(backend, dtype, before, record_property):
    """q and k of std 3 read a State of 1 to 4 tokens: the features' products are a hundred times the weights they make.

    A weight is at least 1/2, and the divisor stays positive: weights inside a chunk come from scores. CUDA reads z with
    what its rounding lost put back, right to 2% in bfloat16 (0.3% found in emulation); Triton reads it rounded, which
    costs up to an eighth of the divisor.
    """
    from linattn.mixers.taylor import triton as kernels

    inputs, _ = draw(32, 16, 64, dtype, (8, 8, 8), 16, rows=16, device="cuda", std=3.0, before=before)
    q, k, v, S0, z0 = inputs
    o, _, _, share = kernels.forward(q, k, v, 0.25, True, S0, z0, None, True, backend)
    phi_q, phi_k = (chunked.features(x.double() * s).transpose(1, 2) for x, s in ((q, 0.25), (k, 1.0)))
    sums = phi_k.cumsum(2) + z0.double()[:, :, None]
    den, want, scale = 1 / share.double(), (phi_q * sums).sum(-1), (phi_q * sums).abs().sum(-1)
    record_property("largest share of the divisor", float(((den - want) / want).abs().max()))
    record_property("largest share of its terms", float(((den - want) / scale).abs().max()))
    finer = 1 if dtype == torch.bfloat16 else 8
    assert torch.isfinite(o).all()
    assert float(((den - want).abs() / scale).max()) < 2**-8 / finer
    assert float(((den - want) / want).abs().max()) < {"cuda": 0.02, "triton": 0.3}[backend] / finer


@pytest.mark.parametrize("tokens", (1_000, 70_000))
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_count_is_exact(backend, dtype, tokens):
    """With k = 0 the first feature counts tokens: 16-bit sums stop at 256 or 2,048."""
    q, k = (
        torch.randn(1, tokens, 2, 16, device="cuda").to(dtype),
        torch.zeros(1, tokens, 2, 16, device="cuda", dtype=dtype),
    )
    y, state = taylor_attention(q, k, torch.ones(1, tokens, 2, 64, device="cuda", dtype=dtype), backend=backend)
    assert torch.equal(state.z[..., 0], torch.full((1, 2), float(tokens), device="cuda"))
    assert torch.equal(state.S[..., 0, :], torch.full((1, 2, 64), float(tokens), device="cuda"))
    assert relative_error(y, torch.ones_like(y)) < TORCH_TOLERANCE[dtype]


@pytest.mark.parametrize("segments", (None, 4))
@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_agree_bit_for_bit(backend, segments):
    inputs, gradients = draw(2048, 16, 64, torch.bfloat16, (16, 16, 16), 4, rows=4, device="cuda")
    first = run(backend, inputs, gradients, segments=segments)
    for _ in range(3):
        again = run(backend, inputs, gradients, segments=segments)
        assert [n for n, x in first.items() if not torch.equal(x, again[n])] == []


def both_ways(backend, q, k, v, S0, z0, gradients):
    y, state = taylor_attention(q, k, v, initial_state=TaylorState(S0, z0), backend=backend)
    found = torch.autograd.grad([y, *state], (q, k, v, S0, z0), gradients)
    return [y, *state, *found]


@pytest.mark.parametrize("backend", BACKENDS)
def test_eager_calls_are_the_operators(backend):
    """In eager the bodies are called past the dispatcher, and launches through what was compiled before."""
    inputs, gradients = draw(300, 16, 64, torch.bfloat16, (2, 2, 2), 1, device="cuda")
    q, k, v, S0, z0 = (x.requires_grad_() for x in inputs)
    want = list(taylor.operators.taylor_forward(q, k, v, 0.25, True, S0, z0, None, True, backend)[:3])
    want += torch.autograd.grad(want, (q, k, v, S0, z0), gradients)
    for _ in range(3):
        got = both_ways(backend, q, k, v, S0, z0, gradients)
        assert [torch.equal(x, y) for x, y in zip(got, want, strict=True)] == [True] * len(want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(backend):
    inputs, gradients = draw(300, 16, 64, torch.bfloat16, (2, 2, 2), 1, device="cuda")
    leaves = [x.requires_grad_() for x in inputs]

    def attend(q, k, v, S0, z0):
        y, state = taylor_attention(q * 1.5, k, v, initial_state=TaylorState(S0, z0), backend=backend)
        return y * 2, state.S, state.z

    want = attend(*leaves)
    want += torch.autograd.grad(want, leaves, gradients)
    got = torch.compile(attend, fullgraph=True)(*leaves)
    got += torch.autograd.grad(got, leaves, gradients)
    assert [relative_error(x, y) < 1e-2 for x, y in zip(got, want, strict=True)] == [True] * len(want)


@pytest.mark.parametrize("packed", (False, True), ids=("rows", "packed"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_in_a_cuda_graph(backend, packed):
    """Forward and backward, replayed on other inputs and, packed, on other documents."""
    first, second = (draw(T, 16, 64, torch.bfloat16, (2, 2, 2), 3, device="cuda") for T in (300, 301))
    offsets = [torch.tensor(x, device="cuda", dtype=torch.int32) for x in ((0, 100, 100, 300), (0, 7, 250, 300))]
    cu = offsets[0].clone() if packed else None
    state = slice(None) if packed else slice(0, 1)

    def cut(drawn):
        (q, k, v, S0, z0), (do, dS, dz) = drawn
        return [x[:, :300].contiguous() for x in (q, k, v, do)] + [x[state].clone() for x in (S0, z0, dS, dz)]

    held = cut(first)

    def attend():
        q, k, v, do, S0, z0, dS, dz = held
        leaves = [x.detach().requires_grad_() for x in (q, k, v, S0, z0)]
        y, after = taylor_attention(*leaves[:3], initial_state=TaylorState(*leaves[3:]), cu_seqlens=cu, backend=backend)
        return [y, *after, *torch.autograd.grad([y, *after], leaves, [do, dS, dz])]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        attend()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attend()
    for drawn, documents in ((second, offsets[1]), (first, offsets[0])):
        for x, new in zip(held, cut(drawn), strict=True):
            x.copy_(new)
        if cu is not None:
            cu.copy_(documents)
        graph.replay()
        assert [torch.equal(x, y) for x, y in zip(got, attend(), strict=True)] == [True] * 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prefix_of_each_row_s_own_length(backend):
    """JRT's prefix is a State: outputs and gradients, the prefix's keys and values among them."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(3, 200, 2, 16), (3, 200, 2, 16), (3, 200, 2, 64), (3, 128, 2, 16), (3, 128, 2, 64)]
    inputs = [torch.randn(*shape, device="cuda", generator=generator).bfloat16() for shape in shapes]
    do = torch.randn(3, 200, 2, 64, device="cuda", generator=generator).bfloat16()
    lengths = torch.tensor([128, 1, 50], device="cuda")
    found = []
    for attend, dtype, how in (
        (prefix_reference, torch.float64, {}),
        (prefix_attention, torch.bfloat16, {"backend": backend}),
    ):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        y = attend(*leaves, prefix_lengths=lengths, **how)[0]
        found.append([y, *torch.autograd.grad(y, leaves, do.to(dtype))])
    far = [relative_error(x, y, (0, 2)) for x, y in zip(found[1], found[0], strict=True)]
    assert max(far) < 2 * TORCH_TOLERANCE[torch.bfloat16], far


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_where_its_inputs_are_not_on_the_current_device(backend):
    inputs, gradients = draw(300, 16, 64, torch.bfloat16, (2, 2, 2), 1, device="cuda")
    want = both_ways(backend, *(x.requires_grad_() for x in inputs), gradients)
    there = [x.detach().to("cuda:1") for x in (*inputs, *gradients)]
    got = both_ways(backend, *(x.requires_grad_() for x in there[:5]), there[5:])
    assert [torch.equal(x.cpu(), y.cpu()) for x, y in zip(got, want, strict=True)] == [True] * 8


def test_the_backends_agree():
    """On a text long enough to be cut in segments, where neither has float64 beside it."""
    inputs, gradients = draw(20_000, 16, 64, torch.bfloat16, (2, 2, 2), 1, device="cuda")
    a, b = (run(backend, inputs, gradients) for backend in BACKENDS)
    assert max(off(a, b).values()) < 1.5e-2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", (True, False))
def test_agrees_with_an_independent_implementation(backend, normalize):
    """fla's parallel_based, outputs alone, from nothing: it has no State."""
    based = pytest.importorskip("fla.ops.based")
    (q, k, v, _, _), _ = draw(1024, 16, 64, torch.bfloat16, (4, 4, 4), 2, rows=2, device="cuda")
    want = based.parallel_based(q, k, v, scale=16**-0.5, use_norm=normalize)
    y, _ = taylor_attention(q, k, v, normalize=normalize, backend=backend)
    assert relative_error(y, want, (0, 2)) < 2e-2
