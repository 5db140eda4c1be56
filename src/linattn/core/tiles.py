"""What the Triton kernels of all mixers share: common refusals, block sizes, and the memory that descriptors need.

Imports triton only inside functions: `import linattn` must not.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from linattn.core.dispatch import Call

OLDEST_TRITON = (3, 4)
"""The first with tensor descriptors made inside a kernel that fall back to pointers below capability 9.0."""

OLDEST_CAPABILITY = (8, 0)
"""The first with bf16 matrix products and asynchronous copies."""


def _triton_version() -> tuple[int, int] | None:
    try:
        major, minor = importlib.metadata.version("triton").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return None
    return int(major), int(minor)


TRITON_VERSION = _triton_version()
"""(major, minor) of the installed triton, read without importing it; None where there is none."""


def machine_refusals(call: Call) -> list[str]:
    """Why no Triton kernel of ours can run where this call is."""
    if call.device != "cuda" or torch.version.hip is not None:
        return [f"needs an NVIDIA GPU, the inputs are on {call.device}"]
    wrong = []
    if TRITON_VERSION is None:
        wrong.append("needs triton, which is not installed: pip install triton")
    elif TRITON_VERSION < OLDEST_TRITON:
        found, oldest = (".".join(map(str, x)) for x in (TRITON_VERSION, OLDEST_TRITON))
        wrong.append(f"needs triton {oldest} or newer, found {found}")
    if call.capability is not None and call.capability < OLDEST_CAPABILITY:
        wrong.append(f"needs compute capability 8.0, this GPU has {call.capability[0]}.{call.capability[1]}")
    return wrong


def layout_refusals(call: Call, names: tuple[str, ...]) -> list[str]:
    """Why rows of these 16-bit tensors cannot be fetched in whole 16-byte pieces, as the bulk copy engine does."""
    wrong = []
    for name in names:
        *outer, inner = call.strides[name]
        sizes = call.shapes[name][:-1]
        if inner != 1 and call.shapes[name][-1] != 1:
            wrong.append(f"needs {name} contiguous along its last axis, its stride there is {inner}")
        elif any(stride % 8 for stride, size in zip(outer, sizes, strict=True) if size > 1):
            wrong.append(f"needs {name}'s rows to start at multiples of 16 bytes, its strides are {call.strides[name]}")
    return wrong


def block_of(dim: int) -> int:
    """The power of two, at least 16, that a tile's side must have to hold ``dim``."""
    return max(16, 1 << (dim - 1).bit_length())


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many streaming multiprocessors a device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: Sequence[Tensor],
    numbers: Sequence[float],
    constants: Sequence[Any],
    *,
    warps: int,
) -> None:
    """Run a kernel, on its tensors' device, whose parameters are, in this order, tensors, numbers and constexprs."""
    launcher(kernel, grid, tuple(numbers), tuple(constants), warps)(tensors)


@functools.lru_cache(4096)
def launcher(
    kernel: Any, grid: tuple[int, int, int], numbers: tuple[float, ...], constants: tuple[Any, ...], warps: int
) -> Callable[[Sequence[Tensor]], None]:
    """`launch` of everything but the tensors, to be kept by who runs it again.

    Triton's own way to a compiled kernel took most of 200 us a call with kernels of seventy parameters. What was
    compiled is remembered here under everything that Triton specializes on, the numbers' values being more than that.
    """
    from triton.runtime._allocation import _allocator as allocator

    rest = (*numbers, *constants)
    known: dict[Any, Any] = {}

    def run(tensors: Sequence[Tensor]) -> None:
        device = tensors[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                run(tensors)
            return
        key = (device, *[x.dtype for x in tensors], *[x.data_ptr() % 16 for x in tensors])
        token = allocator.set(_descriptor_allocator(device))
        try:
            compiled = known.get(key)
            if compiled is not None:
                compiled(*tensors, *rest)
                return
            compiled = kernel[grid](*tensors, *rest, num_warps=warps)
            if TRITON_VERSION in _REMEMBERED_VERSIONS and hasattr(compiled, "__getitem__"):
                known[key] = compiled[grid]
        finally:
            allocator.reset(token)

    return run


_REMEMBERED_VERSIONS = {(3, 6)}
"""Where calling a compiled kernel with all of its parameters, constexprs included, has been run on a GPU."""


@functools.cache
def _descriptor_allocator(device: torch.device) -> Any:
    """Torch's allocator gives the 128 bytes each that tensor descriptors made in kernels need.

    Triton keeps its allocator in a context variable, which autograd's threads do not inherit: every launch sets this.
    """

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, device=device, dtype=torch.int8)

    return allocate
