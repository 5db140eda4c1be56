"""Lightning attention's Triton kernels without a GPU: the laws through the interpreter, and compiled ahead of time.

The interpreter has no bfloat16 products, so the laws run in float32. Skipped where triton is not installed.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("the interpreter's kernels would take the place of the GPU's", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read when triton itself is first imported
pytest.importorskip("triton")

from torch.utils._python_dispatch import TorchDispatchMode

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
    LightningCase(2, 130, 2, 16, 16, "no decay", decay=0.0),
    LightningCase(2, 130, 2, 16, 16, "8 a token", decay=8.0),
    LightningCase(1, 130, 4, 16, 16, "grouped queries", k_heads=2, v_heads=2, state_heads=2),
    LightningCase(1, 130, 4, 16, 8, "grouped values", q_heads=2, k_heads=2),
    LightningCase(1, 130, 4, 16, 16, "one key and value head, a decay for each query head", k_heads=1, v_heads=1),
)
LAWS = ("parity", "parity_from_state", "a_split_is_the_whole", "packed_is_alone", "nothing_is_uninitialised")


@pytest.fixture
def interpreted(monkeypatch):
    backends = (Backend("triton", anything, operators.forward, operators.step_),)
    monkeypatch.setattr(lightning, "BACKENDS", backends)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("law", LAWS)
def test_laws(interpreted, law, case):
    assert laws.LAWS[law](Subject(lightning.MIXER, case, "triton", torch.float32)) == []


@pytest.mark.parametrize("case", (CASES[0], *CASES[3:5]), ids=lambda case: case.name)
def test_decode_is_the_fold(interpreted, case):
    assert laws.decode_is_the_fold(Subject(lightning.MIXER, case, "triton", torch.float32), length=12) == []


@pytest.mark.parametrize("decay", (0.0, 0.01, 2.5, 8.0))
@pytest.mark.parametrize("cu_seqlens", (None, (0, 3, 3, 67, 350)), ids=("row", "packed"))
def test_segments_change_nothing(decay, cu_seqlens):
    """Cut in three, with decays for which whole pieces are out of hearing and with none."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(1, 350, 2, 16, generator=generator) for _ in range(4))
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


def test_a_state_that_hardly_decays_stays_exact():
    """4e-8 a token for 20,000 tokens: the factor of a chunk is closer to 1 than fp32's spacing allows a product."""
    log_decay = torch.tensor([-4e-8])
    k = torch.ones(1, 20_000, 1, 16)
    S = kernels.forward(k, k, k, log_decay, 1.0, None, None, True, kernels.Tile(128, 16, 4, 1, 1), 1)[1]
    want = chunked.summarize(k.double(), k.double(), log_decay.double()).S
    assert relative_error(S, want) < 2e-6


class Seen(TorchDispatchMode):
    """Counts the library's operators and lets everything pass."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names += [func.name()] if func.namespace == "linattn" else []
        return func(*args, **(kwargs or {}))


def few_inputs():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 20, 2, 16, generator=generator, requires_grad=True) for _ in range(3))
    log_decay = torch.tensor([-0.1, -0.5], requires_grad=True)
    S0 = torch.randn(1, 2, 16, 16, generator=generator, requires_grad=True)
    return q, k, v, log_decay, S0


def results(return_state, given):
    q, k, v, log_decay, S0 = given
    state = LightningState(torch.zeros(1, 2), S0)
    o, after = lightning.lightning_attention(q, k, v, log_decay, initial_state=state, return_state=return_state)
    loss = o.square().sum() + (after.S.square().sum() if return_state else 0)
    return [o, *([after.S] if return_state else []), *torch.autograd.grad(loss, given)]


@pytest.mark.parametrize("return_state", (True, False))
def test_eager_calls_leave_the_dispatcher_out_and_change_nothing(interpreted, return_state):
    """Where something looks on, a mode here, it sees the operators."""
    given = few_inputs()
    alone = results(return_state, given)
    with Seen() as seen:
        watched = results(return_state, given)
    assert seen.names == ["linattn::lightning_forward", "linattn::lightning_backward"]
    assert [torch.equal(x, y) for x, y in zip(alone, watched, strict=True)] == [True] * len(alone)


def test_gradients_reach_only_what_asks_for_them(interpreted):
    given = few_inputs()
    want = results(True, given)
    q, _, v, log_decay, S0 = (x.detach() for x in given)
    o, _ = lightning.lightning_attention(q, given[1], v, log_decay, initial_state=LightningState(torch.zeros(1, 2), S0))
    assert torch.equal(o, want[0])
    o.square().sum().backward()
    assert given[1].grad is not None
    assert [given[i].grad for i in (0, 2, 3, 4)] == [None] * 4


def test_a_gradient_of_the_gradient_is_refused_not_wrong(interpreted):
    q, k, v, log_decay, _ = few_inputs()
    o, _ = lightning.lightning_attention(q, k, v, log_decay, return_state=False)
    (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_compiles_without_a_graph_break(interpreted):
    given = few_inputs()
    want = results(True, given)

    def run(q, k, v, log_decay, S0):
        state = LightningState(torch.zeros(1, 2), S0)
        o, after = lightning.lightning_attention(q, k, v, log_decay, initial_state=state)
        return o, after.S

    got = torch.compile(run, fullgraph=True, backend="aot_eager")(*given)
    got += torch.autograd.grad(got[0].square().sum() + got[1].square().sum(), given)
    assert [relative_error(x, y) < 1e-6 for x, y in zip(got, want, strict=True)] == [True] * len(want)


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
    """Counts compilations and remembers what each compiled kernel was given."""

    def __init__(self):
        self.compiled, self.ran = 0, []

    def __getitem__(self, grid):
        def compile_and_run(*arguments, num_warps):
            self.compiled += 1
            return {grid: lambda *arguments: self.ran.append(arguments)}

        return compile_and_run


def test_a_launch_compiles_once_for_what_triton_specializes_on(monkeypatch):
    monkeypatch.setattr(tiles, "TRITON_VERSION", (3, 6))
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


@pytest.mark.parametrize("programs, tokens, want", [(128, 8192, 1), (32, 131072, 4), (16, 524288, 8), (1, 100, 1)])
def test_the_cost_model(programs, tokens, want):
    assert segments_a_row(programs, tokens, 132, kernels.AGAIN, kernels.SHORTEST_SEGMENT) == want


AHEAD_OF_TIME = """
import json, os, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from linattn.mixers.lightning import triton_decay, triton_step, triton_sweep

def build(kernel, capability, warps, constants):
    types = {"scale": "fp32", "log_decay": "*fp32", "slots": "*i32"}
    states = ("state_in", "state_out", "added", "before", "initial", "final_gradient", "pool", "carried")
    indices = ("cu_seqlens", "segment_document", "segment_start", "first_added", "first_before")
    types |= dict.fromkeys(states, "*fp32") | dict.fromkeys(indices, "*i32")
    types |= dict.fromkeys(("a", "b", "c", "a2", "b2", "c2", "out2", "q", "k", "v", "do"), "*bf16")
    types["out"] = "*fp32" if kernel is triton_decay._decay_gradient else "*bf16"
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    aligned = [i for i, n in enumerate(kernel.arg_names) if signature[n] not in ("constexpr", "fp32")]
    attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    words = dict(w.split(":")[:2] for w in usage.split() if w.count(":") == 1 and w.split(":")[1].isdigit())
    return {"registers": int(words["REG"]), "spilled": int(words["STACK"]), "shared": built.metadata.shared}

capability = int(sys.argv[1])
dims = dict(K=128, V=128, BK=128)
chunk, value, warps, stages = (64, 128, 8, 3) if capability == 90 else (64, 64, 4, 2)
groups = dict.fromkeys(("A_GROUP", "B_GROUP", "C_GROUP", "A2_GROUP", "B2_GROUP", "C2_GROUP", "STATE_GROUP"), 1)

def sweep(packed=False, pair=False, summary=False):
    constants = dims | groups | dict(BV=value, C=chunk, NUM_STAGES=stages, PAIR=pair, REVERSE=pair, PACKED=packed)
    constants |= dict(SPLIT=packed, OUTPUT=not summary, INITIAL=not summary, FINAL=2 if summary else 1)
    return build(triton_sweep._sweep, capability, warps, constants)

scan = dict(V=128, STATE_GROUP=1, INITIAL_GROUP=1, REVERSE=False, PACKED=False, INITIAL=True, BLOCK=1024)
decay = dims | dict(BV=32, C=32, Q_GROUP=1, K_GROUP=1, V_GROUP=1, STATE_GROUP=1)
decay |= dict(PACKED=False, INITIAL=True, FINAL=True)
step = dims | dict(BV=64, Q_GROUP=1, K_GROUP=1, V_GROUP=1, READERS=1, READERS_BLOCK=1)
print(json.dumps({
    "sweep": sweep(), "sweep-pair": sweep(pair=True), "sweep-packed": sweep(packed=True),
    "sweep-summary": sweep(summary=True), "scan": build(triton_sweep._scan_segments, capability, 4, scan),
    "decay": build(triton_decay._decay_gradient, capability, 4, decay),
    "step": build(triton_step._step, capability, 4, step),
}))
"""
SHARED = {80: 166_912, 89: 101_376, 90: 232_448}
"""Bytes of shared memory that one block may have."""


@pytest.mark.parametrize("capability", (80, 89, 90))
def test_compiles_ahead_of_time(capability, record_property):
    """For GPUs that are not here; on Hopper, under the Triton that the tile was tuned with, next to nothing may spill.

    Bytes a thread. Triton 3.9 spills 208 to 272 of them there.
    """
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", AHEAD_OF_TIME, str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    usage = json.loads(done.stdout.splitlines()[-1])
    record_property("usage", usage)
    most = 64 if capability == 90 and tiles.TRITON_VERSION == (3, 6) else 4096
    assert len(usage) == 7
    assert {name: u for name, u in usage.items() if u["shared"] > SHARED[capability] or u["spilled"] > most} == {}
