"""One token a row over a `DeferredPool` in Triton: what `triton_step` does, with S left as it is for C tokens."""

# pyright: reportAttributeAccessIssue=false
# It takes a triton.py beside this file for triton itself.
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from linattn.core.tiles import launch
from linattn.core.triton_parts import slot_of
from linattn.mixers.taylor.triton_step import _features, _place, _read_by_each, _write, prepared, strides_of


@triton.jit
def _step_deferred(
    q,
    k,
    v,
    out,
    S,
    z,
    recent_k,
    recent_v,
    count,
    copy,
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
    recent_k_n,
    recent_k_h,
    recent_v_n,
    recent_v_h,
    count_n,
    copy_n,
    copy_h,
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
    C: tl.constexpr,
    C_BLOCK: tl.constexpr,
    COPY: tl.constexpr,
):
    """As `_step`, but S is only read until a slot has C tokens beside it, which then join it in one pass."""
    h = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    alive, slot = slot_of(slots, row, n_slots)
    S += slot * S_n + h.to(tl.int64) * S_h
    copy += slot * copy_n + h.to(tl.int64) * copy_h
    z += slot * z_n + h * z_h
    recent_k += slot * recent_k_n + h * recent_k_h
    recent_v += slot * recent_v_n + h * recent_v_h
    count += slot * count_n + h
    k += row * k_n + (h // K_GROUP) * k_h
    v += row * v_n + (h // V_GROUP) * v_h
    q += row * q_n
    recent = tl.load(count, mask=alive, other=0)
    fold = alive & (recent >= C - 1)
    c = tl.arange(0, BV)
    f = tl.arange(0, BF)
    reader = tl.arange(0, READERS_BLOCK)
    key = tl.load(k + f, mask=f < F, other=0.0)
    value = tl.load(v + c, mask=c < V, other=0.0)

    # This token and those not yet folded are read by their scores: 1 + s + s^2/2.
    token = tl.arange(0, C_BLOCK)
    known = token < recent
    keys = tl.load(recent_k + token[:, None] * F + f[None, :], mask=known[:, None] & (f < F)[None, :], other=0.0)
    values = tl.load(recent_v + token[:, None] * V + c[None, :], mask=known[:, None] & (c < V)[None, :], other=0.0)
    keys = tl.where((token == recent)[:, None], key[None, :], keys).to(tl.float32)
    values = tl.where((token == recent)[:, None], value[None, :], values).to(tl.float32)
    place_z, j_z, other_z, kind_z = _place(tl.arange(0, DEPTH * BF), 0, F, BF)
    inside_z = (kind_z > 0) & alive
    total = tl.load(z + place_z, mask=inside_z, other=0.0)
    divisor = tl.zeros((READERS_BLOCK,), tl.float32)
    y = tl.zeros((READERS_BLOCK, BV), tl.float32)
    for r in tl.static_range(READERS):
        at_query = q + ((h * READERS + r) // Q_GROUP) * q_h
        query_f = tl.load(at_query + f, mask=f < F, other=0.0).to(tl.float32) * scale
        s = tl.sum(keys * query_f[None, :], 1)
        w = tl.where(token <= recent, 1 + s + 0.5 * s * s, 0.0)
        y += tl.where((reader == r)[:, None], tl.sum(w[:, None] * values, 0)[None, :], 0.0)
        weight = tl.sum(w, 0) + tl.sum(_features(at_query, scale, j_z, other_z, kind_z) * total, 0)
        divisor += tl.where(reader == r, weight, 0.0)

    # Warps may hold the same count and sums: all must have read before one writes.
    tl.debug_barrier()
    if fold:
        for t in range(recent):
            total += _features(recent_k + t * F, 1.0, j_z, other_z, kind_z)
        tl.store(z + place_z, total + _features(k, 1.0, j_z, other_z, kind_z), mask=inside_z)
        tl.store(count, 0)
    else:
        tl.store(recent_k + recent * F + f, key, mask=(f < F) & alive)
        tl.store(recent_v + recent * V + c, value, mask=(c < V) & alive)
        tl.store(count, recent + 1, mask=alive)

    lane = tl.arange(0, SHIFTS * BF)
    parts = tl.zeros((SHIFTS * BF, BV), tl.float32)
    for first in tl.range(0, F // 2 + 2, SHIFTS, num_stages=STAGES):
        place, j, other, kind = _place(lane, first, F, BF)
        at = copy + place[:, None] * S_P + c[None, :]
        inside = (kind > 0)[:, None] & (c < V)[None, :] & alive
        state = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if READERS == 1:
            parts += _features(q + (h // Q_GROUP) * q_h, scale, j, other, kind)[:, None] * state
        else:
            y = _read_by_each(y, q, q_h, scale, h, reader, state, j, other, kind, Q_GROUP, READERS)
    if READERS == 1:
        y += tl.sum(parts, 0)[None, :]
    if NORMALIZE:
        y = y / tl.where(alive & (reader < READERS), divisor, 1.0)[:, None]
    _write(out, y, row, heads, h, reader, c, alive, V, READERS)
    # A loop of its own: in the one above its registers would halve how many programs wait for memory at once.
    if fold:
        # Nor need a thread hold there what it holds here.
        tl.debug_barrier()
        for begin in range(0, F // 2 + 2, SHIFTS):
            to, left, right, what = _place(lane, begin, F, BF)
            cells = to[:, None] * S_P + c[None, :]
            within = (what > 0)[:, None] & (c < V)[None, :]
            sums = tl.load(S + cells, mask=within, other=0.0)
            for t in range(recent):
                past = tl.load(recent_v + t * V + c, mask=c < V, other=0.0).to(tl.float32)
                sums += _features(recent_k + t * F, 1.0, left, right, what)[:, None] * past[None, :]
            present = tl.load(v + c, mask=c < V, other=0.0).to(tl.float32)
            sums += _features(k, 1.0, left, right, what)[:, None] * present[None, :]
            tl.store(S + cells, sums, mask=within)
            if COPY:
                tl.store(copy + cells, sums.to(copy.dtype.element_ty), mask=within)


def step_deferred_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S: Tensor,
    z: Tensor,
    recent_k: Tensor,
    recent_v: Tensor,
    count: Tensor,
    copy: Tensor | None,
    slots: Tensor,
    scale: float,
    normalize: bool,
    walk: tuple[int, int, int] | None = None,
) -> Tensor:
    """One token a row over a `DeferredPool`: y [B, Ho, V]; the pool in place."""
    y, grid, constants, warps = prepared(q, k, v, S, normalize, walk, True)
    C = recent_k.shape[2]
    given = S if copy is None else copy
    numbers = [scale, *strides_of(q, k, v, S, z, recent_k, recent_v), count.stride(0), *given.stride()[:2]]
    tensors = (q, k, v, y, S, z, recent_k, recent_v, count, given, slots.contiguous())
    constants = (*constants, C, 1 << (C - 1).bit_length(), copy is not None)
    if y.numel():
        launch(_step_deferred, grid, tensors, (*numbers, S.shape[1], S.shape[0]), constants, warps=warps)
    return y
