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

from linattn.core import laws
from linattn.core.dispatch import Backend, anything
from linattn.core.laws import Subject
from linattn.core.numerics import relative_error
from linattn.mixers import lightning
from linattn.mixers.lightning import chunked, operators
from linattn.mixers.lightning import triton as kernels
from linattn.mixers.lightning.cases import LightningCase

# The interpreter of triton 3.6 turns arrays of one element into loop bounds, which numpy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

CASES = (
    LightningCase(2, 130, 3, 8, 12, "two dims that no block holds exactly"),
    LightningCase(2, 130, 2, 16, 16, "no decay", decay=0.0),
    LightningCase(2, 130, 2, 16, 16, "8 a token", decay=8.0),
    LightningCase(2, 130, 4, 16, 16, "grouped queries", k_heads=2, v_heads=2, state_heads=2),
    LightningCase(2, 130, 4, 16, 8, "grouped values", q_heads=2, k_heads=2),
    LightningCase(2, 130, 4, 16, 16, "one key and value head, a decay for each query head", k_heads=1, v_heads=1),
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
@pytest.mark.parametrize("cu_seqlens", (None, (0, 3, 3, 67, 700)), ids=("row", "packed"))
def test_segments_change_nothing(decay, cu_seqlens):
    """Cut in three, with decays for which whole pieces are out of hearing and with none."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(1, 700, 2, 16, generator=generator) for _ in range(4))
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


@pytest.mark.parametrize("programs, tokens, want", [(128, 8192, 1), (32, 131072, 4), (16, 524288, 8), (1, 100, 1)])
def test_the_cost_model(programs, tokens, want):
    assert kernels.segments_a_row(programs, tokens, slots=132) == want


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

capability, which = int(sys.argv[1]), sys.argv[2]
dims = dict(K=128, V=128, BK=128)
if which.startswith("sweep"):
    chunk, value, warps, stages = (64, 128, 8, 3) if capability == 90 else (64, 64, 4, 2)
    groups = dict.fromkeys(("A_GROUP", "B_GROUP", "C_GROUP", "A2_GROUP", "B2_GROUP", "C2_GROUP", "STATE_GROUP"), 1)
    packed, pair = which == "sweep-packed", which == "sweep-pair"
    constants = dims | groups | dict(BV=value, C=chunk, NUM_STAGES=stages)
    constants |= dict(PAIR=pair, REVERSE=pair, PACKED=packed, SPLIT=packed,
        OUTPUT=which != "sweep-summary", INITIAL=which != "sweep-summary", FINAL=2 if which == "sweep-summary" else 1)
    result = build(triton_sweep._sweep, capability, warps, constants)
elif which == "scan":
    constants = dict(V=128, STATE_GROUP=1, INITIAL_GROUP=1, REVERSE=False, PACKED=False, INITIAL=True, BLOCK=1024)
    result = build(triton_sweep._scan_segments, capability, 4, constants)
elif which == "decay":
    constants = dims | dict(BV=32, C=32, Q_GROUP=1, K_GROUP=1, V_GROUP=1, STATE_GROUP=1)
    constants |= dict(PACKED=False, INITIAL=True, FINAL=True)
    result = build(triton_decay._decay_gradient, capability, 4, constants)
else:
    constants = dims | dict(BV=64, Q_GROUP=1, K_GROUP=1, V_GROUP=1, READERS=1, READERS_BLOCK=1)
    result = build(triton_step._step, capability, 4, constants)
print(json.dumps(result))
"""
SHARED = {80: 166_912, 89: 101_376, 90: 232_448}
"""Bytes of shared memory that one block may have."""


@pytest.mark.parametrize("kernel", ("sweep", "sweep-pair", "sweep-packed", "sweep-summary", "scan", "decay", "step"))
@pytest.mark.parametrize("capability", (80, 89, 90))
def test_compiles_ahead_of_time(capability, kernel, record_property):
    """For GPUs that are not here; on Hopper, where the tile is tuned, next to nothing may spill (bytes a thread)."""
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", AHEAD_OF_TIME, str(capability), kernel]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    usage = json.loads(done.stdout.splitlines()[-1])
    for name, value in usage.items():
        record_property(name, value)
    assert usage["shared"] <= SHARED[capability]
    assert usage["spilled"] <= (64 if capability == 90 else 4096)
