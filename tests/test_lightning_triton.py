"""Lightning attention's Triton kernels without a GPU: the laws through the interpreter, and compiled ahead of time.

The interpreter has no bfloat16 products, so the laws run in float32. Skipped where triton is not installed.
"""

import functools
import os
from types import SimpleNamespace

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("the interpreter's kernels would take the place of the GPU's", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read when triton itself is first imported
pytest.importorskip("triton")

import operator_checks
import triton
from ahead_of_time import SHARED, Build, usage
from plans import changed_by_others
from triton.runtime import _allocation

from linattn.core import laws, tiles
from linattn.core.dispatch import Backend, anything
from linattn.core.laws import Subject
from linattn.core.numerics import relative_error
from linattn.core.segments import segments_a_row
from linattn.mixers import lightning
from linattn.mixers.lightning import LightningState, chunked, operators
from linattn.mixers.lightning import triton as kernels
from linattn.mixers.lightning.cases import LightningCase

# The interpreter of triton 3.6 turns arrays of one element into loop bounds, which numpy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

CASES = (
    LightningCase(2, 130, 3, 8, 12, "two dims that no block holds exactly"),
    LightningCase(2, 130, 1, 16, 16, "no decay", decay=0.0),
    LightningCase(2, 130, 1, 16, 16, "8 a token", decay=8.0),
    LightningCase(1, 130, 4, 16, 16, "grouped queries", k_heads=2, v_heads=2, state_heads=2),
    LightningCase(1, 130, 4, 16, 8, "grouped values", q_heads=2, k_heads=2),
    LightningCase(1, 130, 4, 16, 16, "one key and value head, a decay for each query head", k_heads=1, v_heads=1),
)
LAWS = {
    "parity": (0, 2, 5),
    "parity_from_state": range(6),
    "a_split_is_the_whole": (0, 1, 2),
    "packed_is_alone": (0, 2, 3, 4, 5),
    "nothing_is_uninitialised": (0, 5),
}
"""Which cases each is asked about, of cases that share their dims, decays or heads; about all in the slow tests."""


def id_of(x):
    return x if isinstance(x, str) else x.name


@pytest.fixture
def interpreted(monkeypatch):
    backends = (Backend("triton", anything, operators.forward, operators.step_),)
    monkeypatch.setattr(lightning, "BACKENDS", backends)


@pytest.mark.parametrize("law, case", [(law, CASES[i]) for law, cases in LAWS.items() for i in cases], ids=id_of)
def test_laws(interpreted, law, case):
    assert laws.LAWS[law](Subject(lightning.MIXER, case, "triton", torch.float32)) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=id_of)
@pytest.mark.parametrize("law", LAWS)
def test_laws_of_every_case(interpreted, law, case):
    assert laws.LAWS[law](Subject(lightning.MIXER, case, "triton", torch.float32)) == []


@pytest.mark.parametrize("case", (CASES[0], *CASES[3:5]), ids=id_of)
def test_decode_is_the_fold(interpreted, case):
    assert laws.decode_is_the_fold(Subject(lightning.MIXER, case, "triton", torch.float32), length=12) == []


@pytest.mark.parametrize("decay", (0.0, 0.01, 2.5, 8.0))
@pytest.mark.parametrize("cu_seqlens", (None, (0, 3, 3, 67, 150)), ids=("row", "packed"))
def test_segments_change_nothing(decay, cu_seqlens):
    """Cut in three, with decays for which whole pieces are out of hearing and with none."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(1, 150, 2, 16, generator=generator) for _ in range(4))
    log_decay = torch.tensor([-decay, -decay / 2])
    cu = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    S0, dS = (torch.randn(1 if cu is None else 4, 2, 16, 16, generator=generator) for _ in range(2))
    tile = kernels.Tile(16, 16, 4, 1, 1)
    whole, cut = (
        (
            *kernels.forward(q, k, v, log_decay, 0.5, S0, cu, True, tile, segments),
            *kernels.backward(do, dS, q, k, v, log_decay, 0.5, S0, cu, True, tile, segments),
        )
        for segments in (1, 3)
    )
    assert [relative_error(x, y) < 1e-5 for x, y in zip(cut, whole, strict=True)] == [True] * 7


def test_no_tokens_leave_the_state_of_every_document():
    q, k, v = (torch.empty(1, 0, 2, 16) for _ in range(3))
    log_decay, cu = torch.tensor([-0.1, -0.5]), torch.zeros(4, dtype=torch.int32)
    S0 = torch.randn(3, 2, 16, 16)
    for initial, want in ((S0, S0), (None, torch.zeros(3, 2, 16, 16))):
        o, S = kernels.forward(q, k, v, log_decay, 1.0, initial, cu, True)
        assert o.shape == (1, 0, 2, 16) and torch.equal(S, want)
        assert S.data_ptr() != S0.data_ptr()


def different_calls():
    """Calls that differ in one thing each of all that a launch is prepared for."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(1, 40, 2, 16, generator=generator) for _ in range(4))
    S0, dS = (torch.randn(1, 2, 16, 16, generator=generator) for _ in range(2))
    S2, dS2 = (torch.randn(2, 2, 16, 16, generator=generator) for _ in range(2))
    log_decay, cu = torch.tensor([-0.1, -0.5]), torch.tensor([0, 10, 40], dtype=torch.int32)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, do)]
    changes = (
        {},
        {"scale": 0.5},
        {"q": turned[0]},
        {"do": turned[1]},
        {"q": q[:, :, :1]},
        {"k": k[:, :, 1:].contiguous()},
        {"v": v[..., :8].contiguous(), "do": do[..., :8].contiguous()},
        {"log_decay": torch.tensor([-0.1, 0.0, -0.5])[::2]},
        {"log_decay": torch.tensor([-0.3])},
        {"cu_seqlens": cu},
        {"cu_seqlens": cu.long()},
        {"S0": S0},
        {"S0": S0.transpose(2, 3)},
        {"S0": S0, "dS": dS},
        {"dS": dS, "do": None},
        {"cu_seqlens": cu, "S0": S2, "dS": dS2},
        {"decay_gradient": True},
        {"tile": kernels.Tile(16, 16, 4, 1, 1)},
        {"tile": kernels.Tile(16, 16, 4, 1, 1), "segments": 2, "S0": S0},
    )
    common = {"q": q, "k": k, "v": v, "log_decay": log_decay, "do": do, "scale": 0.3}
    return [common | change for change in changes]


def found_by(
    *, q, k, v, log_decay, do, scale, S0=None, dS=None, cu_seqlens=None, decay_gradient=False, tile=None, segments=None
):
    given, how = (q, k, v, log_decay, scale, S0, cu_seqlens), (tile, segments)
    found = [kernels.forward(*given, return_state, *how) for return_state in (True, False)]
    return [x for part in (*found, kernels.backward(do, dS, *given, decay_gradient, *how)) for x in part]


def test_calls_take_nothing_from_plans_of_others():
    assert changed_by_others(kernels.plan_of, found_by, different_calls()) == []


def test_a_state_that_hardly_decays_stays_exact():
    """4e-8 a token for 20,000 tokens: the factor of a chunk is closer to 1 than fp32's spacing allows a product."""
    log_decay = torch.tensor([-4e-8])
    k = torch.ones(1, 20_000, 1, 16)
    S = kernels.forward(k, k, k, log_decay, 1.0, None, None, True, kernels.Tile(128, 16, 4, 1, 1), 1)[1]
    want = chunked.summarize(k.double(), k.double(), log_decay.double()).S
    assert relative_error(S, want) < 2e-6


def few_inputs():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 20, 2, 16, generator=generator, requires_grad=True) for _ in range(3))
    log_decay = torch.tensor([-0.1, -0.5], requires_grad=True)
    S0 = torch.randn(1, 2, 16, 16, generator=generator, requires_grad=True)
    return q, k, v, log_decay, S0


def attend(q, k, v, log_decay, S0, return_state=True):
    state = LightningState(torch.zeros(1, 2), S0)
    o, after = lightning.lightning_attention(q, k, v, log_decay, initial_state=state, return_state=return_state)
    return (o, after.S) if return_state else (o,)


@pytest.mark.parametrize("return_state", (True, False))
def test_eager_calls_leave_the_dispatcher_out_and_change_nothing(interpreted, return_state):
    """Where something looks on, a mode here, it sees the operators."""
    names, same = operator_checks.watched(functools.partial(attend, return_state=return_state), few_inputs())
    assert names == ["linattn::lightning_forward", "linattn::lightning_backward"]
    assert same == [True] * (7 if return_state else 6)


def test_gradients_reach_only_what_asks_for_them(interpreted):
    assert operator_checks.reached(attend, few_inputs(), only=1) == ([1], True)


def test_a_gradient_of_the_gradient_is_refused_not_wrong(interpreted):
    with pytest.raises(RuntimeError, match="once_differentiable"):
        operator_checks.differentiate_twice(functools.partial(attend, return_state=False), few_inputs())


def test_compiles_without_a_graph_break(interpreted):
    assert [error < 1e-6 for error in operator_checks.compiled_errors(attend, few_inputs())] == [True] * 7


def test_a_call_seen_before_is_checked_again_where_values_differ(interpreted):
    """Shapes are checked once and remembered; what a signature does not hold is not."""
    q, k, v, log_decay, _ = few_inputs()
    lightning.lightning_attention(q, k, v, log_decay)
    with pytest.raises(ValueError, match="finite and <= 0"):
        lightning.lightning_attention(q, k, v, -log_decay)
    with pytest.raises(ValueError, match="scale must be a float"):
        lightning.lightning_attention(q, k, v, log_decay, scale="1")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="wrap it in torch.tensor"):
        lightning.lightning_attention(q, k, v, log_decay, cu_seqlens=[0, 20])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="does not divide"):
        lightning.lightning_attention(q, k[:, :, :1].expand(1, 20, 3, 16), v, log_decay)


class FakeKernel:
    """Counts compilations and remembers what each compiled kernel was given, and which runs a profiler saw."""

    def __init__(self, scratch=0):
        self.compiled, self.ran, self.seen, self.scratch = 0, [], [], scratch

    def __getitem__(self, grid):
        def compile_and_run(*arguments, num_warps):
            self.compiled += 1
            return FakeCompiled(self)

        return compile_and_run


class FakeCompiled:
    function, packed_metadata = 123, (4, 1, 0)

    def __init__(self, kernel):
        self.kernel, self.metadata = kernel, SimpleNamespace(global_scratch_size=kernel.scratch)

    def run(self, x, y, z, stream, function, packed, *arguments):
        assert (x, y, z, stream, function, packed, *arguments[:3]) == (1, 2, 3, 7, 123, (4, 1, 0), None, None, None)
        memory = _allocation._allocator.get()(8, 1, None) if self.kernel.scratch else None
        assert (0 if memory is None else memory.numel()) == self.kernel.scratch
        self.kernel.ran.append(arguments[3:])

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.seen.append(arguments)


@pytest.fixture
def no_device(monkeypatch):
    monkeypatch.setattr(tiles, "TRITON_VERSION", (3, 6))
    monkeypatch.setattr(tiles, "current_stream", lambda device: 7)


def test_a_launch_compiles_once_for_what_triton_specializes_on(no_device):
    kernel, x, y = FakeKernel(), torch.zeros(16), torch.zeros(17)[1:]

    def launch(x, numbers=(1, 2), constants=(True,), grid=(1, 2, 3)):
        tiles.launch(kernel, grid, [x], numbers, constants, warps=4)

    launch(x)
    assert (kernel.compiled, len(kernel.ran)) == (1, 0)
    launch(x + 1)
    assert kernel.compiled == 1
    assert [a[1:] for a in kernel.ran] == [(1, 2, True)]
    for again in ({"x": y}, {"x": x.bfloat16()}, {"x": x, "numbers": (1, 3)}, {"x": x, "constants": (False,)}):
        launch(**again)
    assert (kernel.compiled, len(kernel.ran)) == (5, 1)
    launch(y)
    assert (kernel.compiled, len(kernel.ran)) == (5, 2)
    assert kernel.ran[-1] == (y.data_ptr(), 1, 2, True)


def test_a_kernel_that_wants_memory_has_it_at_every_launch(no_device):
    kernel, x = FakeKernel(scratch=8), torch.zeros(16)
    for _ in range(3):
        tiles.launch(kernel, (1, 2, 3), [x], (), (), warps=4)
    assert kernel.ran == [(x.data_ptr(),)] * 2


def test_a_profiler_s_hooks_see_launches_that_are_remembered(no_device):
    kernel, x = FakeKernel(), torch.zeros(16)
    hooks = triton.knobs.runtime.launch_enter_hook
    tiles.launch(kernel, (1, 2, 3), [x], (), (), warps=4)
    hooks.add(print)
    try:
        tiles.launch(kernel, (1, 2, 3), [x], (), (), warps=4)
    finally:
        hooks.remove(print)
    tiles.launch(kernel, (1, 2, 3), [x], (), (), warps=4)
    assert (len(kernel.seen), len(kernel.ran)) == (1, 1)


@pytest.mark.parametrize("strides", ((4, 60, 20, 1), (640, 32, 16, 2), (0, 0, 0, 1), (640, 33, 16, 1)), ids=str)
def test_rows_that_cannot_be_fetched_whole_are_copied(strides):
    x = torch.arange(4000.0).as_strided((2, 5, 2, 16), strides)
    y = tiles.aligned(x)
    assert torch.equal(x, y)
    assert y.stride() == (160, 32, 16, 1)


def test_rows_that_begin_off_16_bytes_are_copied_and_others_are_not():
    buffer = torch.arange(400.0)
    off, fine = buffer[1:321].view(2, 5, 2, 16), buffer[4:324].view(2, 5, 2, 16)
    y = tiles.aligned(off)
    assert torch.equal(off, y)
    assert [x.data_ptr() % 16 for x in (off, y, fine)] == [4, 0, 0]
    assert tiles.aligned(fine) is fine


def test_gradients_of_shared_heads_are_summed_in_fp32():
    x = torch.empty(1, 1, 1, 8, dtype=torch.bfloat16)
    given = tiles.gradient_of(x, 3, None)
    given.copy_(torch.tensor([256.0, 0.75, 0.75]).view(1, 1, 3, 1))
    assert (given.dtype, tiles.gradient_of(x, 3).dtype, tiles.gradient_of(x, 1).dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
    )
    assert torch.equal(tiles.gathered(given, x), torch.full_like(x, 258.0))
    assert tiles.gathered(x, x) is x


@pytest.mark.parametrize("programs, tokens, want", [(128, 8192, 1), (32, 131072, 4), (16, 524288, 8), (1, 100, 1)])
def test_the_cost_model(programs, tokens, want):
    assert segments_a_row(programs, tokens, 132, kernels.AGAIN, kernels.SHORTEST_SEGMENT) == want


DIMS = {"K": 128, "V": 128, "BK": 128}
GROUPS = ("A_GROUP", "B_GROUP", "C_GROUP", "A2_GROUP", "B2_GROUP", "C2_GROUP", "Q_GROUP", "K_GROUP", "V_GROUP")
SCAN = {"STATE_GROUP": 1, "INITIAL_GROUP": 1, "REVERSE": False, "PACKED": False, "INITIAL": True, "BLOCK": 1024}
SCAN["AHEAD"] = 8
DECAY = {"BV": 32, "C": 32, "STATE_GROUP": 1, "PACKED": False, "INITIAL": True, "FINAL": True}


def build(kernel, warps, out="*bf16", **constants):
    sums = "log_decay state_in state_out added before initial final_gradient pool carried"
    types = {
        "fp32": "scale",
        "*bf16": "a b c a2 b2 c2 out2 q k v do",
        "*fp32": sums,
        "*i32": "slots cu_seqlens segment_document segment_start first_added first_before",
    }
    types[out] += " out"
    return Build(f"linattn.mixers.lightning.{kernel}", warps, DIMS | dict.fromkeys(GROUPS, 1) | constants, types)


def sweep(capability, packed=False, pair=False, summary=False):
    chunk, value, warps, stages = (64, 128, 8, 3) if capability == 90 else (64, 64, 4, 2)
    constants = {"BV": value, "C": chunk, "NUM_STAGES": stages, "STATE_GROUP": 1, "PAIR": pair, "REVERSE": pair}
    constants |= {"PACKED": packed, "SPLIT": packed}
    constants |= {"OUTPUT": not summary, "INITIAL": not summary, "FINAL": 2 if summary else 1}
    return build("triton_sweep._sweep", warps, **constants)


@pytest.mark.parametrize("capability", (80, 89, 90))
def test_compiles_ahead_of_time(capability, record_property):
    """For GPUs that are not here; on Hopper, under the Triton that the tile was tuned with, next to nothing may spill.

    Bytes a thread. Triton 3.9 spills 208 to 272 of them there.
    """
    builds = {
        "sweep": sweep(capability),
        "sweep-pair": sweep(capability, pair=True),
        "sweep-packed": sweep(capability, packed=True),
        "sweep-summary": sweep(capability, summary=True),
        "scan": build("triton_sweep._scan_segments", 4, **SCAN),
        "decay": build("triton_decay._decay_gradient", 4, "*fp32", **DECAY),
        "step": build("triton_step._step", 4, BV=64, READERS=1, READERS_BLOCK=1),
    }
    found = usage(capability, builds)
    record_property("usage", found)
    most = 64 if capability == 90 and tiles.TRITON_VERSION == (3, 6) else 4096
    assert len(found) == 7
    assert {name: u for name, u in found.items() if u["shared"] > SHARED[capability] or u["spilled"] > most} == {}
