"""Taylor attention's CUDA kernels without a GPU: emulated beside float64, and compiled by NVRTC for GPUs elsewhere.

The emulator (tests/cuda) runs the kernels' own text with 16-bit operands and fp32 sums, as the tensor cores have them.
What the launches share with Triton's is interpreted. Skipped where g++ or triton is not installed.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("the interpreter's kernels would take the place of the GPU's", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read when triton itself is first imported
pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent / "cuda"))

import emulate
import triton
from taylor_truth import above, errors

from linattn.core import nvrtc
from linattn.mixers.taylor import cuda

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which builds the emulated kernels")

LIMITS = {
    torch.bfloat16: {"": 5e-3, "S": 3e-3, "z": 1e-5, "dz0": 8e-3},
    torch.float16: {"": 6e-4, "S": 4e-4, "z": 1e-5, "dz0": 1e-3},
}
"""z's terms are exact products, S's rounded ones; all else is rounded twice or more, and dz0 is from a rounded y."""
PACKED = (0, 5, 5, 70, 70, 150, 150)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Where libraries are kept: one folder for all of a run's workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emulated"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def emulated(monkeypatch, built):
    """On Hopper, where there is something of its own: products that four warps make at once."""
    monkeypatch.setattr(cuda, "_run", emulate.runner(built))


def overstepped(T, V, dtype=torch.bfloat16, heads=(1, 1, 1), **settings):
    return above(LIMITS[dtype], errors("cuda", T, V, dtype, heads, **settings))


@needs_gxx
@pytest.mark.parametrize("T", (1, 15, 31, 33, 64, 65, 130))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_every_length(emulated, dtype, T):
    assert overstepped(T, 32, dtype) == {}


@needs_gxx
@pytest.mark.parametrize(
    "T, V, dtype",
    [
        (50, 48, torch.bfloat16),
        (66, 64, torch.bfloat16),
        (114, 112, torch.bfloat16),
        (114, 112, torch.float16),
        (130, 128, torch.bfloat16),
    ],
    ids=str,
)
def test_every_value_dim(emulated, T, V, dtype):
    assert overstepped(T, V, dtype) == {}


@needs_gxx
def test_before_hopper(monkeypatch, built):
    monkeypatch.setattr(cuda, "_run", emulate.runner(built, capability=(8, 0)))
    assert overstepped(66, 64) == {}


@needs_gxx
@pytest.mark.parametrize("heads", ((4, 2, 2), (2, 2, 4), (4, 1, 2)), ids=str)
def test_grouped_heads(emulated, heads):
    """Heads of q, k and v; the State's are the larger of k's and v's."""
    assert overstepped(40, 32, heads=heads, scale=0.6, rows=2) == {}


@needs_gxx
@pytest.mark.parametrize("given", ((True, False, False), (True, True, True)), ids=("y", "y, S, z"))
def test_from_nothing(emulated, given):
    assert overstepped(70, 32, initial=False, given=given) == {}


@needs_gxx
@pytest.mark.parametrize("given", ((False, True, True), (False, False, True), (True, True, False)), ids=str)
def test_gradients_of_some_outputs_alone(emulated, given):
    assert overstepped(70, 32, given=given) == {}


@needs_gxx
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_sums_that_are_not_divided(emulated, dtype):
    """The divisor is still summed up and has its gradient."""
    assert overstepped(70, 32, dtype, normalize=False) == {}


@needs_gxx
@pytest.mark.parametrize("segments", (None, 2))
def test_packed_documents(emulated, segments):
    """Empty ones among them and last."""
    assert overstepped(150, 32, cu=PACKED, segments=segments, heads=(2, 2, 1)) == {}


@needs_gxx
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_segments_change_nothing(emulated, dtype):
    assert overstepped(200, 32, dtype, heads=(2, 1, 1), segments=3, rows=2) == {}


PLANTED = (
    ("a product of another pair in the source", "features.cuh", "((n + d) % 8) * 4", "((n + d + 1) % 8) * 4"),
    ("a product of another pair in the reader", "features.cuh", "(low + d / 2) % 4", "(low + d / 2 + 1) % 4"),
    ("no constant in the source", "features.cuh", "constant = n == 4 ? ONES", "constant = n == 4 ? 0u"),
    ("no constant in the reader", "features.cuh", "low == 2 ? ONES & 0xffffu", "low == 2 ? 0u"),
    ("a square weighs 1", "features.cuh", "pack(0.5f * square, 0.5f * square)", "pack(0.5f * square, square)"),
    ("products of d = 4 count twice", "features.cuh", "keep = low < 2 ? 0xffffffffu : 0u", "keep = 0xffffffffu"),
    ("a square is stored whole", "features.cuh", "share = 0.70710678118654752f", "share = 1.f"),
    ("dq does not read its own token", "key_sweep.cu", "at_source <= at_reader", "at_source < at_reader"),
    ("dk is not read by its own token", "key_sweep.cu", "at_source >= at_reader", "at_source > at_reader"),
    ("dq of a square weighs 1", "key_sweep.cu", "0.5f * scale * scale : scale", "scale * scale : scale"),
    ("a gradient goes to another dim", "key_sweep.cu", "(n + 8 - d) % 8", "(n + 7 - d) % 8"),
    ("no constant in the gradient", "key_sweep.cu", "constant = group == 4 && n == 4 ? ONES", "constant = 0u ? 0u"),
    ("dq is not divided", "key_sweep.cu", "sum *= parts.share[t]", "sum *= 1.f"),
    ("a chunk is read before it is there", "key_sweep.cu", "wait_for_copies<0>", "wait_for_copies<1>"),
    ("a barrier left out", "key_sweep.cu", "wait_for_copies<0>();\n        sync_block();", "wait_for_copies<0>();"),
    ("y does not read its own token", "value_sweep.cu", "(pair <= row ?", "(pair < row ?"),
    ("dv is not read by its own token", "value_sweep.cu", "(pair >= row ?", "(pair > row ?"),
    ("a tail counts as a chunk", "value_sweep.cu", "count += min(CHUNK, last - t0)", "count += CHUNK"),
    ("no first order in the divisor", "value_sweep.cu", "shared.linear[2 * block + i % 2][lane] + 0.5f", "0.5f"),
)


@needs_gxx
@pytest.mark.parametrize("file, old, new", [x[1:] for x in PLANTED], ids=[x[0] for x in PLANTED])
def test_a_planted_bug_is_caught(monkeypatch, built, file, old, new):
    """By twice its limit or more, or by the emulator; the features' in the forward alone."""
    monkeypatch.setattr(cuda, "_run", emulate.runner(built, (file, old, new)))
    try:
        over = overstepped(40, 32, backward=file != "features.cuh")
    except emulate.EmulationError as error:
        over = {str(error): 2}
    assert max(over.values(), default=0) >= 2, over


def test_the_emulator_has_every_instruction():
    """By name and number of parameters, of those that a kernel names."""

    def declared(file, prefix):
        found = re.findall(rf"^{prefix} \w+ (\w+)\(((?:[^()]|\([^()]*\))*)\) *{{", file.read_text(), re.M)
        return {(name, parameters.count(",")) for name, parameters in found}

    kernels = "".join(path.read_text() for path in cuda.FOLDER.iterdir())
    wanted = {x for x in declared(nvrtc.WARP, "DEVICE") if re.search(rf"\b{x[0]}\b", kernels)}
    assert len(wanted) > 20
    assert wanted - declared(emulate.EMULATOR, "inline") == set()


WHOLE = {"REVERSE": 0, "NORMALIZE": 1, "PACKED": 0, "SPLIT": 0, "INITIAL": 0, "FINAL": 0}
PIECES = {"PACKED": 1, "SPLIT": 1, "INITIAL": 1}
SWEEPS = {
    "y": ("value_sweep", WHOLE | {"SUMS": 1, "OUTPUT": 1, "FINAL": 1}),
    "y of pieces": ("value_sweep", WHOLE | PIECES | {"SUMS": 1, "OUTPUT": 1, "FINAL": 1}),
    "dv": ("value_sweep", WHOLE | {"REVERSE": 1, "SUMS": 0, "OUTPUT": 1}),
    "dv of pieces": ("value_sweep", WHOLE | PIECES | {"REVERSE": 1, "SUMS": 0, "OUTPUT": 1}),
    "sums": ("value_sweep", WHOLE | PIECES | {"INITIAL": 0, "SUMS": 1, "OUTPUT": 0, "FINAL": 2}),
    "sums of gradients": (
        "value_sweep",
        WHOLE | PIECES | {"REVERSE": 1, "INITIAL": 0, "SUMS": 1, "OUTPUT": 0, "FINAL": 2},
    ),
    "dq": ("key_sweep", WHOLE),
    "dq of pieces": ("key_sweep", WHOLE | PIECES),
    "dk": ("key_sweep", WHOLE | {"REVERSE": 1}),
    "dk of pieces": ("key_sweep", WHOLE | PIECES | {"REVERSE": 1, "FINAL": 1}),
}
SHARED = {80: 166_912, 90: 232_448}
"""Bytes of shared memory that one block may have."""
COMPILED = [(90, 64, True, sweep) for sweep in SWEEPS] + [(90, 112, True, sweep) for sweep in ("y", "dv", "dk")]
COMPILED += [(80, 64, True, sweep) for sweep in ("y", "dk")] + [(90, 128, True, "y")]
SLOW = [(90, 112, True, sweep) for sweep in SWEEPS if (90, 112, True, sweep) not in COMPILED] + [(90, 32, True, "dk")]
SLOW += [(90, 64, False, sweep) for sweep in ("y", "dv", "dk")] + [(80, 64, True, sweep) for sweep in ("dv", "dq")]
SLOW += [(80, 112, False, "dk of pieces")]


def usage_of(cubin, folder):
    """Registers a thread and bytes that it spills, and a block's static shared memory, by triton's cuobjdump."""
    (folder / "cubin").write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, "-res-usage", folder / "cubin"], capture_output=True, text=True, check=True)
    words = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", done.stdout))
    return {"registers": int(words["REG"]), "spilled": int(words["STACK"]), "shared": int(words["SHARED"])}


@pytest.mark.skipif(bool(nvrtc.refusals()), reason="needs NVRTC: pip install nvidia-cuda-nvrtc")
@pytest.mark.parametrize(
    "capability, V, bf16, sweep", [*COMPILED, *(pytest.param(*x, marks=pytest.mark.slow) for x in SLOW)], ids=str
)
def test_compiles_ahead_of_time(capability, V, bf16, sweep, tmp_path, record_property):
    """For GPUs that are not here; on Hopper, which the kernels were written for, next to nothing may spill.

    Bytes a thread.
    """
    kernel, flags = SWEEPS[sweep]
    defines = cuda.defines_of(kernel, V, bf16, tuple(flags.items()), divmod(capability, 10))
    sources = (cuda.FOLDER / "features.cuh", cuda.FOLDER / f"{kernel}.cu")
    usage = usage_of(nvrtc.compile_kernel(sources, defines, divmod(capability, 10)), tmp_path)
    usage["shared"] += cuda.shared_bytes(kernel, V, bool(flags.get("OUTPUT", True)))
    for name, value in usage.items():
        record_property(name, value)
    assert usage["shared"] <= SHARED[capability]
    assert usage["registers"] * cuda.threads_of(kernel, V) <= 65_536
    assert usage["spilled"] <= (64 if capability == 90 else 4096)


@pytest.mark.skipif(bool(nvrtc.refusals()), reason="needs NVRTC: pip install nvidia-cuda-nvrtc")
def test_what_does_not_compile_says_why():
    sources = (cuda.FOLDER / "features.cuh", cuda.FOLDER / "key_sweep.cu")
    with pytest.raises(nvrtc.CompileError, match=r"key_sweep\.cu did not compile for --gpu-architecture=sm_90"):
        nvrtc.compile_kernel(sources, {"V": 64}, (9, 0))
