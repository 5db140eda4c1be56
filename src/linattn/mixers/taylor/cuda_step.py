"""One token a row at F = 16 by kernels/decode.cu, compiled at run time: over States, or over a `DeferredPool`.

What it does for any F is in triton_step.py and triton_step_deferred.py. Plain tensors in.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from linattn.core import nvrtc
from linattn.mixers.taylor.cuda import FOLDER

SOURCES = (FOLDER / "decode.cu",)
ROWS = 8
"""Rows of S that a block's threads hold side by side, four columns each: 20 a thread."""
RESIDENT_THREADS = 512
"""Of all blocks on a multiprocessor: a thread may then have the 128 registers that it needs."""
Flags = tuple[tuple[str, int | str], ...]


def threads_of(V: int) -> int:
    """A block's threads."""
    return ROWS * V // 4


def defines_of(V: int, bf16: bool, flags: Flags) -> dict[str, int | str]:
    """What decode.cu is compiled with. flags: the rest of what its head comment names."""
    resident = RESIDENT_THREADS // threads_of(V)
    return {"V": V, "HALF_IS_BF16": int(bf16), "WIDE": 0, "ROWS": ROWS, "RESIDENT": resident, **dict(flags)}


@functools.cache
def _loaded(V: int, bf16: bool, flags: Flags, device: torch.device) -> nvrtc.Kernel:
    with torch.cuda.device(device):
        capability = torch.cuda.get_device_capability(device)
        cubin = nvrtc.compile_kernel(SOURCES, defines_of(V, bf16, flags), capability)
        return nvrtc.load_kernel(cubin, "decode", threads_of(V), 0)


def _launch(V: int, bf16: bool, flags: Flags, grid: tuple[int, int], device: torch.device, arguments: bytes) -> None:
    nvrtc.launch_kernel(_loaded(V, bf16, flags, device), grid, device, arguments)


def step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pool: Sequence[Tensor | None],
    slots: Tensor,
    scale: float,
    normalize: bool,
) -> Tensor:
    """One token a row: y [B, Ho, V]; the pool, S and z or the leaves of a `DeferredPool`, in place."""
    S, z, *deferred = pool
    recent_k, recent_v, count, copy = deferred or (None,) * 4
    assert S is not None
    n_state, V = S.shape[1], S.shape[3]
    heads = max(q.shape[1], n_state)
    y = torch.empty(q.shape[0], heads, V, device=q.device, dtype=v.dtype)
    if not y.numel():
        return y
    flags = (
        ("SLOT", "i64" if slots.dtype == torch.int64 else "int"),
        ("READERS", heads // n_state),
        ("Q_GROUP", heads // q.shape[1]),
        ("K_GROUP", n_state // k.shape[1]),
        ("V_GROUP", n_state // v.shape[1]),
        ("NORMALIZE", int(normalize)),
        ("WAITING", 0 if recent_k is None else recent_k.shape[2]),
        ("COPY", int(copy is not None)),
    )
    for leaf in (S, recent_k, recent_v, copy):
        if leaf is not None and leaf.data_ptr() % 16:
            raise ValueError(
                f"taylor's step by cuda: the pool's memory must begin at a multiple of 16 bytes, a leaf of shape "
                f'{list(leaf.shape)} does not; make pools by new_pool, or ask for backend="triton"'
            )
    slots = slots.contiguous()
    pointers = [0 if x is None else x.data_ptr() for x in (q, k, v, y, S, z, recent_k, recent_v, count, copy, slots)]
    strides = [s for x in (q, k, v, S, z, recent_k, recent_v) for s in _strides(x)]
    strides += [_strides(count)[0], *_strides(copy)]
    arguments = struct.pack(f"@11P{len(strides)}q2if", *pointers, *strides, n_state, S.shape[0], scale)
    _launch(V, q.dtype == torch.bfloat16, flags, (n_state, q.shape[0]), q.device, arguments)
    return y


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if x is None else x.stride()[:2]
