"""Sliding-window attention, backend "triton": what the operators of this folder run on a GPU.

Plain tensors in and out. How a call is cut in blocks is `tile_for`; README.md in this folder has the reasons. Never run
as a script.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from linattn.core.tiles import block_of, launch
from linattn.mixers.window.triton_backward import _key_gradient, _query_gradient
from linattn.mixers.window.triton_forward import _forward
from linattn.mixers.window.triton_step import _step

Pass = Literal["forward", "query", "key"]

FEW_PROGRAMS = 256
"""Of a step: up to here an H200's 132 multiprocessors have next to nothing else to do while one waits for memory."""


@dataclass(frozen=True)
class Tile:
    """How one program is built: queries and keys a block, warps, load stages."""

    queries: int
    keys: int
    warps: int
    stages: int


HOPPER: dict[tuple[Pass, int], Tile] = {
    ("forward", 64): Tile(64, 64, 4, 2),
    ("forward", 128): Tile(64, 64, 4, 3),
    ("query", 64): Tile(64, 64, 4, 3),
    ("query", 128): Tile(64, 64, 4, 2),
    ("key", 64): Tile(64, 64, 4, 2),
    ("key", 128): Tile(64, 64, 4, 2),
}
"""By pass and by the side of a tile that holds D and V, from capability 9.0 on.

Measured on an H200, 16 heads of 16 x 8,192, W 128, D 64 and 112. At D 112 dk and dv took 1.73 ms with four warps, which
spill up to 208 bytes a thread, and 2.77 with eight, which do not; dq 1.21 and 2.4.
"""

PLAIN: dict[tuple[Pass, int], Tile] = {
    ("forward", 64): Tile(64, 64, 4, 2),
    ("forward", 128): Tile(64, 64, 4, 2),
    ("query", 64): Tile(64, 64, 4, 2),
    ("query", 128): Tile(64, 64, 4, 1),
    ("key", 64): Tile(64, 64, 4, 2),
    ("key", 128): Tile(64, 64, 8, 1),
}
"""Below: in less than 100 KB of shared memory."""


def sides_of(D: int, V: int) -> tuple[int, int]:
    """The sides of tiles that hold D and V: at least 64, because narrower ones beside it went wrong on an H200."""
    return max(block_of(D), 64), max(block_of(V), 64)


def tile_for(which: Pass, D: int, V: int, device: torch.device) -> Tile:
    """The tile of a pass for these head dims on this GPU."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return (HOPPER if hopper else PLAIN)[which, max(sides_of(D, V))]


def walk_for(programs: int, side: int, window: int) -> tuple[int, int]:
    """Keys that a program of a step holds at a time, and its warps. side: numbers a key, over all queries that read it.

    8,192 numbers of keys and as many of values in four warps where programs are few; else 2,048, and 32 a thread: 128
    rows of 16 heads, D 64, W 129, took 38 us on an H200 (2.4 times the floor), with 4,096 and more 46 to 73.
    """
    few = programs <= FEW_PROGRAMS
    keys = max(16, min(block_of(max(1, window - 1)), (8192 if few else 2048) // side))
    return keys, 4 if few else min(16, max(1, keys * side // 1024))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state_k: Tensor | None,
    state_v: Tensor | None,
    count: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int,
    scale: float,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """y [B, T, Hq, V], and log2 of the sum of 2^(scaled scores), float32 [B, Hq, T]."""
    B, T, heads, D = q.shape
    y = q.new_empty(B, T, heads, v.shape[3])
    lse = q.new_empty(B, heads, T, dtype=torch.float32)
    if y.numel() == 0:
        return y, lse
    tile = tile or tile_for("forward", D, v.shape[3], q.device)
    initial = state_k is not None and window > 1
    tensors, strides = _state(state_k, state_v, count, q, initial)
    _launch(
        _forward,
        _grid(q, cu_seqlens, tile.queries, heads),
        (q, k, v, *tensors, q if cu_seqlens is None else cu_seqlens, y, lse),
        (scale, T, _documents(q, cu_seqlens), *_strides(q, k, v, y), *strides),
        (window, q, k, v, cu_seqlens, initial),
        tile,
    )
    return y, lse


def backward(
    dy: Tensor,
    y: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state_k: Tensor | None,
    state_v: Tensor | None,
    count: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int,
    scale: float,
    by_query: Tile | None = None,
    by_key: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and the gradients of the State's keys and values (of no rows where there is no State)."""
    grads = [torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k, v)]
    states = [x.new_empty(0) if s is None else s.new_empty(s.shape) for s, x in ((state_k, k), (state_v, v))]
    if y.numel() == 0:
        dq, dk, dv, d_state_k, d_state_v = (x.zero_() for x in (*grads, *states))
        return dq, dk, dv, d_state_k, d_state_v
    D, V, heads, T = q.shape[3], v.shape[3], q.shape[2], q.shape[1]
    by_query = by_query or tile_for("query", D, V, q.device)
    by_key = by_key or tile_for("key", D, V, q.device)
    if dy.stride(3) != 1:
        dy = dy.contiguous()
    initial = state_k is not None and window > 1
    tensors, strides = _state(state_k, state_v, count, q, initial)
    cu, documents = q if cu_seqlens is None else cu_seqlens, _documents(q, cu_seqlens)
    deltas = torch.empty_like(lse)
    _launch(
        _query_gradient,
        _grid(q, cu_seqlens, by_query.queries, heads),
        (q, k, v, *tensors, cu, y, dy, lse, deltas, grads[0]),
        (scale, T, documents, *_strides(q, k, v, y, dy, grads[0]), *strides),
        (window, q, k, v, cu_seqlens, initial),
        by_query,
    )
    passes: list[tuple[Any, ...]] = [(k, v, *grads[1:], _grid(q, cu_seqlens, by_key.keys, k.shape[2]), False)]
    if initial:
        blocks = -(-(window - 1) // by_key.keys)
        passes.append((state_k, state_v, *states, (blocks * k.shape[2], 1, documents), True))
    for keys, values, dk, dv, grid, state in passes:
        _launch(
            _key_gradient,
            grid,
            (q, keys, values, tensors[2], cu, dy, lse, deltas, dk, dv),
            (scale, T, documents, *_strides(q, keys, values, dy, dk, dv)),
            (window, q, k, v, cu_seqlens, state),
            by_key,
        )
    dq, dk, dv = grads
    return dq, dk, dv, states[0], states[1]


def step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    tokens: Tensor,
    slots: Tensor,
    scale: float,
    walk: tuple[int, int] | None = None,
) -> Tensor:
    """One token a row; rings [slots + 1, W, H, D or V] and tokens [slots + 1] in place. y [B, Hq, V].

    walk: see `walk_for`.
    """
    rows, heads, D = q.shape
    key_heads, V, window = k.shape[1], v.shape[2], ring_k.shape[1]
    y = q.new_empty(rows, heads, V)
    if rows == 0:
        return y
    group, BD, BV = heads // key_heads, block_of(D), block_of(V)
    members = 1 << (group - 1).bit_length()
    keys, warps = walk or walk_for(rows * key_heads, max(BD, BV) * members, window)
    launch(
        _step,
        (key_heads, 1, rows),
        (q, k, v, y, ring_k, ring_v, tokens, slots.contiguous()),
        (
            scale,
            tokens.shape[0] - 1,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            *ring_k.stride()[:3],
            *ring_v.stride()[:3],
        ),
        (window, D, V, BD, BV, heads, group, members, keys),
        warps=warps,
    )
    return y


def _launch(kernel: Any, grid: Any, tensors: Any, numbers: Any, call: tuple[Any, ...], tile: Tile) -> None:
    """The constexprs that all passes share: window, dims and their sides, heads, group, packed, State, tile."""
    window, q, k, v, cu_seqlens, state = call
    D, V = q.shape[3], v.shape[3]
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    shape = (window, D, V, *sides_of(D, V), heads, group, cu_seqlens is not None, state)
    launch(kernel, grid, tensors, numbers, (*shape, tile.queries, tile.keys, tile.stages), warps=tile.warps)


def _grid(q: Tensor, cu_seqlens: Tensor | None, block: int, heads: int) -> tuple[int, int, int]:
    """As many blocks as any documents of these tokens need: lengths are on the device."""
    B, T = q.shape[:2]
    blocks = -(-T // block) if cu_seqlens is None else T // block + cu_seqlens.numel() - 1
    return blocks * heads, 1, B


def _documents(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1


def _strides(*tensors: Tensor) -> list[int]:
    """Of rows, tokens and heads, tensor after tensor."""
    return [s for x in tensors for s in x.stride()[:3]]


def _state(
    k: Tensor | None, v: Tensor | None, count: Tensor | None, instead: Tensor, initial: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], list[int]]:
    """A State's tensors and strides; where there is none, something to point at."""
    if not initial or k is None or v is None or count is None:
        return (instead, instead, instead), [0] * 6
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    return (k, v, count), _strides(k, v)
