"""One token a row in Triton: its key and value into the slot's ring, one softmax over what the ring holds."""

# pyright: reportAttributeAccessIssue=false
# It takes the triton.py beside this file for triton itself.
from __future__ import annotations

import triton
import triton.language as tl

ARRIVALS = tl.constexpr(1 << 40)
"""A slot's count holds its tokens below this bit and, while a step runs, the programs that have read it above."""


@triton.jit
def _step(
    q,
    k,
    v,
    y,
    ring_k,
    ring_v,
    tokens,
    slots,
    scale,
    n_slots,
    q_n,
    q_h,
    k_n,
    k_h,
    v_n,
    v_h,
    ring_k_n,
    ring_k_t,
    ring_k_h,
    ring_v_n,
    ring_v_t,
    ring_v_h,
    W: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Grid (key heads, 1, rows). GROUP query heads read one ring; y [rows, HEADS, V].

    Every program of a row needs the count of tokens before the step, and one must raise it. Each takes it with an
    integer add that also says it was here; the last to arrive, when all have what they need, leaves count + 1.
    """
    KEY_HEADS: tl.constexpr = HEADS // GROUP
    h = tl.program_id(0)
    row = tl.program_id(2).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    member = tl.arange(0, BLOCK_GROUP)
    d = tl.arange(0, BD)
    e = tl.arange(0, BV)
    heads = h * GROUP + member
    at_y = y + (row * HEADS + heads[:, None]) * V + e[None, :]
    wanted = (member < GROUP)[:, None]
    if (slot < 0) | (slot >= n_slots):
        tl.store(at_y, tl.zeros([BLOCK_GROUP, BV], y.dtype.element_ty), mask=wanted & (e < V)[None, :])
        return
    found = tl.atomic_add(tokens + slot, ARRIVALS, sem="relaxed")
    read = found % ARRIVALS
    if found // ARRIVALS == KEY_HEADS - 1:
        tl.atomic_add(tokens + slot, 1 - KEY_HEADS * ARRIVALS, sem="relaxed")
    place = (read % W).to(tl.int32)
    filled = tl.minimum(read, W).to(tl.int32)
    ring_k += slot * ring_k_n + h * ring_k_h
    ring_v += slot * ring_v_n + h * ring_v_h
    key = tl.load(k + row * k_n + h * k_h + d, mask=d < D, other=0.0)
    value = tl.load(v + row * v_n + h * v_h + e, mask=e < V, other=0.0)
    tl.store(ring_k + place * ring_k_t + d, key, mask=d < D)
    tl.store(ring_v + place * ring_v_t + e, value, mask=e < V)
    query = tl.load(q + row * q_n + heads[:, None] * q_h + d[None, :], mask=wanted & (d < D)[None, :], other=0.0)
    query = query.to(tl.float32) * (scale * 1.4426950408889634)
    # The token itself comes from registers, so that no row of the ring is both written and read here.
    highest = tl.sum(query * key.to(tl.float32)[None, :], 1)
    total = tl.full([BLOCK_GROUP], 1.0, tl.float32)
    out = tl.zeros([BLOCK_GROUP, BV], tl.float32) + value.to(tl.float32)[None, :]
    for start in range(0, W - 1, KEYS):
        r = start + tl.arange(0, KEYS)
        r += (r >= place).to(tl.int32)
        real = r < filled
        keys = tl.load(ring_k + r[:, None] * ring_k_t + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
        values = tl.load(ring_v + r[:, None] * ring_v_t + e[None, :], mask=real[:, None] & (e < V)[None, :], other=0.0)
        s = tl.sum(query[:, None, :] * keys.to(tl.float32)[None, :, :], 2)
        s = tl.where(real[None, :], s, -float("inf"))
        higher = tl.maximum(highest, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        less = tl.exp2(highest - higher)
        out = out * less[:, None] + tl.sum(p[:, :, None] * values.to(tl.float32)[None, :, :], 1)
        total = total * less + tl.sum(p, 1)
        highest = higher
    tl.store(at_y, (out / total[:, None]).to(y.dtype.element_ty), mask=wanted & (e < V)[None, :])
