"""CUDA kernels compiled at run time: NVRTC and the driver, which PyTorch's own CUDA builds bring, through ctypes.

Nothing else is needed on a user's machine: no nvcc, no headers, no C++ compiler. A kernel takes one struct by value.
"""

from __future__ import annotations

import ctypes
import functools
import site
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from linattn.core.tiles import current_stream

BLOCK_BYTES = {(8, 0): 166_912, (8, 7): 166_912, (9, 0): 232_448, (10, 0): 232_448, (10, 3): 232_448}
"""Shared memory that a block may ask for, by compute capability (CUDA programming guide)."""
LEAST_BLOCK_BYTES = 101_376
"""Of the capabilities that are not named."""

WARP = Path(__file__).parent / "cuda" / "warp.cuh"
"""Included before every kernel: the instructions of a warp, by name."""


class CompileError(RuntimeError):
    """A kernel of ours did not compile or load; the compiler's words are in it."""


@dataclass(frozen=True)
class Kernel:
    """A kernel loaded on one device, and the bytes of dynamic shared memory that its blocks ask for."""

    function: Any
    threads: int
    shared: int


def _find_nvrtc() -> Path | None:
    roots = [Path(torch.__file__).parent.parent, *map(Path, site.getsitepackages())]
    major = (torch.version.cuda or "13").split(".")[0]
    folders = [folder for root in roots for folder in root.glob("nvidia/*/lib")]
    for folder in (*folders, Path(sys.prefix) / "lib", Path("/usr/local/cuda/lib64")):
        for found in sorted(folder.glob(f"libnvrtc.so.{major}*")):
            return found
    return None


NVRTC = _find_nvrtc()
"""The compiler's library, looked for once; None where there is none."""


def refusals() -> list[str]:
    """Why nothing can be compiled on this machine; [] means it can."""
    return [] if NVRTC is not None else ["needs NVRTC, which PyTorch's CUDA builds bring; none was found"]


def block_bytes(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a block may ask for on a GPU of this capability."""
    return BLOCK_BYTES.get(capability, LEAST_BLOCK_BYTES)


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    if NVRTC is None:
        raise CompileError(refusals()[0])
    for builtins in NVRTC.parent.glob("libnvrtc-builtins.so*"):
        # NVRTC looks for it by name alone, which finds it only if it is loaded already.
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(NVRTC))


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def compile_kernel(sources: tuple[Path, ...], defines: Mapping[str, int | str], capability: tuple[int, int]) -> bytes:
    """The machine code of ``sources``, one after another behind warp.cuh, for a GPU of this capability.

    Raises:
        CompileError: with the compiler's log.
    """
    text = "".join(f"#define {name} {value}\n" for name, value in defines.items())
    text += "".join(path.read_text() for path in (WARP, *sources))
    lib, program = _nvrtc(), ctypes.c_void_p()
    lib.nvrtcCreateProgram(ctypes.byref(program), text.encode(), sources[-1].name.encode(), 0, None, None)
    try:
        # "a": Hopper's own instructions, which no later architecture runs.
        hopper = "a" if capability == (9, 0) else ""
        words = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}{hopper}", "--std=c++17"]
        options = (ctypes.c_char_p * len(words))(*(word.encode() for word in words))
        if lib.nvrtcCompileProgram(program, len(words), options):
            raise CompileError(
                f"{sources[-1].name} did not compile for {words[0]}:\n{_text(lib, program, 'ProgramLog')}"
            )
        return _bytes(lib, program, "CUBIN")
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def _bytes(lib: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(lib, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


def _text(lib: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> str:
    return _bytes(lib, program, what).rstrip(b"\0").decode(errors="replace")


_MOST_DYNAMIC_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"""


def load_kernel(cubin: bytes, name: str, threads: int, shared: int) -> Kernel:
    """The kernel ``name`` of this machine code on the current device."""
    torch.cuda.current_stream()
    driver, module, function = _driver(), ctypes.c_void_p(), ctypes.c_void_p()
    _check(driver.cuModuleLoadData(ctypes.byref(module), cubin), "cuModuleLoadData")
    _check(driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), "cuModuleGetFunction")
    if shared:
        _check(driver.cuFuncSetAttribute(function, _MOST_DYNAMIC_SHARED, shared), "cuFuncSetAttribute")
    return Kernel(function, threads, shared)


_ARGUMENTS = ctypes.c_char_p * 1


def launch_kernel(kernel: Kernel, grid: tuple[int, int], device: torch.device, arguments: bytes) -> None:
    """Run on PyTorch's current stream of ``device``; ``arguments`` are the bytes of the kernel's one parameter."""
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch_kernel(kernel, grid, device, arguments)
        return
    stream = ctypes.c_void_p(current_stream(device))
    code = _driver().cuLaunchKernel(
        kernel.function, *grid, 1, kernel.threads, 1, 1, kernel.shared, stream, _ARGUMENTS(arguments), None
    )
    _check(code, "cuLaunchKernel")


_CAPTURED = 900
"""CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"""


def _check(code: int, call: str) -> None:
    if code:
        hint = ": a kernel is loaded by its first call; run it once before capturing a CUDA graph"
        raise CompileError(f"{call} failed with the driver's error {code}{hint if code == _CAPTURED else ''}")
