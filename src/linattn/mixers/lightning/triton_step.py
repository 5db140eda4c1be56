"""One token a row in Triton: the state of a slot is read, decayed, added to, read out and written back, once."""

# pyright: reportAttributeAccessIssue=false
# It takes the triton.py beside this file for triton itself.
from __future__ import annotations

import triton
import triton.language as tl

from linattn.core.triton_parts import slot_of
from linattn.mixers.lightning.triton_sweep import _expm1


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
    READERS_BLOCK: tl.constexpr,
):
    """Grid (value blocks, state heads, rows). READERS output heads read one state; out [rows, heads * READERS, V]."""
    block = tl.program_id(0)
    h = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    j = block * BV + tl.arange(0, BV)
    alive, slot = slot_of(slots, row, n_slots)
    decay = tl.load(log_decay + h).to(tl.float32)
    less = _expm1(decay)
    place = pool + slot * pool_n + h.to(tl.int64) * pool_h
    value = tl.load(v + row * v_n + (h // V_GROUP) * v_h + j, mask=j < V, other=0.0).to(tl.float32)
    reader = tl.arange(0, READERS_BLOCK)
    reads = (reader < READERS)[:, None]
    i = tl.arange(0, BK)
    inside = (i[:, None] < K) & (j[None, :] < V) & alive
    at = place + i[:, None] * pool_k + j[None, :]
    state = tl.load(at, mask=inside, other=0.0)
    key = tl.load(k + row * k_n + (h // K_GROUP) * k_h + i, mask=i < K, other=0.0).to(tl.float32)
    state += less * state + key[:, None] * value[None, :]
    tl.store(at, state, mask=inside)
    queries = q + row * q_n + ((h * READERS + reader) // Q_GROUP)[:, None] * q_h + i[None, :]
    query = tl.load(queries, mask=reads & (i[None, :] < K), other=0.0).to(tl.float32)
    y = tl.sum(query[:, :, None] * state[None, :, :], 1)
    y = tl.where(alive, y * scale, 0.0)
    outs = out + ((row * heads + h) * READERS + reader)[:, None] * V + j[None, :]
    tl.store(outs, y.to(out.dtype.element_ty), mask=reads & (j[None, :] < V))
    if block == 0 and alive:
        total = carried + slot * carried_n + h * carried_h
        tl.store(total, tl.load(total) + decay)
