"""Taylor attention's decoding kernels on a GPU: every dtype, head grouping, walk and pool, on the shapes of Based.

Command: pytest -m gpu tests/gpu/test_taylor_step_gpu.py
"""

from functools import partial

import pytest
import taylor_steps
import torch
from taylor_steps import VARIANTS, pool_of, put, taken

from linattn.core.numerics import TORCH_TOLERANCE, relative_error
from linattn.mixers.taylor import chunked, features, n_features, new_pool, operators, put_, take
from linattn.mixers.taylor.chunked import TaylorState

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),
]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HALVES = DTYPES[:2]
BACKENDS = ("cuda", "triton")
SHAPES = ((16, 64), (16, 112), (8, 64), (24, 64), (32, 128), (4, 5), (16, 256), (3, 7))
GROUPS = ((4, 4, 4), (8, 2, 2), (2, 2, 4), (6, 1, 2))
"""Heads of q, k and v."""


draw, a_state = (partial(make, device="cuda") for make in (taylor_steps.draw, taylor_steps.a_state))


def step(q, k, v, pool, slots, scale=0.25, normalize=True, walk=None, backend="triton"):
    from linattn.mixers.taylor import cuda_step, triton_step, triton_step_deferred

    if backend == "cuda":
        return cuda_step.step_(q, k, v, pool, slots, scale, normalize)
    run = triton_step.step_ if isinstance(pool, TaylorState) else triton_step_deferred.step_deferred_
    return run(q, k, v, *pool, slots, scale, normalize, walk)


def truth(state):
    return TaylorState(*(leaf.double() for leaf in state))


def errors(variant, dtype, F, V, heads, rows, tokens=7, normalize=True, recent=3, **how):
    """Of y (every row and head of every token) and of the last State, against float64 on the same inputs."""
    q, k, v = draw(dtype, F, V, heads, rows, tokens)
    n_state = max(heads[1:])
    state = a_state(F, V, n_state, rows)
    generator = torch.Generator().manual_seed(1)
    slots = torch.randperm(rows + 2, generator=generator)[:rows].to("cuda", torch.int32)
    pool, want_pool = pool_of(variant, state, rows + 2, dtype, recent), new_pool(truth(state), rows + 2)
    put(pool, slots, state)
    put_(want_pool, slots, truth(state))
    got, want = [], []
    for t in range(tokens):
        got.append(step(q[t], k[t], v[t], pool, slots, normalize=normalize, **how))
        token = (x[t].double() for x in (q, k, v))
        want.append(chunked.step_(*token, want_pool, slots, scale=0.25, normalize=normalize))
    outputs = relative_error(torch.stack(got), torch.stack(want), (1, 2))
    states = zip(taken(pool, slots), take(want_pool, slots), strict=True)
    return outputs, max(relative_error(a, b, (0, 1)) for a, b in states)


def limit(variant, dtype):
    """bf16 keeps 8 bits of S: where that is read it is what bounds an output of fp32 or fp16."""
    return max(2 * TORCH_TOLERANCE[dtype], 8e-3 if variant == "copy" else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("F, V", SHAPES)
def test_steps_are_the_fold(F, V, variant, dtype):
    outputs, states = errors(variant, dtype, F, V, (4, 4, 4), 3)
    assert outputs <= limit(variant, dtype)
    assert states <= 2e-6


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("V", range(32, 129, 16))
def test_steps_by_cuda_are_the_fold(V, variant, dtype):
    outputs, states = errors(variant, dtype, 16, V, (4, 4, 4), 3, backend="cuda")
    assert outputs <= limit(variant, dtype)
    assert states <= 2e-6


@pytest.mark.parametrize("variant", ("deferred", "copy"))
@pytest.mark.parametrize("recent", (2, 5, 8, 16))
def test_every_number_of_waiting_tokens(recent, variant):
    outputs, states = errors(
        variant, torch.bfloat16, 16, 112, (2, 2, 2), 3, 2 * recent + 1, recent=recent, backend="cuda"
    )
    assert outputs <= limit(variant, torch.bfloat16)
    assert states <= 2e-6


@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("heads", (*GROUPS, (8, 1, 1)), ids=str)
@pytest.mark.parametrize(
    "backend, dtype", [("triton", torch.float32), ("triton", torch.bfloat16), ("cuda", torch.bfloat16)]
)
def test_grouped_heads(backend, dtype, heads, variant, normalize):
    outputs, states = errors(variant, dtype, 16, 64, heads, 3, normalize=normalize, backend=backend)
    assert outputs <= limit(variant, dtype)
    assert states <= 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows", (1, 2, 15, 17, 128, 1024, 4096))
def test_every_batch(rows, variant, backend):
    """Both sides of where the walk changes; each row and head is held to its own scale."""
    V = 64 if rows < 4096 else 32
    outputs, states = errors(variant, torch.bfloat16, 16, V, (2, 2, 2), rows, tokens=4, backend=backend)
    assert outputs <= 3 * TORCH_TOLERANCE[torch.bfloat16]
    assert states <= 4e-6


WALKS = (
    (1, 1, 1),
    (1, 2, 2),
    (1, 4, 2),
    (1, 4, 3),
    (2, 2, 1),
    (2, 2, 2),
    (2, 4, 1),
    (2, 4, 2),
    (4, 4, 1),
    (4, 16, 1),
    (16, 16, 1),
)
"""Shifts, warps, stages."""


@pytest.mark.parametrize("walk", WALKS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("F, V", ((16, 64), (16, 112), (32, 128), (8, 40)))
def test_every_walk(F, V, variant, walk):
    """Triton 3.4 to 3.7 miscompiles some kernels on Hopper, so no shape of tile goes unchecked."""
    from linattn.mixers.taylor.triton_step import blocks_of

    BF, BV, _ = blocks_of(F, V)
    fits = (walk[0], min(walk[1], walk[0] * BF * BV // 32), walk[2])
    outputs, states = errors(variant, torch.float32, F, V, (2, 2, 2), 5, walk=fits)
    assert outputs <= limit(variant, torch.float32)
    assert states <= 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_slots_that_no_row_names_are_neither_read_nor_written(variant, backend):
    q, k, v = (x[0] for x in draw(torch.bfloat16, 16, 112, (4, 4, 4), 4))
    state, slots = a_state(16, 112, 4, 2), torch.tensor([-1, 3, 1, 99], device="cuda", dtype=torch.int32)
    pool = pool_of(variant, state, 5, torch.bfloat16)
    leaves = [leaf for leaf in pool if leaf is not None]
    for leaf in leaves:
        leaf.fill_(float("nan") if leaf.is_floating_point() else 2**31 - 1)
    put(pool, slots[1:3], state)
    before = [leaf.clone() for leaf in leaves]
    for _ in range(4):
        y = step(q, k, v, pool, slots, backend=backend)
        assert torch.isfinite(y).all()
    idle = [0, 2, 4, 5]
    assert all(torch.equal(x[idle].nan_to_num(7), y[idle].nan_to_num(7)) for x, y in zip(leaves, before, strict=True))
    phi = features(k[1:3].float())
    got = taken(pool, slots[1:3])
    assert relative_error(got.S, state.S + 4 * phi[..., None] * v[1:3, :, None].float()) < 2e-6
    assert relative_error(got.z, state.z + 4 * phi) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_repeated_steps_agree_bit_for_bit(variant, backend):
    """A program owns what it writes: nothing depends on which comes first."""
    q, k, v = draw(torch.bfloat16, 16, 112, (16, 16, 16), 64, 9)
    state, slots = a_state(16, 112, 16, 64), torch.arange(64, device="cuda", dtype=torch.int32)
    runs = []
    for _ in range(3):
        pool = pool_of(variant, state, 64, torch.bfloat16)
        put(pool, slots, state)
        runs.append(
            [step(q[t], k[t], v[t], pool, slots, backend=backend) for t in range(9)]
            + [x for x in pool if x is not None]
        )
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_copy_is_the_rounded_state(backend):
    q, k, v = draw(torch.bfloat16, 16, 112, (4, 4, 4), 3, 3)
    state, slots = a_state(16, 112, 4, 3), torch.arange(3, device="cuda", dtype=torch.int32)
    pool = pool_of("copy", state, 3, torch.bfloat16)
    put(pool, slots, state)
    for t in range(3):
        step(q[t], k[t], v[t], pool, slots, backend=backend)
    assert not torch.equal(pool.S[:3], state.S)
    assert torch.equal(pool.copy[:3], pool.S[:3].bfloat16())
    assert pool.count.sum() == 0


def replayed(run, tokens):
    """Run once to compile, capture, and replay for each further token; ``run`` reads the tensors ``tokens`` fills."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for fill in tokens:
        fill()
        graph.replay()
        yield y.clone()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_runs_in_a_cuda_graph(variant, backend):
    """Seven replays fold twice each slot, and slots change between them."""
    q, k, v = draw(torch.bfloat16, 16, 112, (4, 4, 4), 3, 7)
    state = a_state(16, 112, 4, 3)
    order = [torch.tensor(x, device="cuda", dtype=torch.int32) for x in ([0, 1, 2], [2, -1, 0])]
    pool, eager = (pool_of(variant, state, 3, torch.bfloat16) for _ in range(2))
    at = [x[0].clone() for x in (q, k, v)]
    slots = order[0].clone()

    def fill(t):
        def run():
            for x, new in zip((*at, slots), (q[t], k[t], v[t], order[t % 2]), strict=True):
                x.copy_(new)

        return run

    def started():
        put(pool, order[0], state)
        return fill(0)()

    graph = replayed(lambda: step(*at, pool, slots, backend=backend), [started, *[fill(t) for t in range(1, 7)]])
    put(eager, order[0], state)
    for t, y in enumerate(graph):
        assert torch.equal(y, step(q[t], k[t], v[t], eager, order[t % 2], backend=backend))
    assert torch.equal(pool.S[:3], eager.S[:3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_without_a_graph_break(variant, backend):
    q, k, v = (x[0] for x in draw(torch.bfloat16, 16, 64, (4, 4, 4), 3))
    state, slots = a_state(16, 64, 4, 3), torch.arange(3, device="cuda", dtype=torch.int32)
    a, b = (pool_of(variant, state, 3, torch.bfloat16) for _ in range(2))
    put(a, slots, state)
    put(b, slots, state)

    def run(q, pool):
        if variant == "plain":
            return 2 * operators.taylor_step(q * 1.0, k, v, *pool, slots, 0.25, True, backend)
        return 2 * operators.taylor_step_deferred(q * 1.0, k, v, *pool, slots, 0.25, True, backend)

    assert torch.equal(torch.compile(run, fullgraph=True)(q, a), run(q, b))
    assert all(torch.equal(x, y) for x, y in zip(taken(a, slots), taken(b, slots), strict=True))


@pytest.mark.parametrize(
    "backend, dtype", [*(("triton", dtype) for dtype in DTYPES), *(("cuda", dtype) for dtype in HALVES)]
)
def test_10_000_tokens(backend, dtype, record_property):
    """The whole of decoding, token by token: what 10,000 foldings and a 16-bit copy cost against float64.

    Limits are of y's rms: fp32 sums stay at 2e-5, the copy near bf16's own rounding.
    """
    q, k, v = draw(dtype, 16, 112, (2, 2, 2), 2, 10_000)
    slots = torch.tensor([1, 0], device="cuda", dtype=torch.int32)
    zero = TaylorState(torch.zeros(2, 2, n_features(16), 112, device="cuda"), torch.zeros(2, 2, 153, device="cuda"))
    exact = chunked.summarize(*(x[:9984].transpose(0, 1).double() for x in (k, v)))
    want_pool = new_pool(exact, 2)
    put_(want_pool, slots, exact)
    want = []
    for t in range(9984, 10_000):
        token = (x[t].double() for x in (q, k, v))
        want.append(chunked.step_(*token, want_pool, slots, scale=0.25, normalize=True))
    found = {}
    for variant in VARIANTS:
        pool = pool_of(variant, zero, 2, dtype, recent=8)
        got = [step(q[t], k[t], v[t], pool, slots, backend=backend) for t in range(10_000)][-16:]
        found[variant] = relative_error(torch.stack(got), torch.stack(want), (1, 2))
        record_property(f"{variant} {dtype}", found[variant])
        assert float(taken(pool, slots).z[0, 0, 0]) == 10_000
    rounding = TORCH_TOLERANCE[dtype] if dtype != torch.float32 else 2e-5
    assert max(found["plain"], found["deferred"]) <= rounding, found
    assert found["copy"] <= rounding + 5e-3, found
