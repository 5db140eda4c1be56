"""Runs Taylor attention's CUDA kernels on a CPU: built with g++ behind emulator.h, in place of the GPU's launches.

Command: pytest tests/test_taylor_cuda.py
"""

import ctypes
import functools
import hashlib
import os
import subprocess
from pathlib import Path

from linattn.mixers.taylor import cuda
from linattn.mixers.taylor import triton as kernels

EMULATOR = Path(__file__).parent / "emulator.h"
ENTRY = """
extern "C" const char* run(int grid_x, int grid_y, const Arguments* given) {
    const Arguments arguments = *given;
    return emulated::launch(grid_x, grid_y, THREADS, [arguments] { %s(arguments); });
}
extern "C" int threads() { return THREADS; }
extern "C" int shared_bytes() { return int(__stop_dynamic_shared - __start_dynamic_shared); }
"""


class EmulationError(RuntimeError):
    """A kernel did what a GPU would not do, or would hang at."""


def build(folder, kernel, defines, edit=None):
    """The library whose ``run`` launches ``kernel``, kept in ``folder`` under what it was made of.

    edit: (file, old, new), one place in one of the kernel's files that reads otherwise.
    """
    text = "".join(f"#define {name} {value}\n" for name, value in defines.items()) + EMULATOR.read_text()
    for name in ("features.cuh", f"{kernel}.cu"):
        source = (cuda.FOLDER / name).read_text()
        if edit is not None and edit[0] == name:
            if source.count(edit[1]) != 1:
                raise ValueError(f"{name} has {source.count(edit[1])} places that read {edit[1]!r}, not one")
            source = source.replace(*edit[1:])
        text += source
    text += ENTRY % kernel
    made = folder / f"{kernel}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    if not made.exists():
        code, part = made.with_suffix(f".{os.getpid()}.cpp"), made.with_suffix(f".{os.getpid()}")
        code.write_text(text)
        # The sanitizer's calls end in emulator.h, which tells the test: its own library would only print.
        options = ["-std=c++17", "-shared", "-fPIC", "-O1", "-w", "-fsanitize=alignment"]
        command = ["g++", *options, "-o", str(part), str(code)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{code} did not compile:\n{done.stderr[:3000]}")
        part.replace(made)
    library = ctypes.CDLL(str(made))
    library.run.restype = ctypes.c_char_p
    return library


def emulate(monkeypatch, folder, edit=None, capability=(9, 0)):
    """The CUDA sweeps run here as on a GPU of this capability; ``edit`` as in `build`."""

    def launcher(kernel, V, bf16, flags, grid, device):
        library = build(folder, kernel, cuda.defines_of(kernel, V, bf16, flags, capability), edit)
        asked = (library.threads(), library.shared_bytes())
        output, wide = bool(dict(flags).get("OUTPUT", True)), cuda.is_wide(kernel, V, capability)
        launched = (cuda.threads_of(V, wide), cuda.shared_bytes(kernel, V, output, wide))
        if asked[0] != launched[0] or asked[1] > launched[1]:
            raise EmulationError(f"{kernel} needs {asked} threads and bytes of shared memory, got {launched}")

        def launch(arguments):
            wrong = library.run(*grid, ctypes.create_string_buffer(arguments))
            if wrong:
                raise EmulationError(f"{kernel}: {wrong.decode()}")

        return launch

    monkeypatch.setattr(cuda, "_launcher", launcher)
    # Plans keep what was prepared before.
    monkeypatch.setattr(kernels, "plan_of", functools.cache(kernels.plan_of.__wrapped__))
