"""Runs Taylor attention's CUDA kernels on a CPU: built with g++ behind emulator.h, in place of the GPU's launches.

Command: pytest tests/test_taylor_cuda.py
"""

import ctypes
import functools
import hashlib
import os
import subprocess
from pathlib import Path

from linattn.mixers.taylor import cuda, cuda_step
from linattn.mixers.taylor import triton as kernels

EMULATOR, FIBERS = ((Path(__file__).parent / "cuda" / f"emulator.{x}").read_text() for x in ("h", "cpp"))
ENTRY = """
static const Arguments* given;
extern "C" const char* run(int grid_x, int grid_y, const Arguments* arguments) {
    given = arguments;
    return emulated::launch(grid_x, grid_y, THREADS, [] { %s(*given); }, __start_dynamic_shared, __stop_dynamic_shared);
}
extern "C" int threads() { return THREADS; }
extern "C" int shared_bytes() { return int(__stop_dynamic_shared - __start_dynamic_shared); }
"""


STATIC_SHARED = 48 * 1024
"""Bytes that a block may have without asking for them at its launch."""


class EmulationError(RuntimeError):
    """A kernel did what a GPU would not do, or would hang at."""


def made(folder, name, text, *options):
    """What g++ makes of a text, kept in ``folder`` under what it was made of."""
    key = hashlib.sha256("\n".join((text, *options)).encode()).hexdigest()[:16]
    output = folder / f"{key}-{name}"
    if not output.exists():
        code, part = output.with_suffix(f".{os.getpid()}.cpp"), output.with_suffix(f".{os.getpid()}")
        code.write_text(text)
        command = ["g++", "-std=c++17", "-fPIC", "-w", *options, "-o", str(part), str(code)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{code} did not compile:\n{done.stderr[:3000]}")
        part.replace(output)
    return output


def build(folder, kernel, sources, defines, edit=None):
    """The library whose ``run`` launches ``kernel``, of these files.

    edit: (file, old, new), one place in one of them that reads otherwise.
    """
    half = f"-DHALF_IS_BF16={defines['HALF_IS_BF16']}"
    fibers = made(folder, "emulator.o", FIBERS.replace('#include "emulator.h"\n', EMULATOR), "-c", "-O2", half)
    text = "".join(f"#define {name} {value}\n" for name, value in defines.items()) + EMULATOR
    for path in sources:
        source = path.read_text()
        if edit is not None and edit[0] == path.name:
            if source.count(edit[1]) != 1:
                raise ValueError(f"{path.name} has {source.count(edit[1])} places that read {edit[1]!r}, not one")
            source = source.replace(*edit[1:])
        text += source
    # The sanitizer's calls end in emulator.cpp, which tells the test: its own library would only print.
    options = ("-O0", "-fsanitize=alignment", "-shared", str(fibers))
    library = ctypes.CDLL(str(made(folder, f"{kernel}.so", text + ENTRY % kernel, *options)))
    library.run.restype = ctypes.c_char_p
    return library


def run(library, kernel, grid, arguments):
    wrong = library.run(*grid, ctypes.create_string_buffer(arguments))
    if wrong:
        raise EmulationError(f"{kernel}: {wrong.decode()}")


def emulate(monkeypatch, folder, edit=None, capability=(9, 0)):
    """The CUDA sweeps run here as on a GPU of this capability; ``edit`` as in `build`."""

    def launcher(kernel, V, bf16, flags, grid, device):
        defines = cuda.defines_of(kernel, V, bf16, flags, capability)
        library = build(folder, kernel, cuda.sources_of(kernel), defines, edit)
        asked = (library.threads(), library.shared_bytes())
        output, wide = bool(dict(flags).get("OUTPUT", True)), cuda.is_wide(kernel, V, capability)
        launched = (cuda.threads_of(V, wide), cuda.shared_bytes(kernel, V, output, wide))
        if asked[0] != launched[0] or asked[1] > launched[1]:
            raise EmulationError(f"{kernel} needs {asked} threads and bytes of shared memory, got {launched}")

        return lambda arguments: run(library, kernel, grid, arguments)

    monkeypatch.setattr(cuda, "_launcher", launcher)
    # Plans keep what was prepared before.
    monkeypatch.setattr(kernels, "plan_of", functools.cache(kernels.plan_of.__wrapped__))


def emulate_step(monkeypatch, folder, edit=None):
    """The CUDA step runs here as on a GPU; ``edit`` as in `build`."""

    def launch(V, bf16, flags, grid, device, arguments):
        library = build(folder, "decode", cuda_step.SOURCES, cuda_step.defines_of(V, bf16, flags), edit)
        if library.threads() != cuda_step.threads_of(V) or library.shared_bytes() > STATIC_SHARED:
            asked = library.threads(), library.shared_bytes()
            raise EmulationError(f"decode needs {asked} threads and bytes of static shared memory")
        run(library, "decode", grid, arguments)

    monkeypatch.setattr(cuda_step, "_launch", launch)
