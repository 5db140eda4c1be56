"""What the Triton kernels of all mixers share: refusals, block sizes, aligned rows, shared heads, launches.

Imports triton only inside functions: `import linattn` must not.
"""

from __future__ import annotations

import functools
import importlib.metadata
import operator
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


def aligned(x: Tensor) -> Tensor:
    """``x`` [B, T, H, D] itself, or a copy where its rows cannot be fetched in pieces of 16 bytes.

    An expanded gradient is such, and a view that begins off 16 bytes, which strides do not tell `layout_refusals`.
    """
    rows, tokens, heads, inner = x.stride()
    if inner == 1 and tokens > 0 and not (rows | tokens | heads) % 8 and not x.data_ptr() % 16:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def gradient_of(x: Tensor, heads: int, dtype: torch.dtype | None = torch.float32) -> Tensor:
    """Where a kernel of ``heads`` heads writes the gradient of ``x`` [B, T, H, D], one for each head.

    Heads that share one of x's are summed by `gathered`: theirs are in ``dtype``; in x's own where it is None.
    """
    B, T, H, D = x.shape
    return torch.empty(B, T, heads, D, device=x.device, dtype=x.dtype if heads == H or dtype is None else dtype)


def gathered(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of ``x``: of every head of its own, or the sums over those that share one, in fp32."""
    if gradient.shape[2] == x.shape[2]:
        return gradient
    return gradient.unflatten(2, (x.shape[2], -1)).sum(3, dtype=torch.float32).to(x.dtype)


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd is to know of what these tensors make."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


Launch = Callable[[Sequence[Tensor]], None]
"""Runs one kernel on tensors of the layout that it was prepared for."""


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
    kinds = (*[x.dtype for x in tensors], *[x.device for x in tensors])
    _remembered(kernel, grid, kinds, tuple(numbers), tuple(constants), warps)(tensors)


@functools.lru_cache(4096)
def _remembered(
    kernel: Any, grid: tuple[int, int, int], kinds: Any, numbers: tuple[float, ...], constants: Any, warps: int
) -> Launch:
    return launcher(kernel, grid, numbers, constants, warps)


def launcher(
    kernel: Any, grid: tuple[int, int, int], numbers: Sequence[float], constants: Sequence[Any], warps: int
) -> Launch:
    """`launch` of everything but the tensors, to be kept by who runs it again on tensors of these dtypes and devices.

    Triton's own way to a compiled kernel took most of 200 us a call with kernels of seventy parameters. What was
    compiled is remembered under what else Triton specializes on: which tensors begin at multiples of 16 bytes.
    """
    from triton.runtime._allocation import _allocator as allocator

    rest = (*numbers, *constants)
    known: dict[Any, Callable[[Sequence[int]], None]] = {}

    def run(tensors: Sequence[Tensor]) -> None:
        device = tensors[0].device
        if device.index is not None and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                run(tensors)
            return
        pointers = [x.data_ptr() for x in tensors]
        offsets = 0 if not functools.reduce(operator.or_, pointers) % 16 else tuple([p % 16 for p in pointers])
        again = known.get(offsets)
        if again is not None:
            again(pointers)
            return
        token = allocator.set(_descriptor_allocator(device))
        try:
            compiled = kernel[grid](*tensors, *rest, num_warps=warps)
        finally:
            allocator.reset(token)
        if TRITON_VERSION in _REMEMBERED_VERSIONS and compiled is not None:
            known[offsets] = _runner(compiled, grid, rest, device)

    return run


_REMEMBERED_VERSIONS = {(3, 6)}
"""Where calling a compiled kernel with addresses and all of its other parameters has been run on a GPU."""


def _runner(
    compiled: Any, grid: tuple[int, int, int], rest: tuple[Any, ...], device: torch.device
) -> Callable[[Sequence[int]], None]:
    """A compiled kernel's launch as Triton's own last step makes it.

    Of an address its launcher asks nothing; of each tensor, it asks for the address and the driver whether it is one.
    """
    from triton import knobs
    from triton.runtime._allocation import _allocator as allocator

    start, function, metadata, hooks = compiled.run, compiled.function, compiled.packed_metadata, knobs.runtime
    allocate = _descriptor_allocator(device)

    def run(pointers: Sequence[int]) -> None:
        if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:  # a profiler's, which want more of a launch
            compiled[grid](*pointers, *rest)
            return
        start(*grid, current_stream(device), function, metadata, None, None, None, *pointers, *rest)

    def run_with_memory(pointers: Sequence[int]) -> None:
        token = allocator.set(allocate)
        try:
            run(pointers)
        finally:
            allocator.reset(token)

    return run_with_memory if compiled.metadata.global_scratch_size else run


def current_stream(device: torch.device) -> int:
    """The handle of torch's current stream on a GPU, without an object around it."""
    return torch._C._cuda_getCurrentRawStream(device.index)


@functools.cache
def _descriptor_allocator(device: torch.device) -> Any:
    """Torch's allocator gives the 128 bytes each that tensor descriptors made in kernels need.

    Triton keeps its allocator in a context variable, which autograd's threads do not inherit: every launch sets this.
    """

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, device=device, dtype=torch.int8)

    return allocate
