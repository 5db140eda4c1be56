"""Taylor attention's CUDA kernels without a GPU: emulated beside float64, and compiled by NVRTC for GPUs elsewhere.

The emulator (tests/cuda) runs the kernels' own text with 16-bit operands and fp32 sums, as the tensor cores have them.
What the launches share with Triton's is interpreted. Skipped where g++ or triton is not installed.
"""

import os
import re
import shutil

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("the interpreter's kernels would take the place of the GPU's", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read when triton itself is first imported
pytest.importorskip("triton")

from ahead_of_time import SHARED, cubin_usage
from emulate import EMULATOR, EmulationError, emulate
from taylor_truth import above, errors

from linattn.core import nvrtc
from linattn.core.segments import Segments
from linattn.mixers.taylor import cuda
from linattn.mixers.taylor import triton as kernels

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which builds the emulated kernels")

LIMITS = {
    torch.bfloat16: {"": 5e-3, "S": 3e-3, "z": 1e-5, "dz0": 8e-3},
    torch.float16: {"": 6e-4, "S": 4e-4, "z": 1e-5, "dz0": 1e-3},
}
"""z's terms are exact products, S's rounded ones; all else is rounded twice or more, and dz0 is from a rounded y."""
PACKED = (0, 5, 5, 70, 70, 150, 150)
VALUE_DIMS = range(32, 129, 16)


@pytest.fixture
def emulated(monkeypatch, emulated_kernels):
    """On Hopper, where there is something of its own: products that four warps make at once."""
    emulate(monkeypatch, emulated_kernels)


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
        (70, 80, torch.float16),
        (130, 96, torch.bfloat16),
        (146, 112, torch.bfloat16),
        (146, 112, torch.float16),
        (130, 128, torch.bfloat16),
    ],
    ids=str,
)
def test_every_value_dim(emulated, T, V, dtype):
    assert overstepped(T, V, dtype) == {}


@needs_gxx
def test_before_hopper(monkeypatch, emulated_kernels):
    emulate(monkeypatch, emulated_kernels, capability=(8, 0))
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
def test_offsets_of_64_bits_are_those_of_32(emulated):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 150, 1, D, generator=generator).bfloat16() for D in (16, 16, 32))
    cu = torch.tensor(PACKED, dtype=torch.int32)
    want, got = (kernels.forward(q, k, v, 0.25, True, None, None, x, True, "cuda") for x in (cu, cu.long()))
    same = [x is not None and y is not None and torch.equal(x, y) for x, y in zip(got, want, strict=True)]
    assert same == [True] * 4


def test_inputs_that_lie_apart_are_refused(emulated):
    x, cu = torch.zeros(1, 32, 1, 32, dtype=torch.bfloat16), torch.tensor([0, 32], dtype=torch.int32, device="meta")
    operands = cuda.Operands._make([*[x] * 6, *[None] * 6, cu, None, None])
    with pytest.raises(ValueError, match="must be on cpu, cu_seqlens or a State is on meta"):
        cuda.prepared(operands, cuda.Pass(1, 1, 0.25, False), Segments(1, 32, 1))


@needs_gxx
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_segments_change_nothing(emulated, dtype):
    assert overstepped(200, 32, dtype, heads=(2, 1, 1), segments=3, rows=2) == {}


@needs_gxx
@pytest.mark.parametrize(
    "V, dtype, cu",
    [(64, torch.bfloat16, None), (64, torch.float16, None), (80, torch.float16, (0, 5, 5, 70, 260))],
    ids=str,
)
def test_segments_change_nothing_on_hopper(emulated, V, dtype, cu):
    """Sums are found in parts of segments at V 64, and warps beyond V's columns keep no state at V 80."""
    assert overstepped(260, V, dtype, segments=2, cu=cu) == {}


PLANTED = (
    (
        "a product of another pair in the source",
        "features.cuh",
        "b[d] = shuffle(b0, lane + 4",
        "b[d] = shuffle(b0, lane + 8",
    ),
    ("a product of another pair in the reader", "features.cuh", "(low + d / 2) % 4", "(low + d / 2 + 1) % 4"),
    ("no constant in the source", "features.cuh", "constant = n == 4 ? ONES", "constant = n == 4 ? 0u"),
    ("no constant in the reader", "features.cuh", "low == 2 ? ONES & 0xffffu", "low == 2 ? 0u"),
    ("a square weighs 1", "features.cuh", "pack(0.5f * square, 0.5f * square)", "pack(0.5f * square, square)"),
    ("products of d = 4 count twice", "features.cuh", "keep = low < 2 ? 0xffffffffu : 0u", "keep = 0xffffffffu"),
    ("a square is stored whole", "features.cuh", "share = 0.70710678118654752f", "share = 1.f"),
    ("dq does not read its own token", "key_sweep.cu", "at_source <= at_reader", "at_source < at_reader"),
    ("dk is not read by its own token", "key_sweep.cu", "at_source >= at_reader", "at_source > at_reader"),
    ("dq of a square counts twice", "key_sweep.cu", "left != right || d > 0", "true"),
    ("a gradient goes to another dim", "key_sweep.cu", "(lane - ahead) & 3", "(lane + ahead) & 3"),
    ("the constant is read as a product", "key_sweep.cu", "!r[token].keep ? 0.f : c[n]", "false ? 0.f : c[n]"),
    ("dq is not divided", "key_sweep.cu", "g.scale * now.scalars[t] : g.scale", "g.scale : g.scale"),
    ("no first order in the gradient", "key_sweep.cu", "linear[block][n] + scale * sum", "scale * sum"),
    ("a source is not divided", "sweep.cuh", "#if WEIGHED\n        float share[4]", "#if 0\n        float share[4]"),
    ("a chunk is read before it is there", "key_sweep.cu", "wait_for_copies<0>", "wait_for_copies<1>"),
    ("a barrier left out", "key_sweep.cu", "wait_for_copies<0>();\n        sync_block();", "wait_for_copies<0>();"),
    ("products are added before all are there", "key_sweep.cu", "sync_block();\n        if (READER", "if (READER"),
    ("y does not read its own token", "value_sweep.cu", "(pair <= row ?", "(pair < row ?"),
    ("dv is not read by its own token", "value_sweep.cu", "(pair >= row ?", "(pair > row ?"),
    ("a tail counts as a chunk", "value_sweep.cu", "count += min(CHUNK, last - t0)", "count += CHUNK"),
    ("no first order in the divisor", "value_sweep.cu", "(i % 2 ? linear.second : linear.first) + 0.5f", "0.5f"),
    ("a block of weights left out", "value_sweep.cu", "inside(s++, 1);", "s++;"),
)
PLANTED_WIDE = (
    ("an output is read before it is there", "value_sweep.cu", "        wide_wait(o);\n", ""),
    ("the state is read before it is there", "value_sweep.cu", "        wide_wait(S);\n", ""),
    (
        "products of other tokens",
        "sweep.cuh",
        "ahead(pieces, 256 * GROUPS * s)",
        "ahead(pieces, 256 * GROUPS)",
    ),
    ("the form of another chunk", "value_sweep.cu", "leave_form(sums, step + 1)", "leave_form(sums, step)"),
    ("a gradient is read before it is there", "key_sweep.cu", "                wide_wait(c);\n", ""),
    ("the state's gradient is read before it is there", "key_sweep.cu", "        wide_wait(S);\n", ""),
    ("the state of other columns", "key_sweep.cu", "2 * k * GROUPS + half * PAIRS", "2 * GROUPS + half * PAIRS"),
    ("gradients of the other half's products", "key_sweep.cu", "chain.add(half * PAIRS + n", "chain.add(n"),
    ("the form of another chunk in dq", "key_sweep.cu", "leave_form(sums, step + 1)", "leave_form(sums, step)"),
)


@needs_gxx
@pytest.mark.parametrize("file, old, new", [x[1:] for x in PLANTED], ids=[x[0] for x in PLANTED])
def test_a_planted_bug_is_caught(monkeypatch, emulated_kernels, file, old, new):
    """By twice its limit or more, or by the emulator; the features' in the forward alone."""
    emulate(monkeypatch, emulated_kernels, (file, old, new))
    try:
        over = overstepped(40, 32, backward=file != "features.cuh")
    except EmulationError as error:
        over = {str(error): 2}
    assert max(over.values(), default=0) >= 2, over


@needs_gxx
@pytest.mark.parametrize("file, old, new", [x[1:] for x in PLANTED_WIDE], ids=[x[0] for x in PLANTED_WIDE])
def test_a_bug_planted_for_hopper_is_caught(monkeypatch, emulated_kernels, file, old, new):
    emulate(monkeypatch, emulated_kernels, (file, old, new))
    over = overstepped(70, 64, backward=file == "key_sweep.cu")
    assert max(over.values(), default=0) >= 2, over


MISALIGNED = (
    ("value_sweep.cu", "*(u32*)(slab + (8 * half + row) * ROW_Y + 8 * j + pair)", "*(u32*)(slab + 8 * j + pair + 1)"),
    ("sweep.cuh", "ahead(pieces, 256 * GROUPS * s)", "ahead(pieces, 256 * GROUPS * s + 8)"),
)


@needs_gxx
@pytest.mark.parametrize("edit", MISALIGNED, ids=("a pair of outputs", "the pieces of a wide product"))
def test_an_address_off_its_alignment_is_an_error(monkeypatch, emulated_kernels, edit):
    """A CPU would read it, a GPU does not: the first by the compiler's check, the second by the emulator's own."""
    emulate(monkeypatch, emulated_kernels, edit)
    with pytest.raises(EmulationError, match="off its alignment"):
        overstepped(70, 64, backward=False)


def test_the_emulator_has_every_instruction():
    """By name and number of parameters, of those that a kernel names."""

    def declared(text, form):
        found = re.findall(form % r"\w+ (\w+)\(((?:[^()]|\([^()]*\))*)\)", text, re.M)
        return {(name, parameters.count(",")) for name, parameters in found}

    kernels = "".join(path.read_text() for path in cuda.FOLDER.iterdir())
    instructions = declared(nvrtc.WARP.read_text(), "^DEVICE %s *{")
    wanted = {x for x in instructions if re.search(rf"\b{x[0]}\b", kernels)}
    assert len(wanted) > 20
    assert wanted - declared(EMULATOR, "^(?:inline )?%s(?: {|;)") == set()


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
COMPILED = [(90, 64, True, sweep) for sweep in SWEEPS] + [(90, 112, True, sweep) for sweep in ("y", "dv", "dk")]
COMPILED += [(80, 64, True, sweep) for sweep in ("y", "dk")] + [(90, 128, True, "y")]
SLOW = [(90, 112, True, sweep) for sweep in SWEEPS if (90, 112, True, sweep) not in COMPILED] + [(90, 32, True, "dk")]
SLOW += [(90, 64, False, sweep) for sweep in ("y", "dv", "dk")] + [(80, 64, True, sweep) for sweep in ("dv", "dq")]
SLOW += [(80, 96, False, "dk of pieces"), (90, 64, False, "dk of pieces"), (90, 128, False, "dk of pieces")]
SPILLED = {"value_sweep": 128, "key_sweep": 64}
"""On Hopper, which the kernels were written for. Where four blocks of 128 threads share a multiprocessor, as the sums'
do, a thread's 128 registers leave addresses out. The key sweep has all 255 registers: bfloat16 spills up to 24 bytes,
float16 up to 40."""


@pytest.mark.parametrize("capability, largest", ((80, 96), (89, 64), (90, 128)))
@pytest.mark.parametrize("kernel", cuda.ROWS)
def test_value_dims_that_shared_memory_has_room_for(kernel, capability, largest):
    sizes = {V: cuda.shared_bytes(kernel, V, True, cuda.is_wide(kernel, V, divmod(capability, 10))) for V in VALUE_DIMS}
    assert max(V for V, size in sizes.items() if size <= SHARED[capability]) == largest


@pytest.mark.skipif(bool(nvrtc.refusals()), reason="needs NVRTC: pip install nvidia-cuda-nvrtc")
@pytest.mark.parametrize(
    "capability, V, bf16, sweep", [*COMPILED, *(pytest.param(*x, marks=pytest.mark.slow) for x in SLOW)], ids=str
)
def test_compiles_ahead_of_time(capability, V, bf16, sweep, tmp_path, record_property):
    """For GPUs that are not here. Bytes a thread."""
    kernel, flags = SWEEPS[sweep]
    defines = cuda.defines_of(kernel, V, bf16, tuple(flags.items()), divmod(capability, 10))
    usage = cubin_usage(nvrtc.compile_kernel(cuda.sources_of(kernel), defines, divmod(capability, 10)), tmp_path)
    wide = cuda.is_wide(kernel, V, divmod(capability, 10))
    usage["shared"] += cuda.shared_bytes(kernel, V, bool(flags.get("OUTPUT", True)), wide)
    for name, value in usage.items():
        record_property(name, value)
    assert usage["shared"] <= SHARED[capability]
    assert usage["registers"] * cuda.threads_of(V, wide) <= 65_536
    assert usage["spilled"] <= (SPILLED[kernel] if capability == 90 else 4096)


@pytest.mark.skipif(bool(nvrtc.refusals()), reason="needs NVRTC: pip install nvidia-cuda-nvrtc")
def test_what_does_not_compile_says_why():
    with pytest.raises(nvrtc.CompileError, match=r"key_sweep\.cu did not compile for --gpu-architecture=sm_90"):
        nvrtc.compile_kernel(cuda.sources_of("key_sweep"), {"V": 64}, (9, 0))
