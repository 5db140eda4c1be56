"""Taylor attention's sweeps at F = 16 as CUDA kernels compiled at run time (kernels/*.cu), on capability 8.0 and newer.

Plain tensors in; what is launched and in which order stands in triton.py, which has the same sweeps for any F.
"""

from __future__ import annotations

import functools
import operator
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from linattn.core import nvrtc
from linattn.core.segments import Segments

FOLDER = Path(__file__).parent / "kernels"
WIDE = {"value_sweep": range(64, 129, 16), "key_sweep": (64,)}
"""The value dims at which a sweep's products with the state are wgmma's."""


def sources_of(kernel: str) -> tuple[Path, ...]:
    """The files that a kernel is compiled from, in order."""
    return tuple(FOLDER / name for name in ("features.cuh", "sweep.cuh", f"{kernel}.cu"))


def is_wide(kernel: str, V: int, capability: tuple[int, int]) -> bool:
    """Whether a sweep's products with the state are wgmma's, which four warps make at once: of 64 value columns."""
    return capability == (9, 0) and V in WIDE[kernel]


def chunk_of(V: int, wide: bool) -> int:
    """Tokens a chunk, 16 a warp: as many warps as value columns need, in whole fours if wide."""
    return -(-V // 64) * 64 if wide else V


def resident_of(V: int, output: bool, wide: bool) -> int:
    """Blocks that a multiprocessor is to have room for: more of those that find sums alone."""
    return 1 if V > 64 else 4 if wide and not output else 2


def threads_of(V: int, wide: bool = False) -> int:
    """A block's threads: a warp for each 16 tokens of a chunk."""
    return 2 * chunk_of(V, wide)


def shared_bytes(kernel: str, V: int, output: bool = True, wide: bool = False) -> int:
    """Dynamic shared memory of a block: `Shared` of the kernel."""
    chunk = chunk_of(V, wide)
    form, layout = 8 * 32 * 4 + 8 * 8 + 8, 160 * 12
    if kernel == "value_sweep":
        stage = 2 * chunk * ((2 if output else 1) * 24 + V + 8) + 8 * chunk
        outputs = V // 16 * (5120 + 4) + chunk // 16 * 32 * (V + 8) + 2 * form if output else 0
        sums = (1 if output else chunk // 16) * 12 * 32 * 4 + chunk // 16 * 4
        return 2 * stage + chunk // 16 * 5120 + outputs + sums + layout + 16
    stages = (3 if V > 80 else 4) * (2 * V * (24 + V + 8) + 4 * V)
    needed = stages + V // 16 * (2 * 5120 + 4) + 2 * form + 12 * 32 * 4 + layout
    return -(-needed // 16) * 16


def block_bytes(V: int, capability: tuple[int, int]) -> int:
    """Shared memory of the largest block that a call, with its gradients, launches on this capability."""
    return max(shared_bytes(kernel, V, wide=is_wide(kernel, V, capability)) for kernel in WIDE)


def defines_of(
    kernel: str, V: int, bf16: bool, flags: tuple[tuple[str, int], ...], capability: tuple[int, int]
) -> dict[str, int | str]:
    """What a kernel is compiled with. flags: the rest of what its head comment names."""
    wide = is_wide(kernel, V, capability)
    return {
        "V": V,
        "HALF_IS_BF16": int(bf16),
        "WIDE": int(wide),
        "RESIDENT": resident_of(V, bool(dict(flags).get("OUTPUT", True)), wide),
        "ONES": "0x3f803f80u" if bf16 else "0x3c003c00u",
        **dict(flags),
    }


@functools.cache
def loaded(kernel: str, V: int, bf16: bool, flags: tuple[tuple[str, int], ...], device: torch.device) -> nvrtc.Kernel:
    """A kernel compiled for and loaded on ``device``."""
    with torch.cuda.device(device):
        capability = torch.cuda.get_device_capability(device)
        cubin = nvrtc.compile_kernel(sources_of(kernel), defines_of(kernel, V, bf16, flags, capability), capability)
        wide = is_wide(kernel, V, capability)
        shared = shared_bytes(kernel, V, bool(dict(flags).get("OUTPUT", True)), wide)
        return nvrtc.load_kernel(cubin, kernel, threads_of(V, wide), shared)


class Operands(NamedTuple):
    """The tensors of one pass over the tokens: source (x, y), reader (r, w), what is written, states it starts from and
    ends with (fp32 views [.., P, V] and [.., P], P and V contiguous), and how documents lie and are cut.

    share, delta: [rows, heads, T] fp32, 1 / divisor and what every weight's gradient has in common.
    """

    x: Tensor
    y: Tensor
    r: Tensor | None
    w: Tensor | None
    out_y: Tensor | None
    out_r: Tensor | None
    share: Tensor | None
    delta: Tensor | None
    S_in: Tensor | None
    z_in: Tensor | None
    S_out: Tensor | None
    z_out: Tensor | None
    cu_seqlens: Tensor | None
    document: Tensor | None
    start: Tensor | None


@dataclass(frozen=True)
class Pass:
    """What a pass is prepared for but for its operands' layouts. heads: of the pass; state_heads: of its states.

    reverse: from the last token on. summary: what each segment adds to the state is put out, not where documents end.
    part: so many of those are read as one, so that nobody reads what a document's last (in reverse: first) add; 0: all
    are read.
    """

    heads: int
    state_heads: int
    scale: float
    normalize: bool
    reverse: bool = False
    summary: bool = False
    part: int = 0


ROWS = {"value_sweep": ("x", "y", "r", "out_y"), "key_sweep": ("x", "y", "r", "w", "out_r")}
"""The operands of each kernel that have rows and heads, in its `Arguments`' order, what it writes last."""


def prepared(operands: Operands, how: Pass, cut: Segments) -> Callable[[Operands], None]:
    """What makes this pass on operands of these layouts: value_sweep.cu writes out_y or sums, key_sweep.cu out_r."""
    for x in operands:
        if x is not None and x.device != operands.x.device:
            raise ValueError(f"all inputs must be on {operands.x.device}, cu_seqlens or a State is on {x.device}")
    value, key = operands.out_r is None or operands.out_y is not None, operands.out_r is not None
    runs = [_prepared("value_sweep", operands, how, cut, final=not key)] if value else []
    runs += [_prepared("key_sweep", operands, how, cut)] if key else []
    if len(runs) == 1:
        return runs[0]

    def run(operands: Operands) -> None:
        for each in runs:
            each(operands)

    return run


def _prepared(
    kernel: str, operands: Operands, how: Pass, cut: Segments, *, final: bool = True
) -> Callable[[Operands], None]:
    """final: the state after each document or segment is this kernel's to write, where it is asked for."""
    x, y, out = operands.x, operands.y, getattr(operands, ROWS[kernel][-1])
    rows = [getattr(operands, name) for name in ROWS[kernel]]
    flags = {
        "REVERSE": how.reverse,
        "NORMALIZE": how.normalize,
        "PACKED": operands.cu_seqlens is not None,
        "SPLIT": cut.per_row != 1,
        "INITIAL": operands.S_in is not None,
        "FINAL": 0 if operands.S_out is None or not final else 2 if how.summary else 1,
    }
    if kernel == "value_sweep":
        flags |= {"SUMS": not how.reverse or out is None, "OUTPUT": out is not None}
    strides = [s for t in rows for s in _strides(t, 3)] + _strides(operands.share, 2)
    for S, z in ((operands.S_in, operands.z_in), (operands.S_out, operands.z_out)):
        strides += _strides(S, 3) + _strides(z, 2)
    groups = [1 if t is None else how.heads // t.shape[2] for t in rows[:-1]]
    sizes = (x.shape[1], cut.tokens, cut.per_row, how.part, *groups, how.heads // how.state_heads)
    rest = struct.pack(f"@{len(strides)}q{len(sizes)}if0q", *strides, *sizes, how.scale)
    places = [Operands._fields.index(name) for name in (*ROWS[kernel], *Operands._fields[6:])]
    pick, pack = operator.itemgetter(*places), struct.Struct(f"@{len(places)}P").pack
    given = tuple((name, int(flag)) for name, flag in sorted(flags.items()))
    launch = _launcher(kernel, y.shape[3], x.dtype == torch.bfloat16, given, (how.heads, cut.count), x.device)

    def run(operands: Operands) -> None:
        launch(pack(*[0 if t is None else t.data_ptr() for t in pick(operands)]) + rest)

    return run


def _launcher(
    kernel: str,
    V: int,
    bf16: bool,
    flags: tuple[tuple[str, int], ...],
    grid: tuple[int, int],
    device: torch.device,
) -> Callable[[bytes], None]:
    """What runs a kernel, compiled and loaded, on the bytes of its `Arguments`."""
    return functools.partial(nvrtc.launch_kernel, loaded(kernel, V, bf16, flags, device), grid, device)


def _strides(x: Tensor | None, axes: int) -> list[int]:
    return [0] * axes if x is None else list(x.stride()[:axes])
