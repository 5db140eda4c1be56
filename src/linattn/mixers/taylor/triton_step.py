"""One token a row in Triton: feature map, read, normaliser and update of a slot's State in one kernel.

A program owns the whole State of one (row, head), so that nothing that one program writes is read by another: the
normaliser and the count of unfolded tokens need neither atomics nor a second kernel. It walks the features by shift:
shift d holds the products x_j x_(j+d mod F), which makes the triangle of pairs F wide and F/2 + 1 deep.
"""

# pyright: reportAttributeAccessIssue=false
# It takes a triton.py beside this file for triton itself.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linattn.core.tiles import block_of, launch
from linattn.core.triton_parts import slot_of


@triton.jit
def _place(lane, first, F: tl.constexpr, BF: tl.constexpr):
    """Lane n of a block holds shift first + n // BF, factor j = n % BF: row of the State, both factors, which kind.

    Kinds: 1 a product, 2 x_j alone (one shift after the last), 3 the constant (a lane that no product needs), 0 none.
    """
    shift = first + lane // BF
    j = lane % BF
    other = tl.where(j + shift >= F, j + shift - F, j + shift)
    # Where F is even, the last shift would meet each of its pairs twice.
    ends = tl.where(shift == F // 2, F // 2, F) if F % 2 == 0 else F
    pair = (shift <= F // 2) & (j < ends)
    alone = (shift == F // 2 + 1) & (j < F)
    constant = (shift == F // 2) & (j == (F // 2 if F % 2 == 0 else F))
    low = tl.minimum(j, other)
    row = 1 + F + low * (2 * F - 1 - low) // 2 + tl.maximum(j, other)
    row = tl.where(pair, row, tl.where(alone, 1 + j, 0))
    kind = tl.where(pair, 1, tl.where(alone, 2, tl.where(constant, 3, 0)))
    return row, j, other, kind


@triton.jit
def _features(x, scale, j, other, kind):
    """The features of scale x that `_place` placed; 0 in lanes that hold none."""
    left = tl.load(x + j, mask=(kind == 1) | (kind == 2), other=1.0).to(tl.float32)
    right = tl.load(x + other, mask=kind == 1, other=1.0).to(tl.float32)
    square = tl.where((kind == 1) & (j == other), 0.7071067811865476, 1.0)
    left = tl.where(kind == 3, 1.0, left * scale)
    right = tl.where(kind == 1, right * scale, 1.0)
    return tl.where(kind == 0, 0.0, left * right * square)


@triton.jit
def _read_by_each(y, q, q_h, scale, h, reader, state, j, other, kind, Q_GROUP: tl.constexpr, READERS: tl.constexpr):
    """y [readers, BV] and what each of the heads that share a State reads of a block of its rows."""
    for r in tl.static_range(READERS):
        query = _features(q + ((h * READERS + r) // Q_GROUP) * q_h, scale, j, other, kind)
        y += tl.where((reader == r)[:, None], tl.sum(query[:, None] * state, 0)[None, :], 0.0)
    return y


@triton.jit
def _write(out, y, row, heads, h, reader, c, alive, V: tl.constexpr, READERS: tl.constexpr):
    """y of the heads that read State h of a row; an idle row's is 0."""
    outs = out + ((row * heads + h) * READERS + reader)[:, None] * V + c[None, :]
    written = (reader < READERS)[:, None] & (c < V)[None, :]
    tl.store(outs, tl.where(alive, y, 0.0).to(out.dtype.element_ty), mask=written)


@triton.jit
def _step(
    q,
    k,
    v,
    out,
    S,
    z,
    slots,
    scale,
    q_n,
    q_h,
    k_n,
    k_h,
    v_n,
    v_h,
    S_n,
    S_h,
    z_n,
    z_h,
    heads,
    n_slots,
    F: tl.constexpr,
    V: tl.constexpr,
    BF: tl.constexpr,
    BV: tl.constexpr,
    S_P: tl.constexpr,
    SHIFTS: tl.constexpr,
    DEPTH: tl.constexpr,
    Q_GROUP: tl.constexpr,
    K_GROUP: tl.constexpr,
    V_GROUP: tl.constexpr,
    READERS: tl.constexpr,
    READERS_BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr,
    STAGES: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Grid (state heads, rows). READERS output heads read one State; out [rows, heads * READERS, V]."""
    h = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    alive, slot = slot_of(slots, row, n_slots)
    S += slot * S_n + h.to(tl.int64) * S_h
    z += slot * z_n + h * z_h
    k += row * k_n + (h // K_GROUP) * k_h
    q += row * q_n
    c = tl.arange(0, BV)
    value = tl.load(v + row * v_n + (h // V_GROUP) * v_h + c, mask=c < V, other=0.0).to(tl.float32)
    reader = tl.arange(0, READERS_BLOCK)

    # Loaded first and used last, so that nobody waits for it.
    place_z, j_z, other_z, kind_z = _place(tl.arange(0, DEPTH * BF), 0, F, BF)
    inside_z = (kind_z > 0) & alive
    total = tl.load(z + place_z, mask=inside_z, other=0.0)

    lane = tl.arange(0, SHIFTS * BF)
    # A row of sums for each warp that has rows of its own: a tile of them takes the registers of further loads.
    PARTS: tl.constexpr = WARPS if WARPS < SHIFTS * BF else SHIFTS * BF
    parts = tl.zeros((PARTS, BV), tl.float32)
    y = tl.zeros((READERS_BLOCK, BV), tl.float32)
    for first in tl.range(0, F // 2 + 2, SHIFTS, num_stages=STAGES):
        place, j, other, kind = _place(lane, first, F, BF)
        at = S + place[:, None] * S_P + c[None, :]
        inside = (kind > 0)[:, None] & (c < V)[None, :] & alive
        state = tl.load(at, mask=inside, other=0.0)
        state += _features(k, 1.0, j, other, kind)[:, None] * value[None, :]
        tl.store(at, state, mask=inside)
        if READERS == 1:
            query = _features(q + (h // Q_GROUP) * q_h, scale, j, other, kind)
            parts += tl.sum(tl.reshape(query[:, None] * state, (SHIFTS * BF // PARTS, PARTS, BV)), 0)
        else:
            y = _read_by_each(y, q, q_h, scale, h, reader, state, j, other, kind, Q_GROUP, READERS)
    if READERS == 1:
        y += tl.sum(parts, 0)[None, :]
    total += _features(k, 1.0, j_z, other_z, kind_z)
    divisor = tl.zeros((READERS_BLOCK,), tl.float32)
    if NORMALIZE:
        for r in tl.static_range(READERS):
            query_z = _features(q + ((h * READERS + r) // Q_GROUP) * q_h, scale, j_z, other_z, kind_z)
            divisor += tl.where(reader == r, tl.sum(query_z * total, 0), 0.0)
        y = y / tl.where(alive & (reader < READERS), divisor, 1.0)[:, None]
    # More threads than features: warps hold the same ones, and all must have read before one writes.
    tl.debug_barrier()
    tl.store(z + place_z, total, mask=inside_z)
    _write(out, y, row, heads, h, reader, c, alive, V, READERS)


FEW_PROGRAMS = 256
"""Up to here an H200's 132 multiprocessors have next to nothing else to do while a program waits for memory."""


def blocks_of(F: int, V: int) -> tuple[int, int, int]:
    """Powers of two that hold F, V, and the F // 2 + 2 shifts."""
    power = [1 << (n - 1).bit_length() for n in (F, F // 2 + 2)]
    return power[0], block_of(V), power[1]


def walk_for(programs: int, F: int, V: int, deferred: bool) -> tuple[int, int, int]:
    """Shifts a program holds at once, its warps, and the stages of its loads.

    All of the state where programs are few, else 8 KB with the next 8 under way, or 16 KB where the fold is deferred.
    Measured at F 16, V 112 on an H200, us of 1, 128 and 1,024 rows of 16 heads: 6.1, 88 and 654 by 16 shifts and 16
    warps in one stage, then 1 and 2 in two; those in one stage took 95 and 727. Deferred, 2 shifts and 4 warps in one:
    80 and 465. A tile has at least as many entries as threads: no two then hold the same entry, which one of them
    writes.
    """
    BF, BV, depth = blocks_of(F, V)
    few = programs <= FEW_PROGRAMS
    if few:
        entries = 32768 if BF * BV <= 2048 else 16384  # wider tiles of 32,768 spill
    else:
        entries = 4096 if deferred else 2048
    shifts = min(depth, max(1, entries // (BF * BV)))
    return shifts, min(16, max(1, shifts * BF * BV // 1024)), 1 if few or deferred else 2


def step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S: Tensor,
    z: Tensor,
    slots: Tensor,
    scale: float,
    normalize: bool,
    walk: tuple[int, int, int] | None = None,
) -> Tensor:
    """One token a row: y [B, Ho, V]; S [slots, H, P, V] and z [slots, H, P] in place. walk: see `walk_for`."""
    y, grid, constants, warps = prepared(q, k, v, S, normalize, walk, False)
    numbers = (scale, *strides_of(q, k, v, S, z), S.shape[1], S.shape[0])
    if y.numel():
        launch(_step, grid, (q, k, v, y, S, z, slots.contiguous()), numbers, (*constants, warps), warps=warps)
    return y


def strides_of(*tensors: Tensor) -> list[int]:
    """The first two of each."""
    return [stride for x in tensors for stride in x.stride()[:2]]


def prepared(
    q: Tensor, k: Tensor, v: Tensor, S: Tensor, normalize: bool, walk: tuple[int, int, int] | None, deferred: bool
) -> tuple[Tensor, tuple[int, int, int], tuple[int, ...], int]:
    """The output, the grid, the constants that both kernels share, and the warps."""
    n_state, F, V = S.shape[1], k.shape[2], v.shape[2]
    heads = max(q.shape[1], n_state)
    BF, BV, depth = blocks_of(F, V)
    shifts, warps, stages = walk or walk_for(q.shape[0] * n_state, F, V, deferred)
    groups = (heads // q.shape[1], n_state // k.shape[1], n_state // v.shape[1], heads // n_state)
    readers_block = 1 << (groups[3] - 1).bit_length()
    constants = (F, V, BF, BV, S.stride(2), shifts, depth, *groups, readers_block, normalize, stages)
    y = torch.empty(q.shape[0], heads, V, device=q.device, dtype=v.dtype)
    return y, (n_state, q.shape[0], 1), constants, warps
