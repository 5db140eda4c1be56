"""Bytes and FLOPs of one call of each op: what its floor is made of.

Bytes: forward reads q, k, v and writes o; forward and backward reads q, k, v and do again and writes dq, dk, dv:
3 (q + k + v) + 2 o in all. A State at the ends is not counted, being constant; a step's is, being all there is.
FLOPs: matrix products only, two a multiply-add, chunks of 64 rows and masked halves counted in full, as kernels run
them. A backward pass has five products inside a chunk where forward has two, and 2.5 times forward's with the State.

    lightning, D = V = 128, bf16: 1,024 bytes a token and head forward, 2,816 with backward; 98 kFLOP forward
    taylor, F = 16, V = 64, bf16:   320 bytes, 832 with backward; 50 kFLOP forward with the normaliser's column
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from linattn.bench.cases import BenchCase, Pass
from linattn.bench.floor import Costs
from linattn.mixers.lightning.cases import LightningCase
from linattn.mixers.prefix.cases import PrefixCase
from linattn.mixers.shortconv.cases import ShortConvCase
from linattn.mixers.softmax.cases import SoftmaxCase
from linattn.mixers.taylor import n_features
from linattn.mixers.taylor.cases import TaylorCase
from linattn.mixers.window.cases import WindowCase

CHUNK = 64
"""Rows a chunk, of the FLOPs counted: what public kernels use, and near the least arithmetic at D = 128."""


def costs(case: BenchCase, pass_: Pass, dtype: torch.dtype) -> Costs:
    """Bytes and FLOPs of one call of ``case``, inputs of ``dtype``, States in fp32 (float64 for float64)."""
    size = dtype.itemsize
    if isinstance(case, TaylorCase):
        return _taylor(case, pass_, size)
    if isinstance(case, PrefixCase):
        return _prefix(case, pass_, size)
    if isinstance(case, LightningCase):
        return _lightning(case, pass_, size)
    if isinstance(case, ShortConvCase):
        return _shortconv(case, pass_, size)
    return _attention(case, pass_, size)


def attention_flops(inputs: Mapping[str, Any]) -> float:
    """FLOPs forward of causal softmax attention with the heads of ``inputs``' q and v, q and k as wide as v."""
    B, T, H, V = inputs["v"].shape
    return 2 * B * max(H, inputs["q"].shape[2]) * T * T * V


def state_numbers(case: TaylorCase | LightningCase) -> int:
    """Numbers in one row's State."""
    if isinstance(case, LightningCase):
        return (case.state_heads or case.heads) * case.key_dim * case.value_dim
    state_heads = max(case.k_heads or case.heads, case.v_heads or case.heads)
    return state_heads * n_features(case.feature_dim) * (case.value_dim + 1)


def _tokens(q: int, k: int, v: int, o: int, pass_: Pass) -> int:
    """Numbers moved a token, of q, k, v and o numbers a token."""
    return 3 * (q + k + v) + 2 * o if pass_ == "fwdbwd" else q + k + v + o


def _sum_size(size: int) -> int:
    return 8 if size == 8 else 4


def _linear(rows: int, heads: int, key: int, value: int, feature: int, pass_: Pass) -> float:
    """FLOPs of a chunked linear attention: scores over ``key``, States of ``feature`` by ``value``."""
    inside = 2 * CHUNK * (key + value)
    state = 4 * feature * value
    if pass_ == "fwdbwd":
        # Backward: scores again, ds from do and v, dq and dk from ds, dv from the scores; S, dS, and three reads.
        inside += 2 * CHUNK * (3 * key + 2 * value)
        state += 10 * feature * value
    return rows * heads * (state if pass_ == "step" else inside + state)


def _taylor(case: TaylorCase, pass_: Pass, size: int) -> Costs:
    hq, hk, hv = case.q_heads or case.heads, case.k_heads or case.heads, case.v_heads or case.heads
    state_heads, F, V = max(hk, hv), case.feature_dim, case.value_dim
    P, columns = n_features(F), V + case.normalize
    rows = case.batch * (1 if pass_ == "step" else case.length)
    moved = rows * size * _tokens(hq * F, hk * F, hv * V, max(hq, state_heads) * V, pass_)
    if pass_ == "step":
        moved += 2 * rows * state_numbers(case) * _sum_size(size)
    return Costs(moved, _linear(rows, max(hq, state_heads), F, columns, P, pass_))


def _prefix(case: PrefixCase, pass_: Pass, size: int) -> Costs:
    """Taylor's and the prefix's sums: k' and v' read once; with backward again, and their gradients written."""
    own = _taylor(case.tokens, pass_, size)
    if pass_ == "step":
        return own
    t, back = case.tokens, pass_ == "fwdbwd"
    hk, hv = t.k_heads or t.heads, t.v_heads or t.heads
    rows = t.batch * case.prefix
    moved = rows * size * (hk * t.feature_dim + hv * t.value_dim) * (3 if back else 1)
    products = 2 * n_features(t.feature_dim) * (t.value_dim + t.normalize) * (3 if back else 1)
    return Costs(own.bytes + moved, own.flops + rows * max(hk, hv) * products)


def _lightning(case: LightningCase, pass_: Pass, size: int) -> Costs:
    hq, hk, hv = case.q_heads or case.heads, case.k_heads or case.heads, case.v_heads or case.heads
    state_heads, D, V = case.state_heads or case.heads, case.key_dim, case.value_dim
    out_heads = max(hq, state_heads)
    rows = case.batch * (1 if pass_ == "step" else case.length)
    moved = rows * size * _tokens(hq * D, hk * D, hv * V, out_heads * V, pass_)
    if pass_ == "step":
        moved += 2 * rows * state_numbers(case) * _sum_size(size)
    return Costs(moved, _linear(rows, out_heads, D, V, D, pass_))


def _attention(case: WindowCase | SoftmaxCase, pass_: Pass, size: int) -> Costs:
    """Scores over the keys a query sees: W, or half of T on average; a step reads the keys and values it sees once."""
    D = case.head_dim if isinstance(case, WindowCase) else case.key_dim
    V, kv = case.value_dim or D, case.kv_heads or case.heads
    seen = min(case.window, case.length) if isinstance(case, WindowCase) else case.length / 2
    if pass_ == "step":
        seen = case.window if isinstance(case, WindowCase) else case.length
        # The new key and value are written and the rest read, besides q, k, v in and o out.
        numbers = _tokens(case.heads * D, kv * D, kv * V, case.heads * V, pass_) + (seen + 1) * kv * (D + V)
        return Costs(case.batch * size * numbers, case.batch * case.heads * 2 * seen * (D + V))
    rows = case.batch * case.length
    moved = rows * size * _tokens(case.heads * D, kv * D, kv * V, case.heads * V, pass_)
    forward = rows * case.heads * 2 * seen * (D + V)
    return Costs(moved, forward * (3.5 if pass_ == "fwdbwd" else 1))


def _shortconv(case: ShortConvCase, pass_: Pass, size: int) -> Costs:
    """x and gate read, y written; backward reads x, gate and dy and writes dx and dgate. A step shifts w-1 rows too."""
    gates = int(case.gate)
    rows = case.batch * (1 if pass_ == "step" else case.length)
    numbers = {"fwd": 2 + gates, "fwdbwd": 5 + 3 * gates, "step": 2 + gates + 2 * (case.taps - 1)}[pass_]
    flops = 2 * case.taps * (3 if pass_ == "fwdbwd" else 1)
    return Costs(rows * case.channels * size * numbers, rows * case.channels * flops)
