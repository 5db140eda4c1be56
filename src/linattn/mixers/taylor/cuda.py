"""Taylor attention's sweeps at F = 16 as CUDA kernels compiled at run time (kernels/*.cu), on capability 8.0 and newer.

Plain tensors in; what is launched and in which order stands in triton.py, which has the same sweeps for any F.
"""

from __future__ import annotations

import functools
import struct
from pathlib import Path

import torch
from torch import Tensor

from linattn.core import nvrtc
from linattn.core.segments import Segments
from linattn.mixers.taylor.chunked import TaylorState

FOLDER = Path(__file__).parent / "kernels"
FEATURE_DIM = 16
VALUE_DIMS = range(32, 129, 16)
KEY_CHUNK = 32
"""Tokens a chunk of key_sweep.cu; value_sweep.cu's are V."""


def threads_of(kernel: str, V: int) -> int:
    """A block's threads: a warp for each 16 value columns, or for each pair of the 20 groups of products."""
    return 2 * V if kernel == "value_sweep" else 320


def shared_bytes(kernel: str, V: int, output: bool = True) -> int:
    """Dynamic shared memory of a block: `Shared` of the kernel."""
    if kernel == "value_sweep":
        stage = 2 * V * ((2 if output else 1) * 24 + V + 8) + 8 * V
        outputs = V // 16 * (5120 + 32 * (V + 8)) + 32 + 32 * 32 + 16 * 32 + 16 if output else 0
        return 2 * stage + V // 16 * 5120 + outputs + 160 * 8
    stage = 2 * (2 * KEY_CHUNK * 24 + 2 * KEY_CHUNK * (V + 8)) + 8 * KEY_CHUNK
    parts = 4 * (10 * 16 * (KEY_CHUNK + 4) + 8 * 16 * 20 + KEY_CHUNK)
    return 2 * (stage + parts) + 4 * 2 * 16 * 32


def defines_of(
    kernel: str, V: int, bf16: bool, flags: tuple[tuple[str, int], ...], capability: tuple[int, int]
) -> dict[str, int | str]:
    """What a kernel is compiled with. flags: the rest of what its head comment names."""
    wide = kernel == "value_sweep" and V == 64 and capability == (9, 0)
    return {
        "V": V,
        "HALF_IS_BF16": int(bf16),
        "WIDE": int(wide),
        "ONES": "0x3f803f80u" if bf16 else "0x3c003c00u",
        **dict(flags),
    }


@functools.cache
def loaded(kernel: str, V: int, bf16: bool, flags: tuple[tuple[str, int], ...], device: torch.device) -> nvrtc.Kernel:
    """A kernel compiled for and loaded on ``device``."""
    sources = (FOLDER / "features.cuh", FOLDER / f"{kernel}.cu")
    with torch.cuda.device(device):
        capability = torch.cuda.get_device_capability(device)
        cubin = nvrtc.compile_kernel(sources, defines_of(kernel, V, bf16, flags, capability), capability)
        shared = shared_bytes(kernel, V, bool(dict(flags).get("OUTPUT", True)))
        return nvrtc.load_kernel(cubin, kernel, threads_of(kernel, V), shared)


def _run(
    kernel: str,
    V: int,
    flags: dict[str, int],
    heads: int,
    cut: Segments,
    like: Tensor,
    fields: list[tuple[str, object]],
) -> None:
    kind = "".join(letter for letter, _ in fields)
    arguments = struct.pack("@" + kind + "0q", *(value for _, value in fields))
    made = loaded(kernel, V, like.dtype == torch.bfloat16, tuple(sorted(flags.items())), like.device)
    nvrtc.launch_kernel(made, (heads, cut.count), arguments)


def _pointers(*tensors: Tensor | None) -> list[tuple[str, object]]:
    return [("P", 0 if x is None else x.data_ptr()) for x in tensors]


def _strides(*tensors: Tensor | None) -> list[tuple[str, object]]:
    return [("q", s) for x in tensors for s in (x.stride()[:3] if x is not None else (0, 0, 0))]


def _state_strides(*states: TaylorState | None) -> list[tuple[str, object]]:
    strides: list[tuple[str, object]] = []
    for state in states:
        sizes = (0,) * 5 if state is None else (*state.S.stride()[:3], *state.z.stride()[:2])
        strides += [("q", s) for s in sizes]
    return strides


def _leaves(*states: TaylorState | None) -> list[Tensor | None]:
    return [leaf for state in states for leaf in (state if state is not None else (None, None))]


def value_sweep(
    x: Tensor,
    y: Tensor,
    r: Tensor | None,
    out: Tensor | None,
    cut: Segments,
    *,
    heads: int,
    state_heads: int,
    scale: float,
    normalize: bool,
    reverse: bool,
    cu_seqlens: Tensor | None,
    share: Tensor | None,
    delta: Tensor | None,
    state_in: TaylorState | None,
    state_out: TaylorState | None,
    summary: bool = False,
) -> None:
    """Launch kernels/value_sweep.cu; its head comment says what of what. States: views of fp32, V and P contiguous."""
    flags = {
        "REVERSE": reverse,
        "NORMALIZE": normalize,
        "SUMS": not reverse or out is None,
        "OUTPUT": out is not None,
        "PACKED": cu_seqlens is not None,
        "SPLIT": cut.per_row != 1,
        "INITIAL": state_in is not None,
        "FINAL": 0 if state_out is None else 2 if summary else 1,
    }
    sizes = (x.shape[1], cut.tokens, cut.per_row, heads // x.shape[2], heads // y.shape[2])
    sizes += (heads // r.shape[2] if r is not None else 1, heads // state_heads)
    fields = [
        *_pointers(x, y, r, out, share, delta, *_leaves(state_in, state_out), cu_seqlens, cut.document, cut.start),
        *_strides(x, y, r, out),
        *(("q", s) for s in (share.stride()[:2] if share is not None else (0, 0))),
        *_state_strides(state_in, state_out),
        *(("i", n) for n in sizes),
        ("f", scale),
    ]
    _run("value_sweep", y.shape[3], {n: int(f) for n, f in flags.items()}, heads, cut, x, fields)


def key_sweep(
    x: Tensor,
    y: Tensor,
    r: Tensor,
    w: Tensor,
    out: Tensor,
    cut: Segments,
    *,
    heads: int,
    state_heads: int,
    scale: float,
    normalize: bool,
    reverse: bool,
    cu_seqlens: Tensor | None,
    share: Tensor | None,
    delta: Tensor | None,
    state_in: TaylorState | None,
    state_out: TaylorState | None,
) -> None:
    """Launch kernels/key_sweep.cu; its head comment says what of what."""
    flags = {
        "REVERSE": reverse,
        "NORMALIZE": normalize,
        "PACKED": cu_seqlens is not None,
        "SPLIT": cut.per_row != 1,
        "INITIAL": state_in is not None,
        "FINAL": state_out is not None,
    }
    sizes = (x.shape[1], cut.tokens, cut.per_row, *(heads // t.shape[2] for t in (x, y, r, w)), heads // state_heads)
    fields = [
        *_pointers(x, y, r, w, out, share, delta, *_leaves(state_in, state_out), cu_seqlens, cut.document, cut.start),
        *_strides(x, y, r, w, out),
        *(("q", s) for s in (share.stride()[:2] if share is not None else (0, 0))),
        *_state_strides(state_in, state_out),
        *(("i", n) for n in sizes),
        ("f", scale),
    ]
    _run("key_sweep", y.shape[3], {n: int(f) for n, f in flags.items()}, heads, cut, x, fields)
