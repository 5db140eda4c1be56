"""One token a row in Triton: the state of a slot is read, decayed, added to, read out and written back, once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _step(
    q,
    k,
    v,
    out,
    log_decay,
    pool,
    carried,
    slots,
    scale,
    q_n,
    q_h,
    k_n,
    k_h,
    v_n,
    v_h,
    pool_n,
    pool_h,
    pool_k,
    carried_n,
    carried_h,
    heads,
    n_slots,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    Q_GROUP: tl.constexpr,
    K_GROUP: tl.constexpr,
    V_GROUP: tl.constexpr,
    READERS: tl.constexpr,
):
    """Grid (value blocks, state heads, rows). READERS output heads read one state; out [rows, heads * READERS, V]."""
    block = tl.program_id(0)
    h = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    i = tl.arange(0, BK)
    j = block * BV + tl.arange(0, BV)
    slot = tl.load(slots + row).to(tl.int64)
    alive = (slot >= 0) & (slot < n_slots)
    slot = tl.where(alive, slot, 0)
    inside = (i[:, None] < K) & (j[None, :] < V) & alive
    decay = tl.exp2(tl.load(log_decay + h).to(tl.float32) * 1.4426950408889634)
    place = pool + slot * pool_n + h.to(tl.int64) * pool_h + i[:, None] * pool_k + j[None, :]
    state = tl.load(place, mask=inside, other=0.0)
    key = tl.load(k + row * k_n + (h // K_GROUP) * k_h + i, mask=i < K, other=0.0).to(tl.float32)
    value = tl.load(v + row * v_n + (h // V_GROUP) * v_h + j, mask=j < V, other=0.0).to(tl.float32)
    state = state * decay + key[:, None] * value[None, :]
    tl.store(place, state, mask=inside)
    for reader in tl.static_range(READERS):
        head = h * READERS + reader
        query = tl.load(q + row * q_n + (head // Q_GROUP) * q_h + i, mask=i < K, other=0.0).to(tl.float32) * scale
        y = tl.where(alive, tl.sum(query[:, None] * state, 0), 0.0)
        tl.store(out + (row * heads * READERS + head) * V + j, y.to(out.dtype.element_ty), mask=j < V)
    if block == 0 and alive:
        total = carried + slot * carried_n + h * carried_h
        tl.store(total, tl.load(total) + tl.load(log_decay + h).to(tl.float32))
