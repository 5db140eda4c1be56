"""The gradient of log_decay in Triton: the state and its derivative swept together, every term a true distance.

With E_t = dS_t / dlog_decay, E_t = decay (E_{t-1} + S_{t-1}), the gradient is the sum of scale q_t E_t . do_t and
E_T . dS_T. In chunks every weight is a whole distance times a decay of it, so nothing cancels that does not cancel
exactly; the telescoped sum of t (q_t dq_t - k_t dk_t) is wrong by 500% at T = 2,048 in bf16.
"""

# pyright: reportAttributeAccessIssue=false
# It takes the triton.py beside this file for triton itself.
from __future__ import annotations

import triton
import triton.language as tl

from linattn.core.triton_parts import document_tokens, operand
from linattn.mixers.lightning.triton_sweep import _expm1


@triton.jit
def _decay_gradient(
    q,
    k,
    v,
    do,
    log_decay,
    initial,
    final_gradient,
    out,
    cu_seqlens,
    scale,
    tokens,
    q_n,
    q_t,
    q_h,
    k_n,
    k_t,
    k_h,
    v_n,
    v_t,
    v_h,
    do_n,
    do_t,
    do_h,
    in_n,
    in_h,
    in_k,
    in_v,
    final_n,
    final_h,
    final_k,
    final_v,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    Q_GROUP: tl.constexpr,
    K_GROUP: tl.constexpr,
    V_GROUP: tl.constexpr,
    STATE_GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
):
    """Grid (value blocks, output heads, documents); out [documents, output heads, value blocks], each a partial sum."""
    block = tl.program_id(0)
    h = tl.program_id(1)
    document = tl.program_id(2).to(tl.int64)
    v0 = block * BV
    row, begin, length = document_tokens(cu_seqlens, document, tokens, PACKED)
    rows = tl.maximum(length, 1)
    q_rows = tl.make_tensor_descriptor(
        q + row * q_n + begin * q_t + (h // Q_GROUP).to(tl.int64) * q_h, [rows, K], [q_t, 1], [C, BK]
    )
    k_rows = tl.make_tensor_descriptor(
        k + row * k_n + begin * k_t + (h // K_GROUP).to(tl.int64) * k_h, [rows, K], [k_t, 1], [C, BK]
    )
    v_rows = tl.make_tensor_descriptor(
        v + row * v_n + begin * v_t + (h // V_GROUP).to(tl.int64) * v_h, [rows, V], [v_t, 1], [C, BV]
    )
    do_rows = tl.make_tensor_descriptor(
        do + row * do_n + begin * do_t + h.to(tl.int64) * do_h, [rows, V], [do_t, 1], [C, BV]
    )
    decay = tl.load(log_decay + h // STATE_GROUP).to(tl.float32)
    log2_decay = decay * 1.4426950408889634
    i = tl.arange(0, C)
    k_index = tl.arange(0, BK)
    v_index = v0 + tl.arange(0, BV)
    inside = (v_index[:, None] < V) & (k_index[None, :] < K)
    dtype = q.dtype.element_ty
    state = tl.zeros([BV, BK], tl.float32)
    if INITIAL:
        at = document * in_n + (h // STATE_GROUP).to(tl.int64) * in_h
        state = tl.load(initial + at + v_index[:, None] * in_v + k_index[None, :] * in_k, mask=inside, other=0.0)
    slope = tl.zeros([BV, BK], tl.float32)
    distance = i[None, :] - i[:, None]
    within = tl.exp2(tl.where(distance >= 0, log2_decay * distance, -float("inf"))) * distance
    total = tl.zeros([C], tl.float32)
    for step in range(tl.cdiv(length, C)):
        t = step * C
        m = tl.minimum(C, length - t)
        qs = q_rows.load([t, 0])
        ks = k_rows.load([t, 0])
        vs = v_rows.load([t, v0])
        dos = do_rows.load([t, v0])
        # [C of k, C of q]
        total += tl.sum(tl.dot(ks, tl.trans(qs)) * tl.dot(vs, tl.trans(dos)) * within, 0)
        since = tl.exp2(log2_decay * (i + 1))
        rounded, unit = operand(slope, dtype)
        steepness = tl.dot(rounded, tl.trans(qs)) * (since * unit)[None, :]
        rounded, unit = operand(state, dtype)
        steepness += tl.dot(rounded, tl.trans(qs)) * (since * (i + 1) * unit)[None, :]
        total += tl.sum(steepness * tl.trans(dos).to(tl.float32), 0)
        to_end = tl.maximum(m - 1 - i, 0)
        weight = tl.exp2(log2_decay * to_end)
        over = _expm1(decay * m)
        keys = ks.to(tl.float32)
        values = tl.trans(vs)
        steeper = slope + state * m
        slope = tl.dot(values, (keys * (weight * to_end)[:, None]).to(dtype), steeper + steeper * over)
        state = tl.dot(values, (keys * weight[:, None]).to(dtype), state + state * over)
    result = tl.sum(total, 0) * scale
    if FINAL and h % STATE_GROUP == 0:
        at = document * final_n + (h // STATE_GROUP).to(tl.int64) * final_h
        gradient = tl.load(
            final_gradient + at + v_index[:, None] * final_v + k_index[None, :] * final_k, mask=inside, other=0.0
        )
        result += tl.sum(tl.sum(gradient * slope, 1), 0)
    tl.store(out + (document * tl.num_programs(1) + h) * tl.num_programs(0) + block, result)
