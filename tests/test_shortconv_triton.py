"""Short convolution's Triton kernels without a GPU: the laws through the interpreter, and compiled ahead of time.

The laws run in float32 and on few rows, because the interpreter takes a row at a time. Skipped where triton is absent.
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
from ahead_of_time import Build, usage

from linattn.core import laws, tiles
from linattn.core.dispatch import Backend, Call, anything
from linattn.core.laws import Subject
from linattn.core.numerics import relative_error
from linattn.mixers import shortconv
from linattn.mixers.shortconv import operators, short_conv, triton_conv
from linattn.mixers.shortconv import triton as kernels
from linattn.mixers.shortconv.cases import ShortConvCase

# The interpreter of triton 3.6 turns arrays of one element into loop bounds, which numpy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

BASED = ShortConvCase(2, 130, 20, 3, "Based's, in two blocks of columns", gate=True, activation="silu")
CASES = (
    BASED,
    ShortConvCase(2, 130, 5, 3, "the filter alone"),
    ShortConvCase(2, 130, 5, 4, "four taps, a bias, no gate", bias=True, activation="silu"),
    ShortConvCase(2, 130, 5, 1, "one tap: a State of no rows", bias=True, gate=True),
    ShortConvCase(2, 130, 5, 6, "more taps than rows in a group", gate=True, activation="silu"),
)
SMALL_TILE = kernels.Tile(16, 8, 3, 4)
"""So small that a few tokens need several programs, and with groups that end inside a stretch of rows."""


@pytest.fixture
def interpreted(monkeypatch):
    backends = (Backend("triton", anything, operators.forward, operators.step_),)
    monkeypatch.setattr(shortconv, "BACKENDS", backends)
    monkeypatch.setattr(kernels, "forward_tile", lambda taps: SMALL_TILE)
    monkeypatch.setattr(kernels, "backward_tile", lambda taps: SMALL_TILE)


def subject(case):
    return Subject(shortconv.MIXER, case, "triton", torch.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("length", (2, 20))
def test_it_is_the_reference(interpreted, case, length):
    assert laws.parity_from_state(subject(case), length) == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("length", (2, 20))
def test_from_nothing_it_is_the_reference(interpreted, case, length):
    assert laws.parity(subject(case), length) == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_decode_is_the_fold(interpreted, case):
    assert laws.decode_is_the_fold(subject(case), length=10) == []


SHORT_DOCUMENTS = (3, 0, 5, 1, 9, 0, 0)
"""Empty ones inside and last, one token, one that ends with a stretch of 8 rows and one that goes over the next."""


@pytest.fixture
def short_documents(monkeypatch):
    monkeypatch.setattr(laws, "DOCUMENTS", SHORT_DOCUMENTS)
    monkeypatch.setattr(laws, "_nan_stays", lambda subject, parts: [])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_packed_documents_are_the_documents_alone(interpreted, short_documents, case):
    assert laws.packed_is_alone(subject(case)) == []


def test_a_nan_stays_in_its_document(interpreted):
    x = torch.randn(1, 33, 5, generator=torch.Generator().manual_seed(0))
    spoiled = x.index_fill(1, torch.arange(9, 20), float("nan")).requires_grad_()
    cu = torch.tensor([0, 9, 9, 20, 33], dtype=torch.int32)
    y, state = short_conv(spoiled, torch.ones(5, 4), gate=spoiled, activation="silu", cu_seqlens=cu)
    others = torch.cat([torch.arange(9), torch.arange(20, 33)])
    (gradient,) = torch.autograd.grad(y[:, others].sum(), spoiled)
    assert torch.isfinite(y[:, others]).all() and torch.isfinite(state.x[[0, 1, 3]]).all()
    assert torch.isfinite(gradient[:, others]).all()


@pytest.mark.parametrize("case", (CASES[0], CASES[3]), ids=lambda case: case.name)
def test_nothing_is_uninitialised(interpreted, short_documents, case):
    assert laws.nothing_is_uninitialised(subject(case), length=20) == []


def test_a_gradient_of_the_state_alone(interpreted):
    x, weight = torch.randn(1, 20, 5, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    _, state = short_conv(x, weight)
    dx, dw = torch.autograd.grad(state.x.sum(), (x, weight))
    assert torch.equal(dx[:, 17:], torch.ones(1, 3, 5))
    assert dx[:, :17].abs().max() == 0 == dw.abs().max()


def drawn(cu=None, tokens=60, step=1):
    """What forward takes, and the gradients of its outputs, of tensors of which every ``step``-th column counts."""
    generator = torch.Generator().manual_seed(0)
    N = 2 if cu is None else cu.numel() - 1
    B = 2 if cu is None else 1

    x, gate, dy = (torch.randn(B, tokens, 6 * step, generator=generator)[..., ::step] for _ in range(3))
    weight, bias = torch.randn(6, 4 * step, generator=generator)[:, ::step], torch.randn(6, generator=generator)
    initial, d_final = (torch.randn(N, 3, 6 * step, generator=generator)[..., ::step] for _ in range(2))
    return (x, weight, bias, gate, initial, cu, True), (dy, d_final)


def everything(given, gradients, rows):
    """All outputs and gradients."""
    tile = kernels.Tile(16, rows, 2, 4)
    return (*kernels.forward(*given, True, tile), *kernels.backward(*gradients, *given, tile))


@pytest.mark.parametrize("cu_seqlens", (None, (0, 3, 3, 16, 17, 17, 32, 32, 47, 60, 60)), ids=("rows", "packed"))
def test_how_rows_are_cut_changes_nothing(cu_seqlens):
    cu = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    cut, whole = (everything(*drawn(cu), rows) for rows in (16, 64))
    assert [torch.equal(a, b) for a, b in zip(cut[:3], whole[:3], strict=True)] == [True] * 3
    assert [relative_error(a, b) < 1e-6 for a, b in zip(cut, whole, strict=True)] == [True] * 7


def test_any_strides_will_do():
    apart = drawn(tokens=20, step=3)
    dense = ([x.contiguous() if isinstance(x, torch.Tensor) else x for x in part] for part in apart)
    got, want = everything(*apart, 32), everything(*dense, 32)
    assert [torch.equal(a, b) for a, b in zip(got, want, strict=True)] == [True] * 7


@pytest.mark.parametrize("tokens", (0, 1, 2))
def test_texts_shorter_than_the_state(interpreted, tokens):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, tokens, 5, generator=generator), torch.randn(5, 4, generator=generator)
    before = shortconv.ShortConvState(torch.randn(2, 3, 5, generator=generator), torch.full((2,), 3, dtype=torch.int32))
    initial = before.x.requires_grad_()
    y, state = short_conv(x, weight, initial_state=before)
    assert torch.equal(state.x, torch.cat([initial, x], 1)[:, tokens:])
    (gradient,) = torch.autograd.grad(state.x.sum(), initial)
    assert torch.equal(gradient[:, tokens:], torch.ones(2, 3 - tokens, 5))
    assert y.shape == x.shape


def test_the_operators_are_what_they_say(interpreted):
    """Schemas, fakes and the registered gradient, by torch's own check."""
    x, gate = (torch.randn(1, 9, 5, requires_grad=True) for _ in range(2))
    weight, bias = torch.randn(5, 3, requires_grad=True), torch.randn(5, requires_grad=True)
    initial, cu = torch.randn(2, 2, 5, requires_grad=True), torch.tensor([0, 4, 9], dtype=torch.int32)
    torch.library.opcheck(operators.shortconv_forward, (x, weight, bias, gate, initial, cu, True, True))
    torch.library.opcheck(operators.shortconv_forward, (x, weight, None, None, None, None, False, False))
    pool, count, slots = torch.zeros(4, 2, 5), torch.zeros(4, dtype=torch.int32), torch.tensor([2, -1])
    token = torch.randn(2, 5)
    torch.library.opcheck(operators.shortconv_step, (token, weight.detach(), None, token, pool, count, slots, True))


@pytest.mark.parametrize("packed", (False, True), ids=("rows", "packed"))
def test_fakes_have_the_shapes_of_outputs(packed):
    with FakeTensorMode():
        B = 1 if packed else 2
        N = 3 if packed else B
        x, weight, bias = torch.empty(B, 50, 8, dtype=torch.bfloat16), torch.empty(8, 3), torch.empty(8)
        cu = torch.empty(4, dtype=torch.int32) if packed else None
        initial = torch.empty(N, 2, 8, dtype=torch.bfloat16)
        y, final = operators.shortconv_forward(x, weight, bias, x, initial, cu, True, True)
        assert (y.shape, y.dtype, final.shape, final.dtype) == (x.shape, x.dtype, initial.shape, x.dtype)
        assert operators.shortconv_forward(x, weight, None, None, None, cu, True, False)[1].shape[0] == 0
        grads = operators.shortconv_backward(y, final, x, weight, bias, x, initial, cu, True)
        assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in (x, weight, bias, x, initial)]


@triton.jit
def _leaking_rows(x, x_t, initial, initial_w, a, start, inside, W, INITIAL):
    return ROWS_BEFORE(x, x_t, initial, initial_w, a, start - start, inside, W, INITIAL)


@triton.jit
def _late_start(cu_seqlens, documents, token, STEPS):
    return FIRST_DOCUMENT(cu_seqlens, documents, token + 1, STEPS)


@triton.jit
def _reversed_taps(weight, weight_w, inside, W):
    return TAPS(weight + (W - 1) * weight_w, -weight_w, inside, W)


@triton.jit
def _long_documents(cu_seqlens, n, tokens, PACKED):
    start, end = BOUNDS(cu_seqlens, n, tokens, PACKED)
    return start, tl.minimum(end + 1, tokens)


ROWS_BEFORE, FIRST_DOCUMENT, TAPS, BOUNDS = (
    getattr(triton_conv, name) for name in ("_rows_before", "_first_document", "_taps", "_bounds")
)
PLANTED = {
    "the order of taps is reversed": ("_taps", _reversed_taps),
    "a tap leaks over a document's start": ("_rows_before", _leaking_rows),
    "a gradient leaks over a document's end": ("_bounds", _long_documents),
    "a document that goes over a stretch is lost": ("_first_document", _late_start),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_law_catches(interpreted, short_documents, monkeypatch, name):
    attribute, planted = PLANTED[name]
    monkeypatch.setattr(triton_conv, attribute, planted)
    assert laws.packed_is_alone(subject(CASES[4])) != []


def call(dtype=torch.bfloat16, taps=3, device="cuda", capability=(9, 0)):
    shapes, strides = {"x": (2, 100, 64), "weight": (64, taps)}, {"x": (6400, 64, 1), "weight": (taps, 1)}
    return Call("short_conv", shapes, strides, dtype, device, capability)


@pytest.mark.parametrize(
    "refused, reason",
    [
        (call(device="cpu", capability=None), "the inputs are on cpu"),
        (call(dtype=torch.float64), "bfloat16, float16 or float32"),
        (call(taps=17), "at most 16 taps, got 17"),
        (call(capability=(7, 5)), "compute capability 8.0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refusals(monkeypatch, refused, reason):
    monkeypatch.setattr(tiles, "TRITON_VERSION", (3, 6))
    assert any(reason in words for words in operators.refuses(refused))
    assert [b.name for b in shortconv.BACKENDS if not b.refuses(refused)] == ["torch"]
    assert operators.refuses(call()) == operators.refuses(call(torch.float32, 16, capability=(8, 0))) == []


def test_few_rows_are_spread_over_more_programs():
    tile, cpu = kernels.Tile(512, 64, 4, 4), torch.device("cpu")
    assert [kernels.segment_rows(tile, 1, T, 1, cpu) for T in (16, 64, 100, 128, 256, 10_000)] == [
        16,
        16,
        32,
        32,
        64,
        64,
    ]


FLAGS = {"BIAS": True, "SILU": True, "GATE": True, "INITIAL": True, "FINAL": True, "STEPS": 6}
PLAIN = {"BIAS": False, "SILU": True, "GATE": True, "INITIAL": False, "FINAL": False, "STEPS": 0}


def build(kernel, warps, constants, dtype="*bf16"):
    inner = "x_d gate_d initial_d dy_d d_final_d weight_w bias_d pool_d count_n slots_n"
    tensors = "x weight bias gate initial y final dy d_final dx d_gate d_initial pool"
    types = {"*i32": "cu_seqlens slots count", "*fp32": "partial"}
    types[dtype] = f"{types.get(dtype, '')} {tensors}"
    unaligned = "tokens blocks segments documents n_slots weight_d"
    constants = dict.fromkeys(inner.split(), 1) | constants
    return Build(f"{triton_conv.__name__}.{kernel}", warps, constants, types, unaligned)


def builds(kernel):
    if kernel == "_conv_step":
        flags = {"BIAS": True, "SILU": True, "GATE": True, "BD": kernels.STEP_COLUMNS}
        return {f"w{taps}": build(kernel, 4, flags | {"W": taps}) for taps in (1, 4, 16)}
    forward = kernel == "_conv_forward"
    listed = kernels.FORWARD if forward else kernels.BACKWARD
    wide = (kernels.forward_tile if forward else kernels.backward_tile)(16)
    found = {}
    for taps, tile in [*((4, tile) for tile in listed), (16, wide)]:
        for name, given in (("all", FLAGS), ("plain", PLAIN)):
            constants = given | {"W": taps, "BD": tile.columns, "U": tile.fetched}
            found[f"w{taps} {tile} {name}"] = build(kernel, tile.warps, constants)
    first = PLAIN | {"W": 3, "BD": listed[0].columns, "U": listed[0].fetched}
    return found | {"fp32": build(kernel, listed[0].warps, first, "*fp32")}


@pytest.mark.parametrize("kernel", ("_conv_forward", "_conv_backward", "_conv_step"))
@pytest.mark.parametrize("capability", (80, 89, 90))
def test_every_tile_compiles_ahead_of_time(capability, kernel, record_property):
    """For GPUs that are not here: next to nothing spills (bytes a thread), and rows are fetched several at a time."""
    found = usage(capability, builds(kernel))
    for name, values in found.items():
        record_property(name, values)
    assert {name: values for name, values in found.items() if values["spilled"] > 8} == {}
    columns_a_thread = [name for name, values in found.items() if values["wide_loads"] == 0 and "w16" not in name]
    assert columns_a_thread == []
