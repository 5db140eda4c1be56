"""Window attention's Triton kernels without a GPU: the laws through the interpreter, and compiled ahead of time.

The interpreter has no bfloat16 products, so the laws run in float32. Skipped where triton is not installed.
"""

import os

import pytest
import torch
from torch._subclasses import FakeTensorMode

if torch.cuda.is_available():
    pytest.skip("the interpreter's kernels would take the place of the GPU's", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read when triton itself is first imported
pytest.importorskip("triton")

import triton
import triton.language as tl
from ahead_of_time import SHARED, Build, usage

from linattn.core import laws, tiles
from linattn.core.dispatch import Backend, Call, anything, choose
from linattn.core.laws import Subject
from linattn.core.numerics import relative_error
from linattn.mixers import window
from linattn.mixers.window import operators, triton_backward, triton_forward
from linattn.mixers.window import triton as kernels
from linattn.mixers.window.cases import WindowCase
from linattn.mixers.window.reference import window_reference

# The interpreter of triton 3.6 turns arrays of one element into loop bounds, which numpy deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),  # a document of NaN, which a law plants
]

CASES = (
    WindowCase(2, 130, 2, 8, 65, "two dims that no block holds exactly", value_dim=12),
    WindowCase(2, 130, 1, 4, 1, "self alone: a State of no rows"),
    WindowCase(2, 130, 1, 4, 2, "self and one before, a scale of one's own", scale=1.5),
    WindowCase(2, 130, 1, 8, 129, "Based 360M's window: a State longer than a block"),
    WindowCase(1, 130, 6, 4, 5, "grouped queries: k and v have fewer heads", value_dim=3, kv_heads=2),
)
LAWS = {
    "parity": (0, 3),
    "parity_from_state": range(5),
    "a_split_is_the_whole": (1, 3, 4),
    "packed_is_alone": (0, 1, 3, 4),
    "nothing_is_uninitialised": (0, 1, 4),
}
"""Which cases each is asked about, of cases that share their dims, windows or heads; about all in the slow tests."""


def id_of(x):
    return x if isinstance(x, str) else x.name


@pytest.fixture
def interpreted(monkeypatch):
    backends = (Backend("triton", anything, operators.forward, operators.step_),)
    monkeypatch.setattr(window, "BACKENDS", backends)


@pytest.mark.parametrize("law, case", [(law, CASES[i]) for law, cases in LAWS.items() for i in cases], ids=id_of)
def test_laws(interpreted, law, case):
    assert laws.LAWS[law](Subject(window.MIXER, case, "triton", torch.float32)) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=id_of)
@pytest.mark.parametrize("law", LAWS)
def test_laws_of_every_case(interpreted, law, case):
    assert laws.LAWS[law](Subject(window.MIXER, case, "triton", torch.float32)) == []


def test_blocks_of_unequal_sides(interpreted, monkeypatch):
    """Many blocks in 90 tokens, and queries that are not as many as keys."""
    tiles = {
        key: kernels.Tile(16, 32, 4, 1) if key[0] == "query" else kernels.Tile(32, 16, 4, 1) for key in kernels.PLAIN
    }
    monkeypatch.setattr(kernels, "PLAIN", tiles)
    assert laws.parity_from_state(Subject(window.MIXER, CASES[0], "triton", torch.float32), 90) == []


@pytest.mark.parametrize("case", CASES, ids=id_of)
def test_decode_is_the_fold(interpreted, case):
    subject, length = Subject(window.MIXER, case, "triton", torch.float32), min(case.window, 66) + 8
    assert laws.decode_is_the_fold(subject, length, max(0, length - 12)) == []


STEPS = (
    (16, 64, 129, (128, 4)),
    (256, 128, 129, (64, 4)),
    (2048, 64, 129, (32, 2)),
    (2048, 128, 129, (16, 2)),
    (2048, 512, 129, (16, 8)),
    (2048, 4096, 129, (16, 16)),
    (2048, 64, 1, (16, 1)),
)
"""Programs, numbers a key, the window, and the keys and warps that follow."""


@pytest.mark.parametrize("programs, side, window, walk", STEPS, ids=str)
def test_how_a_step_walks_its_ring(programs, side, window, walk):
    """Few programs hold much each, many hold little; never less than 16 keys, nor more than the ring has."""
    assert kernels.walk_for(programs, side, window) == walk


def test_a_ring_read_in_pieces_is_the_ring(interpreted):
    """Three pieces of 16 keys, the last of one, after 0 to 60 tokens; fresh rings hold NaN."""
    q, k, v = (torch.randn(1, 60, 1, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    want, _ = window_reference(q.double(), k.double(), v.double(), window=34)
    ring_k, ring_v = (torch.full((2, 34, 1, 16), float("nan")) for _ in range(2))
    tokens, slot = torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    pool = (ring_k, ring_v, tokens, slot, 0.25)
    steps = [kernels.step_(q[:, t], k[:, t], v[:, t], *pool, walk=(16, 4)) for t in range(60)]
    assert relative_error(torch.stack(steps, 1), want, (1, 2)) < 1e-5
    assert tokens.tolist() == [60, 0]


@triton.jit
def _one_more(i, j, W: tl.constexpr):
    return (j <= i) & (j >= i - W)


@triton.jit
def _one_late(i, j, W: tl.constexpr):
    return (j <= i) & (j > i - W + 1)


@pytest.mark.parametrize("kernel", (triton_forward, triton_backward), ids=("forward", "backward"))
@pytest.mark.parametrize("mask", (_one_more, _one_late), ids=("one more", "one late"))
def test_a_mask_off_by_one_is_caught(interpreted, monkeypatch, mask, kernel):
    monkeypatch.setattr(kernel, "_near", mask)
    assert laws.parity(Subject(window.MIXER, CASES[0], "triton", torch.float32), 70) != []


@pytest.mark.parametrize("step", (-1, 2), ids=("not raised enough", "raised twice"))
def test_a_count_off_by_one_is_caught(interpreted, step):
    """What a program would read if the last to arrive were not the one to raise a slot's count."""
    subject = Subject(window.MIXER, CASES[0], "triton", torch.float32)
    backend = window.BACKENDS[0]

    def wrong(*args, **options):
        y = backend.step_(*args, **options)
        args[3].tokens.add_(step - 1)
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window, "BACKENDS", (Backend("triton", anything, backend.forward, wrong),))
        assert laws.decode_is_the_fold(subject, 12, 6) != []


def test_a_packed_qkv_is_read_where_it_lies(interpreted):
    qkv = torch.randn(2, 40, 3, 2, 8, generator=torch.Generator().manual_seed(0))
    views = [qkv[:, :, i] for i in range(3)]
    y, _ = window.window_attention(*views, window=9, return_state=False, backend="triton")
    assert torch.equal(y, window.window_attention(*(x.contiguous() for x in views), window=9, backend="triton")[0])


def test_gradients_of_keys_do_not_see_y_rounded(interpreted):
    """A State's one key where its weight is near 1: p (dp - delta) is less than what rounding y does to dy . y."""
    q, k, v, state_k, state_v, dy = (
        torch.randn(1, n, 1, 16, generator=torch.Generator().manual_seed(i)) for i, n in enumerate((5, 5, 5, 1, 1, 5))
    )
    state_k += 2 * q[:, :1]
    count, call = torch.ones(1, dtype=torch.int32), (q, k, v, state_k, state_v)
    leaves = [x.double().requires_grad_() for x in call]
    want, _ = window_reference(*leaves[:3], window=2, scale=0.3, initial_state=(*leaves[3:], count))
    want = torch.autograd.grad(want, leaves, dy.double())
    y, lse = kernels.forward(*call, count, None, 2, 0.3)
    _, *got = kernels.backward(dy, y.bfloat16().float(), lse, *call, count, None, 2, 0.3)
    assert float(want[3].abs().max()) < 1e-2
    assert [relative_error(a, b, (), 0.0) < 1e-4 for a, b in zip(got, want[1:], strict=True)] == [True] * 4


def test_packed_blocks_are_found_among_many_documents(interpreted):
    """140 documents: the search reads 128 offsets at a time."""
    lengths = torch.arange(140) % 3
    cu = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32)
    T = int(cu[-1])
    q, k, v = (torch.randn(1, T, 1, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    y, _ = kernels.forward(q, k, v, None, None, None, cu, 2, 0.5)
    want = [
        window_reference(*(x[:, a:b].double() for x in (q, k, v)), window=2, scale=0.5)[0]
        for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)
        if b > a
    ]
    assert relative_error(y, torch.cat(want, 1), (1,)) < 1e-5


KERNELS = {
    "forward": "triton_forward._forward",
    "query": "triton_backward._query_gradient",
    "key": "triton_backward._key_gradient",
}
BLOCKS = ((64, "packed"), (64, "state"), (112, "state"))
STEPPED = ((64, "plain"), (112, "grouped"), (64, "many"), (112, "many"), (112, "many, grouped"))
BUILT = [(which, *x) for which in KERNELS for x in BLOCKS] + [("step", *x) for x in STEPPED]


def build(which, dim, variant, capability):
    types = {"fp32": "scale", "*fp32": "lse deltas", "*i32": "count cu_seqlens slots"}
    types["*bf16"] = "q k v y dy dq dk dv state_k state_v ring_k ring_v"
    constants = {"W": 129, "D": dim, "V": dim, "HEADS": 16, "GROUP": 4 if "grouped" in variant else 1}
    folder = "linattn.mixers.window"
    if which == "step":
        side, group = tiles.block_of(dim), constants["GROUP"]
        keys, warps = kernels.walk_for(2048 if "many" in variant else 16, side * group, 129)
        constants |= {"BD": side, "BV": side, "BLOCK_GROUP": group, "KEYS": keys}
        return Build(f"{folder}.triton_step._step", warps, constants, types | {"*i64": "tokens"})
    BD, BV = kernels.sides_of(dim, dim)
    tile = (kernels.HOPPER if capability >= 90 else kernels.PLAIN)[which, BD]
    constants |= {"BD": BD, "BV": BV, "PACKED": variant == "packed"}
    constants |= dict.fromkeys(("INITIAL", "STATE"), variant == "state")
    constants |= {"QUERIES": tile.queries, "KEYS": tile.keys, "STAGES": tile.stages}
    return Build(f"{folder}.{KERNELS[which]}", tile.warps, constants, types)


@pytest.mark.parametrize("capability", (80, 89, 90))
def test_compiles_ahead_of_time(capability, record_property):
    """Every tile that can be chosen, for GPUs that are not here; next to nothing may spill (bytes a thread).

    On Hopper dk and dv at side 128 spill 80 to 208, and are faster so than with eight warps that do not.
    """
    used = usage(capability, {f"{which} {dim} {x}": build(which, dim, x, capability) for which, dim, x in BUILT})
    for variant, found in used.items():
        for name, value in found.items():
            record_property(f"{variant} {name}", value)
    assert [x["shared"] <= SHARED[capability] for x in used.values()] == [True] * len(used), used
    most = dict.fromkeys(used, 64) if capability < 90 else dict.fromkeys(used, 0) | {"key 112 state": 208}
    assert {name: x for name, x in used.items() if x["spilled"] > most[name]} == {}


def call(dtype=torch.bfloat16, dim=64, device="cuda", capability=(9, 0), inner=1, rows=2, op="window_attention"):
    shape = (rows, 100, 4, dim) if op == "window_attention" else (rows, 4, dim)
    strides = (400 * dim, 4 * dim, dim, inner)[4 - len(shape) :]
    shapes, strides = (dict.fromkeys(("q", "k", "v"), x) for x in (shape, strides))
    return Call(op, shapes, strides, dtype, device, capability)


@pytest.mark.parametrize(
    "refused, reason",
    [
        (call(device="cpu", capability=None), "the inputs are on cpu"),
        (call(dtype=torch.float32), "bfloat16 or float16"),
        (call(dtype=torch.float64, op="window_step_"), "bfloat16 or float16"),
        (call(dim=136), "head dims up to 128, k's is 136"),
        (call(capability=(7, 5)), "compute capability 8.0"),
        (call(inner=2), "contiguous along its last axis"),
        (call(rows=70_000), "at most 60000 rows"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refusals(monkeypatch, refused, reason):
    monkeypatch.setattr(tiles, "TRITON_VERSION", (3, 6))
    assert any(reason in words for words in operators.refuses(refused))
    assert [b.name for b in window.BACKENDS if not b.refuses(refused)] == ["torch"]


def test_what_is_not_refused(monkeypatch):
    monkeypatch.setattr(tiles, "TRITON_VERSION", (3, 6))
    for fine in (
        call(),
        call(dtype=torch.float16, capability=(8, 0)),
        call(dim=112),
        call(dim=70),
        call(op="window_step_", dtype=torch.float32),
    ):
        assert choose(window.BACKENDS, fine).name == "triton"


@pytest.mark.parametrize("packed", (False, True), ids=("rows", "packed"))
def test_fakes_have_the_shapes_of_outputs(packed):
    with FakeTensorMode():
        B, T, D, V, N = (1, 50, 16, 8, 3) if packed else (2, 50, 16, 8, 2)
        q, k = (torch.empty(B, T, heads, D, dtype=torch.bfloat16) for heads in (4, 2))
        v = torch.empty(B, T, 2, V, dtype=torch.bfloat16)
        cu = torch.empty(4, dtype=torch.int32) if packed else None
        state = (k.new_empty(N, 8, 2, D), v.new_empty(N, 8, 2, V), torch.empty(N, dtype=torch.int32))
        y, lse = operators.window_forward(q, k, v, *state, cu, 9, 1.0)
        assert (y.shape, y.dtype, lse.shape, lse.dtype) == ((B, T, 4, V), torch.bfloat16, (B, 4, T), torch.float32)
        grads = operators.window_backward(y, y, lse, q, k, v, *state, cu, 9, 1.0)
        assert [g.shape for g in grads] == [x.shape for x in (q, k, v, *state[:2])]
        assert [g.numel() for g in operators.window_backward(y, y, lse, q, k, v, None, None, None, cu, 9, 1.0)[3:]] == [
            0,
            0,
        ]
        rings = k.new_empty(5, 9, 2, D), v.new_empty(5, 9, 2, V), torch.empty(5, dtype=torch.int64)
        step = operators.window_step(q[:, 0], k[:, 0], v[:, 0], *rings, torch.empty(B, dtype=torch.int32), 1.0)
        assert step.shape == (B, 4, V)
