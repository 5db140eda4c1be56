"""Lightning attention, backend "triton": what the operators of this folder's __init__ run on a GPU.

Plain tensors in and out. The forward is one sweep, its gradients three (triton_sweep.py); how a call is tiled and cut
in segments is `plan`, whose cost model README.md in this folder writes down. Never run as a script.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linattn.core.segments import Segments, cut_segments
from linattn.core.tiles import block_of, launch, launcher
from linattn.mixers.lightning.triton_decay import _decay_gradient
from linattn.mixers.lightning.triton_step import _step
from linattn.mixers.lightning.triton_sweep import _scan_segments, _sweep

SHORTEST_SEGMENT = 512
"""Tokens; below it a segment's state (2 K V 4 bytes written and read) weighs more than its keys and values."""

AGAIN = 0.5
"""What finding the segments' states costs over the pass itself: it reads k and v again, two of four tensors."""
PARTS = 4
"""Into how many each segment is cut again for the pass that finds what it adds: heads that forget fast are done early,
and smaller pieces leave no multiprocessor waiting for those that do not."""


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
    path = Path(__file__).parent / "tuned" / f"{gpu}.json"
    return json.loads(path.read_text())["tiles"] if path.is_file() else {}


@functools.cache
def gpu_key(device: torch.device) -> str:
    """The name a table goes by: h200 for an NVIDIA H200."""
    if device.type != "cuda":
        return "none"
    return torch.cuda.get_device_name(device).lower().replace("nvidia ", "").split()[0]


@functools.cache
def sides_of(K: int, V: int) -> tuple[int, int]:
    """The sides of tiles that hold K and V.

    triton 3.6 turns a side of 16 or 32 beside one of 64 or more into illegal memory accesses on an H200: such a side is
    filled up to 64, which costs no bytes of memory traffic.
    """
    least = 64 if max(K, V) > 32 else 16
    return max(block_of(K), least), max(block_of(V), least)


@functools.cache
def tile_for(K: int, V: int, device: torch.device) -> Tile:
    """The tuned tile for these head dims on this GPU, or one that fits any from capability 8.0 on."""
    entry = tuned(gpu_key(device)).get("{}x{}".format(*sides_of(K, V)))
    return Tile(*entry) if entry is not None else plain_tile(K, V)


def plain_tile(K: int, V: int) -> Tile:
    """A tile that runs on any GPU from capability 8.0 on, in less than 100 KB of shared memory."""
    # A state of 64 x 128 in fp32 fills half of four warps' registers; more would spill.
    BK, BV = sides_of(K, V)
    return Tile(32, 32, 4, 2, 1) if BK > 128 else Tile(64, min(BV, 64), 4, 2, 1)


def _cut(
    rows: int,
    tokens: int,
    programs: int,
    tile: Tile,
    cu_seqlens: Tensor | None,
    device: torch.device,
    segments: int | None = None,
) -> Segments:
    """Segments for ``rows`` rows of ``tokens`` tokens with ``programs`` programs each (core/segments.py)."""
    settings: dict[str, Any] = {"again": AGAIN, "parts": PARTS, "shortest": SHORTEST_SEGMENT, "segments": segments}
    return cut_segments(rows, tokens, programs, tile.resident, max(tile.chunk, 64), cu_seqlens, device, **settings)


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
    pair: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Launch `_sweep`. States are [segments or documents, H, K, V] views of fp32, K going with b and V with c.

    pair: (a, b, c, out) of a second sweep to go beside it, whose state is the transpose.
    """
    given = [x if x is not None else b for x in (a, b, c, out)]
    given += pair or given
    options = (state_in, state_out, cu_seqlens, cut.document, cut.start)
    tensors = [*given, log_decay, *[x if x is not None else log_decay for x in options]]
    final = 0 if state_out is None else 2 if summary else 1
    switches = (reverse, cu_seqlens is not None, out is not None, state_in is not None, final, pair is not None)
    layout = tuple([(x.shape, x.stride()) for x in tensors])
    _sweep_launcher(layout, tile, cut.count, cut.tokens, cut.per_row, heads, scale, switches)(tensors)


@functools.lru_cache(4096)
def _sweep_launcher(
    layout: tuple[Any, ...],
    tile: Tile,
    segments: int,
    segment_tokens: int,
    per_row: int,
    heads: int,
    scale: float,
    switches: tuple[Any, ...],
) -> Callable[[Sequence[Tensor]], None]:
    """What runs `_sweep` on tensors of this layout, (shape, strides) each: kept, because building it takes long."""
    reverse, packed, output, initial, final, pair = switches
    sizes, strides = ([x[i] for x in layout] for i in range(2))
    K, V, tokens = sizes[1][-1], sizes[2][-1], sizes[1][1]
    numbers = [scale, tokens, segment_tokens, per_row, PARTS]
    for x in strides[:8]:
        numbers += x[:3]
    for stride, present in zip(strides[9:11], (initial, final), strict=True):
        numbers += stride if present else (0, 0, 0, 0)
    groups = [heads // size[2] for size in sizes[:8]]
    BV = tile.value
    constants = (
        K,
        V,
        sides_of(K, V)[0],
        BV,
        tile.chunk,
        *groups[:3],
        heads // sizes[8][0],
        reverse,
        packed,
        per_row != 1,
        output,
        initial,
        final,
        *groups[4:7],
        pair,
        tile.stages,
    )
    grid = (-(-V // BV) * (2 if pair else 1), heads, segments)
    return launcher(_sweep, grid, tuple(numbers), constants, tile.warps)


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
    fine = cut.fine
    if fine is None:
        return initial
    K, V = b.shape[-1], c.shape[-1]
    added = b.new_empty(fine.count, heads, K, V, dtype=torch.float32)
    before = b.new_empty(cut.count, heads, K, V, dtype=torch.float32)
    shared: dict[str, Any] = {"cu_seqlens": cu_seqlens, "reverse": reverse}
    sweep(None, b, c, None, log_decay, tile, fine, heads=heads, scale=scale, state_out=added, summary=True, **shared)
    block = 1024
    optional = (initial, log_decay, cu_seqlens, fine.first, cut.first)
    tensors = [added, before, *(x if x is not None else log_decay for x in optional)]
    strides = initial.stride() if initial is not None else (0, 0, 0, 0)
    constants = (
        V,
        heads // log_decay.shape[0],
        1 if initial is None else heads // initial.shape[1],
        reverse,
        cu_seqlens is not None,
        initial is not None,
        block,
    )
    numbers = (b.shape[1], fine.tokens, fine.per_row, cut.per_row, PARTS, heads, K * V, *strides)
    launch(_scan_segments, (-(-K * V // block), heads, documents), tensors, numbers, constants, warps=4)
    return before


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
) -> tuple[Tensor, Tensor | None]:
    """o [B, T, Ho, V] and the final S [N, H, K, V] (None unless asked for)."""
    B, T, n_state = q.shape[0], q.shape[1], log_decay.shape[0]
    K, V, heads = q.shape[-1], v.shape[-1], max(q.shape[2], n_state)
    documents = B if cu_seqlens is None else cu_seqlens.numel() - 1
    o = q.new_empty(B, T, heads, V)
    final = q.new_empty(documents, n_state, K, V, dtype=torch.float32) if return_state else None
    if T == 0:
        if final is not None:
            final = final.zero_() if initial is None else final.copy_(initial)
        return o, final
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    initial = None if initial is None else initial.float()
    tile = tile or tile_for(K, V, q.device)
    programs = heads * -(-V // tile.value)
    cut = _cut(B, T, programs, tile, cu_seqlens, q.device, segments)
    shared: dict[str, Any] = {"scale": scale, "cu_seqlens": cu_seqlens}
    before = states_before(k, v, log_decay, tile, cut, heads=n_state, documents=documents, initial=initial, **shared)
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
        state_out=final,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dq, dk, dv, dlog_decay (None unless asked for) and the gradient of the initial S (None where there is none)."""
    B, T, n_state = q.shape[0], q.shape[1], log_decay.shape[0]
    K, V, heads = q.shape[-1], v.shape[-1], max(q.shape[2], n_state)
    documents = B if cu_seqlens is None else cu_seqlens.numel() - 1
    d_initial = None if initial is None else q.new_empty(documents, heads, K, V, dtype=torch.float32)
    if T == 0:
        if initial is not None:
            d_initial = torch.zeros_like(initial) if d_final is None else d_final.clone()
        d_decay = torch.zeros_like(log_decay) if decay_gradient else None
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), d_decay, d_initial
    do = q.new_zeros(B, T, heads, V) if do is None else _aligned(do)
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
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
    programs = heads * -(-V // by_key.value)
    cut = _cut(B, T, programs, by_key, cu_seqlens, q.device, segments)
    shared: dict[str, Any] = {"scale": scale, "cu_seqlens": cu_seqlens}
    S = states_before(k, v, log_decay, by_key, cut, heads=n_state, documents=documents, initial=initial, **shared)
    S = None if S is None else S.transpose(-1, -2)
    sweep(do, v, k, grads[0], log_decay, by_value, cut, heads=heads, state_in=S, **shared)
    shared["reverse"] = True
    D = states_before(q, do, log_decay, by_key, cut, heads=heads, documents=documents, initial=seed, **shared)
    # A State's gradient is summed over the heads that read it, so here every head has a state of its own.
    spread = log_decay if group == 1 else log_decay.repeat_interleave(group)
    first, second = (k, q, do, grads[2]), (v, do, q, grads[1])
    shared |= {"heads": heads}
    out: dict[str, Any] = {"state_in": D, "state_out": d_initial}
    if K == V and grads[1].dtype == grads[2].dtype:
        sweep(*first, spread, by_key, cut, pair=second, **out, **shared)
    else:
        sweep(*first, spread, by_key, cut, **out, **shared)
        sweep(*second, spread, by_value, cut, state_in=None if D is None else D.transpose(-1, -2), **shared)
    d_decay = None
    if decay_gradient:
        d_decay = decay_gradient_of(do, d_final, q, k, v, log_decay, scale, initial, cu_seqlens)
    dq, dk, dv = (_gathered(g, x) for g, x in zip(grads, (q, k, v), strict=True))
    if d_initial is not None and group > 1:
        d_initial = d_initial.unflatten(1, (n_state, group)).sum(2)
    return dq, dk, dv, d_decay, d_initial


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
    BK, BV = sides_of(K, V)
    BV = min(BV, max(16, 4096 // BK))
    blocks = -(-V // BV)
    out = torch.empty(documents, heads, blocks, device=q.device, dtype=torch.float32)
    given, states = (q, k, v, do), (initial, d_final)
    optional = [x if x is not None else log_decay for x in states]
    tensors = [*given, log_decay, *optional, out, cu_seqlens if cu_seqlens is not None else log_decay]
    numbers = [scale, T]
    for x in given:
        numbers += x.stride()[:3]
    for x in states:
        numbers += x.stride() if x is not None else (0, 0, 0, 0)
    groups = [heads // n for n in (q.shape[2], k.shape[2], v.shape[2], n_state)]
    constants = (K, V, BK, BV, 32, *groups, cu_seqlens is not None, initial is not None, d_final is not None)
    launch(_decay_gradient, (blocks, heads, documents), tensors, numbers, constants, warps=4)
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
    n_state, K, V = S.shape[1:]
    heads = max(q.shape[1], n_state)
    o = q.new_empty(q.shape[0], heads, V)
    BK = block_of(K)
    # 32 KB of state a program were 7% faster than 16 from 64 rows of 32 heads on, 16 KB 6% faster at one row.
    entries = 8192 if q.shape[0] * n_state >= 1024 else 4096
    BV = value or min(block_of(V), max(16, entries // BK))
    numbers = [scale, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *S.stride()[:3], *carried.stride()]
    groups = (heads // q.shape[1], n_state // k.shape[1], n_state // v.shape[1], heads // n_state)
    launch(
        _step,
        (-(-V // BV), n_state, q.shape[0]),
        (q, k, v, o, log_decay, S, carried, slots),
        (*numbers, n_state, S.shape[0]),
        (K, V, BK, BV, *groups, 1 << (groups[3] - 1).bit_length()),
        warps=warps,
    )
    return o


def _aligned(x: Tensor) -> Tensor:
    """``x`` itself, or a copy where its rows cannot be fetched in pieces of 16 bytes.

    An expanded gradient is such, and a view that begins off 16 bytes, which strides do not tell `refuses`.
    """
    if x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x  # a head's dims are multiples of 8
    outer = x.stride()[:3]
    fits = x.stride(3) == 1 and all(s % 8 == 0 for s in outer) and outer[1] > 0 and x.data_ptr() % 16 == 0
    return x if fits else x.contiguous()


def _gradient(x: Tensor, heads: int) -> Tensor:
    """Where a sweep writes the gradient of x: in fp32 a head where several heads share x's, to be summed then."""
    if x.shape[2] == heads:
        return x.new_empty(x.shape)
    return torch.empty(*x.shape[:2], heads, x.shape[3], device=x.device, dtype=torch.float32)


def _gathered(gradient: Tensor, x: Tensor) -> Tensor:
    if gradient.shape[2] == x.shape[2]:
        return gradient
    return gradient.unflatten(2, (x.shape[2], -1)).sum(3).to(x.dtype)
