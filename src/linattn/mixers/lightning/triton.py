"""Lightning attention, backend "triton": what the operators of this folder's __init__ run on a GPU.

Plain tensors in and out. The forward is one sweep, its gradients three (triton_sweep.py); how a call is tiled and cut
in segments is `plan`, whose cost model README.md in this folder writes down. Never run as a script.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
import triton
from torch import Tensor

from linattn.core.tiles import block_of, descriptor_memory, multiprocessors
from linattn.mixers.lightning.triton_decay import _decay_gradient
from linattn.mixers.lightning.triton_step import _step
from linattn.mixers.lightning.triton_sweep import _scan_segments, _sweep

SHORTEST_SEGMENT = 512
"""Tokens; below it a segment's state (2 K V 4 bytes written and read) weighs more than its keys and values."""


@dataclass(frozen=True)
class Tile:
    """How one program of the sweep is built: chunk of tokens, value columns, warps, load stages, programs on an SM."""

    chunk: int
    value: int
    warps: int
    stages: int
    resident: int


@functools.cache
def tuned(gpu: str) -> dict[str, Any]:
    """The table shipped for a GPU, by "KxV" in tile sides; empty for one that was never tuned."""
    path = files(__package__).joinpath("tuned", f"{gpu}.json")
    return json.loads(path.read_text())["tiles"] if path.is_file() else {}


@functools.cache
def gpu_key(device: torch.device) -> str:
    """The name a table goes by: h200 for an NVIDIA H200."""
    if device.type != "cuda":
        return "none"
    return torch.cuda.get_device_name(device).lower().replace("nvidia ", "").split()[0]


def tile_for(K: int, V: int, device: torch.device) -> Tile:
    """The tuned tile for these head dims on this GPU, or one that fits any from capability 8.0 on."""
    entry = tuned(gpu_key(device)).get(f"{block_of(K)}x{block_of(V)}")
    if entry is not None:
        return Tile(**entry)
    # A state of 64 x 128 in fp32 fills half of four warps' registers; more would spill.
    value = min(block_of(V), max(16, 8192 // block_of(K)))
    return Tile(chunk=64 if block_of(K) <= 128 else 32, value=value, warps=4, stages=2, resident=2)


@dataclass(frozen=True)
class Segments:
    """How documents are cut: ``count`` segments in all, of ``tokens`` each. One a document when ``per_row`` is 1.

    document, start, first: int32, for packed rows: each segment's document and first token there, and each document's
    first segment.
    """

    count: int
    tokens: int
    per_row: int
    split: bool
    document: Tensor | None = None
    start: Tensor | None = None
    first: Tensor | None = None


def segments_a_row(programs: int, tokens: int, slots: int) -> int:
    """In how many segments to cut each row: the least of (idle slots) x (bytes moved), README.md's cost model."""
    best, least = 1, float("inf")
    for n in range(1, max(1, tokens // SHORTEST_SEGMENT) + 1):
        waves = -(-programs * n // slots)
        cost = waves * slots / (programs * n) * (1 + 0.5 * (n - 1) / n)
        if cost < least - 1e-9:
            best, least = n, cost
        if n > 8 * slots:
            break
    return best


def cut_segments(
    rows: int, tokens: int, programs: int, tile: Tile, cu_seqlens: Tensor | None, device: torch.device
) -> Segments:
    """Segments for ``rows`` rows of ``tokens`` tokens with ``programs`` programs each, without a look at the device."""
    slots = multiprocessors(device) * tile.resident if device.type == "cuda" else 8
    unit = max(tile.chunk, 64)
    if cu_seqlens is None:
        n = segments_a_row(rows * programs, tokens, slots)
        size = -(-tokens // (n * unit)) * unit
        n = max(1, -(-tokens // size)) if size else 1
        return Segments(rows * n, max(size, unit), n, n > 1)
    documents = cu_seqlens.numel() - 1
    # Lengths are on the device. One document may hold everything: twice as many segments as slots if so.
    size = max(SHORTEST_SEGMENT, -(-tokens * programs // (2 * slots * unit)) * unit)
    if size >= tokens:
        return Segments(documents, tokens, 1, False)
    return packed_segments(cu_seqlens, tokens, size)


def packed_segments(cu_seqlens: Tensor, tokens: int, size: int) -> Segments:
    """T // size + N segments whatever the documents' lengths; those that no document needs start behind its end."""
    offsets = cu_seqlens.long()
    documents = offsets.numel() - 1
    counts = ((offsets.diff() + size - 1) // size).clamp(min=1)
    ends = counts.cumsum(0)
    first = ends - counts
    index = torch.arange(tokens // size + documents, device=offsets.device)
    document = torch.searchsorted(ends, index, right=True)
    used = document < documents
    document = document.clamp(max=documents - 1)
    start = torch.where(used, (index - first[document]) * size, tokens)
    parts = (x.to(torch.int32) for x in (document, start, first))
    return Segments(tokens // size + documents, size, 0, True, *parts)


def sweep(
    a: Tensor | None,
    b: Tensor,
    c: Tensor,
    out: Tensor | None,
    log_decay: Tensor,
    tile: Tile,
    cut: Segments,
    *,
    heads: int,
    scale: float,
    cu_seqlens: Tensor | None,
    reverse: bool = False,
    state_in: Tensor | None = None,
    state_out: Tensor | None = None,
    summary: bool = False,
) -> None:
    """Launch `_sweep`. States are [segments or documents, H, K, V] views of fp32, K going with b and V with c."""
    K, V = b.shape[-1], c.shape[-1]
    BV = min(tile.value, block_of(V))
    grid = (triton.cdiv(V, BV), heads, cut.count)
    given = [x if x is not None else b for x in (a, b, c, out)]
    s_in = state_in if state_in is not None else log_decay
    s_out = state_out if state_out is not None else log_decay
    token_strides = [s for x in given for s in x.stride()[:3]]
    state_strides = [s for x in (state_in, state_out) for s in (x.stride() if x is not None else (0, 0, 0, 0))]
    with descriptor_memory(b.device):
        _sweep[grid](
            *given,
            log_decay,
            s_in,
            s_out,
            cu_seqlens if cu_seqlens is not None else log_decay,
            cut.document if cut.document is not None else log_decay,
            cut.start if cut.start is not None else log_decay,
            scale,
            b.shape[1],
            cut.tokens,
            cut.per_row,
            *token_strides,
            *state_strides,
            K=K,
            V=V,
            BK=block_of(K),
            BV=BV,
            C=tile.chunk,
            A_GROUP=heads // given[0].shape[2],
            B_GROUP=heads // b.shape[2],
            C_GROUP=heads // c.shape[2],
            STATE_GROUP=heads // log_decay.shape[0],
            REVERSE=reverse,
            PACKED=cu_seqlens is not None,
            SPLIT=cut.split,
            OUTPUT=out is not None,
            INITIAL=state_in is not None,
            FINAL=0 if state_out is None else 2 if summary else 1,
            NUM_STAGES=tile.stages,
            num_warps=tile.warps,
        )


def states_before(
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    tile: Tile,
    cut: Segments,
    *,
    heads: int,
    documents: int,
    scale: float,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool = False,
) -> Tensor | None:
    """The state before each segment, [segments, heads, K, V]: the initial one itself where nothing is cut."""
    if not cut.split:
        return initial
    K, V = b.shape[-1], c.shape[-1]
    states = b.new_empty(cut.count, heads, K, V, dtype=torch.float32)
    sweep(
        None,
        b,
        c,
        None,
        log_decay,
        tile,
        cut,
        heads=heads,
        scale=scale,
        cu_seqlens=cu_seqlens,
        reverse=reverse,
        state_out=states,
        summary=True,
    )
    block = 1024
    given = initial if initial is not None else states
    _scan_segments[(triton.cdiv(K * V, block), heads, documents)](
        states,
        given,
        log_decay,
        cu_seqlens if cu_seqlens is not None else log_decay,
        cut.first if cut.first is not None else log_decay,
        b.shape[1],
        cut.tokens,
        cut.per_row,
        heads,
        K * V,
        *given.stride(),
        V=V,
        STATE_GROUP=heads // log_decay.shape[0],
        INITIAL_GROUP=heads // given.shape[1],
        REVERSE=reverse,
        PACKED=cu_seqlens is not None,
        INITIAL=initial is not None,
        BLOCK=block,
        num_warps=4,
    )
    return states


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
    tile: Tile | None = None,
    segments: int | None = None,
) -> tuple[Tensor, Tensor]:
    """o [B, T, Ho, V] and the final S [N, H, K, V] (of no rows when not asked for)."""
    B, T, n_state = q.shape[0], q.shape[1], log_decay.shape[0]
    K, V, heads = q.shape[-1], v.shape[-1], max(q.shape[2], n_state)
    documents = B if cu_seqlens is None else cu_seqlens.numel() - 1
    o = q.new_empty(B, T, heads, V)
    final = q.new_empty(documents if return_state else 0, n_state, K, V, dtype=torch.float32)
    if T == 0:
        return o, final.copy_(initial) if return_state and initial is not None else final.zero_()
    initial = None if initial is None else initial.float()
    tile = tile or tile_for(K, V, q.device)
    cut = _cut(B, T, heads, V, tile, cu_seqlens, q.device, segments)
    shared = {"scale": scale, "cu_seqlens": cu_seqlens}
    before = states_before(
        k, v, log_decay, tile, cut, heads=n_state, documents=documents, initial=initial, **shared
    )
    sweep(
        q,
        k,
        v,
        o,
        log_decay,
        tile,
        cut,
        heads=heads,
        state_in=before,
        state_out=final if return_state else None,
        **shared,
    )
    return o, final


def backward(
    do: Tensor | None,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    decay_gradient: bool,
    tile: Tile | None = None,
    segments: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dlog_decay (of no entries unless asked for) and the gradient of the initial S (likewise)."""
    B, T, n_state = q.shape[0], q.shape[1], log_decay.shape[0]
    K, V, heads = q.shape[-1], v.shape[-1], max(q.shape[2], n_state)
    documents = B if cu_seqlens is None else cu_seqlens.numel() - 1
    d_initial = q.new_empty(documents if initial is not None else 0, heads, K, V, dtype=torch.float32)
    d_decay = log_decay.new_zeros(n_state if decay_gradient else 0)
    if T == 0:
        d_initial = d_initial[:, :n_state].zero_() if d_final is None or initial is None else d_final.clone()
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), d_decay, d_initial
    do = q.new_zeros(B, T, heads, V) if do is None else _aligned(do)
    initial = None if initial is None else initial.float()
    d_final = None if d_final is None else d_final.float()
    group = heads // n_state
    seed = d_final
    if d_final is not None and group > 1:
        # The heads that share a State share its gradient: the first of them carries it.
        seed = d_final.new_zeros(documents, heads, K, V)
        seed[:, ::group] = d_final
    grads = [_gradient(x, heads) for x in (q, k, v)]
    by_value, by_key = tile or tile_for(V, K, q.device), tile or tile_for(K, V, q.device)
    cut = _cut(B, T, heads, V, by_key, cu_seqlens, q.device, segments)
    shared = {"scale": scale, "cu_seqlens": cu_seqlens}
    S = states_before(
        k, v, log_decay, by_key, cut, heads=n_state, documents=documents, initial=initial, **shared
    )
    S = None if S is None else S.transpose(-1, -2)
    sweep(do, v, k, grads[0], log_decay, by_value, cut, heads=heads, state_in=S, **shared)
    shared["reverse"] = True
    D = states_before(q, do, log_decay, by_key, cut, heads=heads, documents=documents, initial=seed, **shared)
    Dt = None if D is None else D.transpose(-1, -2)
    # A State's gradient is summed over the heads that read it, so here every head has a state of its own.
    spread = log_decay if group == 1 else log_decay.repeat_interleave(group)
    sweep(v, do, q, grads[1], spread, by_value, cut, heads=heads, state_in=Dt, **shared)
    sweep(
        k,
        q,
        do,
        grads[2],
        spread,
        by_key,
        cut,
        heads=heads,
        state_in=D,
        state_out=d_initial if initial is not None else None,
        **shared,
    )
    if decay_gradient:
        d_decay = decay_gradient_of(do, d_final, q, k, v, log_decay, scale, initial, cu_seqlens)
    dq, dk, dv = (_gathered(g, x) for g, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv, d_decay, d_initial if group == 1 else d_initial.unflatten(1, (n_state, group)).sum(2)


def decay_gradient_of(
    do: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """dlog_decay [H], through the outputs and the final S."""
    T, n_state, K, V, heads = q.shape[1], log_decay.shape[0], q.shape[-1], v.shape[-1], do.shape[2]
    documents = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    BK = block_of(K)
    BV = min(block_of(V), max(16, 4096 // BK))
    blocks = triton.cdiv(V, BV)
    out = torch.empty(documents, heads, blocks, device=q.device, dtype=torch.float32)
    tokens = [x for x in (q, k, v, do)]
    states = [s for x in (initial, d_final) for s in (x.stride() if x is not None else (0, 0, 0, 0))]
    with descriptor_memory(q.device):
        _decay_gradient[(blocks, heads, documents)](
            *tokens,
            log_decay,
            initial if initial is not None else log_decay,
            d_final if d_final is not None else log_decay,
            out,
            cu_seqlens if cu_seqlens is not None else log_decay,
            scale,
            T,
            *[s for x in tokens for s in x.stride()[:3]],
            *states,
            K=K,
            V=V,
            BK=BK,
            BV=BV,
            C=32,
            Q_GROUP=heads // q.shape[2],
            K_GROUP=heads // k.shape[2],
            V_GROUP=heads // v.shape[2],
            STATE_GROUP=heads // n_state,
            PACKED=cu_seqlens is not None,
            INITIAL=initial is not None,
            FINAL=d_final is not None,
            num_warps=4,
        )
    return out.unflatten(1, (n_state, -1)).sum((0, 2, 3)).to(log_decay.dtype)


def step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    S: Tensor,
    carried: Tensor,
    slots: Tensor,
    scale: float,
    value: int | None = None,
    warps: int = 4,
) -> Tensor:
    """One token a row; S [slots, H, K, V] and carried [slots, H] in place. o [B, Ho, V]."""
    rows, n_state, K, V = q.shape[0], S.shape[1], S.shape[2], S.shape[3]
    heads = max(q.shape[1], n_state)
    o = q.new_empty(rows, heads, V)
    BK = block_of(K)
    # 16 KB of state a program: enough in flight at any batch, and few enough registers for many programs an SM.
    BV = value or min(block_of(V), max(16, 4096 // BK))
    _step[(triton.cdiv(V, BV), n_state, rows)](
        q,
        k,
        v,
        o,
        log_decay,
        S,
        carried,
        slots,
        scale,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *S.stride()[:3],
        *carried.stride(),
        n_state,
        S.shape[0],
        K=K,
        V=V,
        BK=BK,
        BV=BV,
        Q_GROUP=heads // q.shape[1],
        K_GROUP=n_state // k.shape[1],
        V_GROUP=n_state // v.shape[1],
        READERS=heads // n_state,
        num_warps=warps,
    )
    return o


def _cut(
    rows: int,
    tokens: int,
    heads: int,
    V: int,
    tile: Tile,
    cu_seqlens: Tensor | None,
    device: torch.device,
    segments: int | None,
) -> Segments:
    programs = heads * triton.cdiv(V, min(tile.value, block_of(V)))
    if segments is None:
        return cut_segments(rows, tokens, programs, tile, cu_seqlens, device)
    size = max(64, -(-tokens // (segments * 64)) * 64)
    if cu_seqlens is not None:
        return packed_segments(cu_seqlens, tokens, size) if segments > 1 else Segments(
            cu_seqlens.numel() - 1, tokens, 1, False
        )
    n = -(-tokens // size)
    return Segments(rows * n, size, n, n > 1)


def _aligned(x: Tensor) -> Tensor:
    """``x`` itself, or a copy where its rows cannot be fetched in pieces of 16 bytes (an expanded gradient, say)."""
    outer = x.stride()[:3]
    fits = x.stride(3) == 1 and all(s % 8 == 0 for s in outer) and outer[1] > 0 and x.data_ptr() % 16 == 0
    return x if fits else x.contiguous()


def _gradient(x: Tensor, heads: int) -> Tensor:
    """Where a sweep writes the gradient of x: in fp32 a head where several heads share x's, to be summed then."""
    if x.shape[2] == heads:
        return torch.empty(x.shape, device=x.device, dtype=x.dtype)
    return torch.empty(*x.shape[:2], heads, x.shape[3], device=x.device, dtype=torch.float32)


def _gathered(gradient: Tensor, x: Tensor) -> Tensor:
    if gradient.shape[2] == x.shape[2]:
        return gradient
    return gradient.unflatten(2, (x.shape[2], -1)).sum(3).to(x.dtype)
