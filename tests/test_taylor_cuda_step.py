"""Taylor attention's CUDA step without a GPU: emulated beside the definition, and compiled by NVRTC for GPUs elsewhere.

tests/cuda runs the kernel's own text, 16-bit inputs and fp32 sums. Skipped where g++ is not installed.
"""

import shutil
from functools import partial

import pytest
import torch
from ahead_of_time import cubin_usage
from emulate import STATIC_SHARED, EmulationError, emulate_step
from taylor_steps import VARIANTS, a_state, draw, pool_of, put, taken

from linattn.core import laws, nvrtc
from linattn.core.dispatch import Backend, Call, anything, choose
from linattn.core.laws import Subject
from linattn.core.numerics import relative_error
from linattn.mixers import taylor
from linattn.mixers.taylor import chunked, cuda_step, operators, pools
from linattn.mixers.taylor.cases import TaylorCase
from linattn.mixers.taylor.chunked import TaylorState

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which builds the emulated kernels")

GROUPED = (
    TaylorCase(2, 20, 4, 16, 32, "two queries a State", k_heads=2, v_heads=2),
    TaylorCase(2, 20, 4, 16, 32, "shared queries and keys", q_heads=2, k_heads=1),
    TaylorCase(2, 20, 2, 16, 48, "sums that are not divided", normalize=False),
)
LIMITS = {torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""Of y beside the definition on the same inputs, rounded once."""
READ_COPY = 4e-3
"""What reading S in bfloat16 adds."""


@pytest.fixture
def emulated(monkeypatch, emulated_kernels):
    emulate_step(monkeypatch, emulated_kernels)


def errors(variant, V, dtype, heads=(2, 2, 2), tokens=4, recent=3, normalize=True, slots_dtype=torch.int32):
    """Of y of every token and of the last State, against float64 on the same inputs; rows 1 and 3 of 4 have slots."""
    q, k, v = draw(dtype, 16, V, heads, 4, tokens)
    state = a_state(16, V, max(heads[1:]), 2)
    slots, rows = torch.tensor([2, 0], dtype=slots_dtype), torch.tensor([-1, 2, 99, 0], dtype=slots_dtype)
    pool, want_pool = pool_of(variant, state, 3, dtype, recent), taylor.new_pool(state, 3)
    want_pool = TaylorState(*(leaf.double() for leaf in want_pool))
    for leaf in (leaf for leaf in pool if leaf is not None):
        leaf.fill_(float("nan") if leaf.is_floating_point() else 2**31 - 1)
    put(pool, slots, state)
    taylor.put_(want_pool, slots, state)
    before = [None if leaf is None else leaf.clone() for leaf in pool]
    got, want = [], []
    for t in range(tokens):
        got.append(cuda_step.step_(q[t], k[t], v[t], pool, rows, 0.25, normalize))
        token = (x[t, [1, 3]].double() for x in (q, k, v))
        want.append(chunked.step_(*token, want_pool, slots, scale=0.25, normalize=normalize))
    got = torch.stack(got)
    assert got[:, [0, 2]].count_nonzero() == 0, "an idle row's output"
    leaves = [(leaf, old) for leaf, old in zip(pool, before, strict=True) if leaf is not None]
    for leaf, old in leaves:
        assert torch.equal(leaf[[1, 3]].nan_to_num(7), old[[1, 3]].nan_to_num(7)), "a slot that no row names"
    states = zip(taken(pool, slots), taylor.take(want_pool, slots), strict=True)
    found = {"y": relative_error(got[:, [1, 3]], torch.stack(want), (1, 2))}
    return found | {"state": max(relative_error(a, b, (0, 1)) for a, b in states)}


def overstepped(variant, V, dtype, **settings):
    """Errors over their limits, as multiples of those."""
    limits = {"y": LIMITS[dtype] + (READ_COPY if variant == "copy" else 0), "state": 2e-6}
    found = errors(variant, V, dtype, **settings)
    return {name: error / limits[name] for name, error in found.items() if not error <= limits[name]}


@needs_gxx
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("V", (32, 64, 80, 112))
def test_steps_are_the_definition(emulated, V, variant, dtype):
    """Beside slots full of NaN, which no row names, and rows that are idle or out of the pool."""
    assert overstepped(variant, V, dtype) == {}


@needs_gxx
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("heads", ((4, 2, 2), (2, 2, 4), (6, 1, 2), (8, 1, 1)), ids=str)
def test_grouped_heads(emulated, heads, variant):
    """Of q, k and v; the State's are the larger of k's and v's."""
    assert overstepped(variant, 32, torch.bfloat16, heads=heads) == {}


@needs_gxx
@pytest.mark.parametrize("recent", (2, 8, 16))
@pytest.mark.parametrize("variant", ("deferred", "copy"))
def test_every_number_of_waiting_tokens(emulated, variant, recent):
    """Two foldings of each."""
    assert overstepped(variant, 32, torch.bfloat16, heads=(1, 1, 1), tokens=2 * recent + 1, recent=recent) == {}


@needs_gxx
@pytest.mark.parametrize("variant", VARIANTS)
def test_sums_that_are_not_divided_and_slots_of_64_bits(emulated, variant):
    settings = {"normalize": False, "slots_dtype": torch.int64}
    assert overstepped(variant, 48, torch.bfloat16, **settings) == {}


@needs_gxx
@pytest.mark.parametrize("case", GROUPED, ids=lambda case: case.source)
def test_decode_is_the_fold(emulated, monkeypatch, case):
    backend = Backend("cuda", anything, chunked.forward, partial(operators.step_by, "cuda"))
    monkeypatch.setattr(taylor, "BACKENDS", (backend,))
    assert laws.decode_is_the_fold(Subject(taylor.MIXER, case, "cuda", torch.bfloat16), 9, 2) == []


@needs_gxx
def test_the_copy_is_the_rounded_state(emulated):
    q, k, v = draw(torch.float16, 16, 32, (2, 2, 2), 2, 2)
    pool, slots = pool_of("copy", a_state(16, 32, 2, 2), 2, torch.float16, recent=2), torch.arange(2)
    put(pool, slots, a_state(16, 32, 2, 2))
    for t in range(2):
        cuda_step.step_(q[t], k[t], v[t], pool, slots, 0.25, True)
    assert not torch.equal(pool.S[:2], a_state(16, 32, 2, 2).S)
    assert torch.equal(pool.copy[:2], pool.S[:2].bfloat16())
    assert pool.count[:2].tolist() == [[0, 0], [0, 0]]


PLANTED = (
    ("a square weighs 1", "0.70710678118654752f", "1.f"),
    ("a product of the pair beside it", "return {i, i + rest};", "return {i, i + rest - (rest > 0)};"),
    ("no constant", "const float product = (i < 0 ? 1.f", "const float product = (i < 0 ? 0.f"),
    ("a token is not added", "add(state[m], shared.written[n][m", "add(state[m], 0 * shared.written[n][m"),
    ("the last feature is not added", "if (m * ROWS + first < P) add(state", "if (m * ROWS + first < P - 1) add(state"),
    ("z misses a token", "for (int n = 0; n <= waiting; n++) sums[m]", "for (int n = 1; n <= waiting; n++) sums[m]"),
    ("z is not written", "z[p] = sums[m];", ";"),
    ("S is not written", "S[m * THREADS] = state[m];", ";"),
    ("the divisor of one warp", "i < WARPS; i++) by", "i < 1; i++) by"),
    ("the scale is forgotten", "* g.scale;", "* 1.f;"),
    ("an idle row takes the first slot", "slot = g.slots[row]", "slot = max(g.slots[row], (SLOT)0)"),
    ("a barrier left out", "g.scale;\n    sync_block();", "g.scale;"),
)
PLANTED_DEFERRED = (
    ("w without its square", "1.f + s + 0.5f * s * s", "1.f + s"),
    ("the token itself is not read", "int token = 0; token <= waiting", "int token = 1; token <= waiting"),
    ("tokens that never came are read", "int token = 0; token <= waiting", "int token = 0; token < TOKENS"),
    ("a token waits where another does", "recent_k[waiting * F + t]", "recent_k[t]"),
    ("its value waits elsewhere", "recent_v[waiting * V + t]", "recent_v[t]"),
    ("a token more is folded", "*count = fold ? 0", "*count = fold ? 1"),
    ("z is written without a folding", "if (fold) {\n            for", "if (true) {\n            for"),
)


@needs_gxx
@pytest.mark.parametrize(
    "variant, old, new",
    [("plain", *x[1:]) for x in PLANTED] + [("deferred", *x[1:]) for x in PLANTED_DEFERRED],
    ids=[x[0] for x in PLANTED + PLANTED_DEFERRED],
)
def test_a_planted_bug_is_caught(monkeypatch, emulated_kernels, variant, old, new):
    """By twice its limit or more, by a slot that changed, or by the emulator."""
    emulate_step(monkeypatch, emulated_kernels, ("decode.cu", old, new))
    try:
        over = overstepped(variant, 32, torch.bfloat16, tokens=5)
    except (EmulationError, AssertionError) as error:
        over = {str(error): 2}
    assert max(over.values(), default=0) >= 2, over


COMPILED = [(90, V, True, variant, 1) for V in (64, 112) for variant in VARIANTS]
COMPILED += [(80, 64, False, "plain", 1), (89, 112, True, "deferred", 1)]
COMPILED += [(90, 32, True, "plain", 4), (90, 128, True, "copy", 8)]
"""Capability, value dim, bfloat16, pool, query heads of a State."""


@pytest.mark.skipif(bool(nvrtc.refusals()), reason="needs NVRTC: pip install nvidia-cuda-nvrtc")
@pytest.mark.parametrize("capability, V, bf16, variant, readers", COMPILED, ids=str)
def test_compiles_ahead_of_time(capability, V, bf16, variant, readers, tmp_path, record_property):
    """For GPUs that are not here. Bytes a thread."""
    pytest.importorskip("triton")
    waiting = 0 if variant == "plain" else 16 if readers > 1 else 8
    flags = {"SLOT": "int", "READERS": readers, "NORMALIZE": 1, "WAITING": waiting, "COPY": int(variant == "copy")}
    flags |= {"Q_GROUP": 1, "K_GROUP": 1, "V_GROUP": 1}
    defines = cuda_step.defines_of(V, bf16, tuple(flags.items()))
    usage = cubin_usage(nvrtc.compile_kernel(cuda_step.SOURCES, defines, divmod(capability, 10)), tmp_path)
    for name, value in usage.items():
        record_property(name, value)
    assert usage["shared"] <= STATIC_SHARED
    assert usage["registers"] * cuda_step.threads_of(V) * defines["RESIDENT"] <= 65_536
    assert usage["spilled"] <= 32


def call(V=64, dtype=torch.bfloat16, heads=(2, 2, 2), op="taylor_step_", waiting=None, off=0, **strides):
    n_state, P = max(heads[1:]), 153
    shapes = {"q": (3, heads[0], 16), "k": (3, heads[1], 16), "v": (3, heads[2], V)}
    shapes |= {"S": (5, n_state, P, V), "z": (5, n_state, P)}
    if waiting:
        shapes |= {"recent_k": (5, n_state, waiting, 16), "recent_v": (5, n_state, waiting, V), "count": (5, n_state)}
    contiguous = {name: torch.empty(shape, device="meta").stride() for name, shape in shapes.items()}
    return Call(op, shapes, contiguous | strides, dtype, "cuda", (9, 0), options={"off": off})


@pytest.fixture
def all_is_here(monkeypatch):
    monkeypatch.setattr(nvrtc, "refusals", list)
    monkeypatch.setattr("linattn.mixers.taylor.operators.machine_refusals", lambda call: [])


@pytest.mark.parametrize(
    "left, reason",
    [
        (call(V=72), "multiple of 16 from 32 to 128, got 72"),
        (call(dtype=torch.float32), "bfloat16 or float16 inputs, got torch.float32"),
        (call(heads=(9, 1, 1)), "at most 8 query heads a State, got 9"),
        (call(waiting=17), "at most 16 waiting tokens, got 17"),
        (call(S=(153 * 2 * 64 + 2, 153 * 64, 64, 1)), "heads of S 4 numbers apart or a multiple"),
        (call(waiting=8, recent_v=(1024 + 8, 512 + 4, 64, 1)), "heads of recent_v 8 numbers apart"),
        (call(off=4), "begin at multiples of 16 bytes, this one is 4 off"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_left_to_triton(all_is_here, left, reason):
    backends = pools.BACKENDS if "recent_k" in left.shapes else taylor.BACKENDS
    assert any(reason in words for words in operators.refuses_cuda(left))
    assert choose(backends, left).name == "triton"


@pytest.mark.parametrize(
    "left, name",
    [
        (call(S=(153 * 2 * 68, 153 * 68, 68, 1)), "S"),
        (call(z=(306, 1, 2)), "z"),
        (call(waiting=8, count=(1, 5)), "count"),
        (call(waiting=8, recent_k=(2 * 8 * 24, 8 * 24, 24, 1)), "recent_k"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_pools_whose_heads_are_in_pieces_are_left_to_torch(all_is_here, left, name):
    """Triton's step would take one number for another."""
    for refuses in (operators.refuses, operators.refuses_cuda):
        assert any(f"each head's {name} contiguous" in words for words in refuses(left))
    assert choose(pools.BACKENDS if "recent_k" in left.shapes else taylor.BACKENDS, left).name == "torch"


def test_what_is_not_refused(all_is_here):
    one_head = call(heads=(1, 1, 1), waiting=8, count=(1, 5), S=(153 * 64, 7, 64, 1))
    for fine in (call(), one_head, call(V=112, dtype=torch.float16), call(heads=(8, 1, 1)), call(waiting=16)):
        assert choose(pools.BACKENDS if "recent_k" in fine.shapes else taylor.BACKENDS, fine).name == "cuda"


def test_a_pool_off_its_alignment_is_refused_in_words():
    memory = torch.zeros(2 * 153 * 32 + 1)
    state = TaylorState(memory[1:].view(2, 1, 153, 32), torch.zeros(2, 1, 153))
    q, k, v = (x[0] for x in draw(torch.bfloat16, 16, 32, (1, 1, 1), 1))
    with pytest.raises(ValueError, match="must begin at a multiple of 16 bytes"):
        cuda_step.step_(q, k, v, state, torch.zeros(1, dtype=torch.int32), 0.25, True)
