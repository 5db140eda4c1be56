"""Lightning attention, backend "triton": what the operators of this folder's __init__ run on a GPU.

Plain tensors in and out. The forward is one sweep, its gradients three (triton_sweep.py); how a call is tiled and cut
in segments is `plan`, whose cost model README.md in this folder writes down. Never run as a script.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linattn.core.dispatch import layout_of
from linattn.core.segments import Segments, cut_segments
from linattn.core.shapes import document_count
from linattn.core.tiles import Launch, aligned, block_of, gathered, gradient_of, launch, launcher
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


@dataclass(frozen=True)
class Plan:
    """What calls on tensors of one layout share: sizes, tiles, how rows are cut, and the launches by name.

    key, value: the tiles of sweeps whose state is K x V, and V x K. cut: None where documents are packed, whose lengths
    are on the device. launches: each is prepared when it first runs.
    """

    documents: int
    heads: int
    key: Tile
    value: Tile
    scale: float
    cut: Segments | None
    segments: int | None
    launches: dict[str, Launch] = field(default_factory=dict)


@functools.lru_cache(4096)
def plan_of(layout: tuple[Any, ...], scale: float, tile: Tile | None, segments: int | None) -> Plan:
    """The plan of calls whose first five tensors are q, k, v, log_decay and cu_seqlens; layout: all that they read.

    tile, segments: to be taken instead of the tuned one, and of as many a row as the cost model says.
    """
    q, _, v, log_decay, packed = layout[:5]
    (B, T, Hq, K), V, device = q[0], v[0][3], q[3]
    documents, heads = B if packed is None else packed[0][0] - 1, max(Hq, log_decay[0][0])
    key, value = tile or tile_for(K, V, device), tile or tile_for(V, K, device)
    plan = Plan(documents, heads, key, value, scale, None, segments)
    return plan if packed is not None else replace(plan, cut=_cut(plan, B, T, V, None, device))


def _cut(plan: Plan, rows: int, tokens: int, V: int, cu_seqlens: Tensor | None, device: torch.device) -> Segments:
    tile = plan.key
    return cut_segments(
        rows,
        tokens,
        plan.heads * -(-V // tile.value),
        tile.resident,
        max(tile.chunk, 64),
        cu_seqlens,
        device,
        again=AGAIN,
        parts=PARTS,
        shortest=SHORTEST_SEGMENT,
        segments=plan.segments,
    )


def sweep(
    plan: Plan,
    name: str,
    cut: Segments,
    a: Tensor | None,
    b: Tensor,
    c: Tensor,
    out: Tensor | None,
    log_decay: Tensor,
    cu_seqlens: Tensor | None,
    state_in: Tensor | None,
    state_out: Tensor | None,
    *,
    pair: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    **settings: Any,
) -> None:
    """Launch `_sweep`. States are [segments or documents, H, K, V] views of fp32, K going with b and V with c.

    name: what the plan keeps the launch under; everything but the tensors' addresses must follow from plan and name.
    pair: (a, b, c, out) of a second sweep to go beside it, whose state is the transpose. settings: `_sweep_launcher`'s.
    """
    first = (b if a is None else a, b, c, b if out is None else out)
    options = (state_in, state_out, cu_seqlens, cut.document, cut.start)
    tensors = [*first, *(pair or first), log_decay, *[log_decay if x is None else x for x in options]]
    run = plan.launches.get(name)
    if run is None:
        given = (out is not None, state_in is not None, state_out is not None, cu_seqlens is not None, pair is not None)
        run = plan.launches[name] = _sweep_launcher(tensors, given, plan.scale, cut, **settings)
    run(tensors)


def _sweep_launcher(
    tensors: Sequence[Tensor],
    given: tuple[bool, ...],
    scale: float,
    cut: Segments,
    *,
    heads: int,
    tile: Tile,
    reverse: bool = False,
    part: int = 0,
) -> Launch:
    """heads: of the sweep. reverse: from the last token on.

    part: what each segment adds to the state is put out, this many of them being read as one; 0: the state itself.
    """
    output, initial, final, packed, pair = given
    K, V, tokens = tensors[1].shape[-1], tensors[2].shape[-1], tensors[1].shape[1]
    numbers = [scale, tokens, cut.tokens, cut.per_row, part]
    for x in tensors[:8]:
        numbers += x.stride()[:3]
    for x, present in zip(tensors[9:11], (initial, final), strict=True):
        numbers += x.stride() if present else (0, 0, 0, 0)
    groups = [heads // x.shape[2] for x in tensors[:8]]
    BV = tile.value
    constants = (
        K,
        V,
        sides_of(K, V)[0],
        BV,
        tile.chunk,
        *groups[:3],
        heads // tensors[8].shape[0],
        reverse,
        packed,
        cut.per_row != 1,
        output,
        initial,
        0 if not final else 2 if part else 1,
        *groups[4:7],
        pair,
        tile.stages,
    )
    grid = (-(-V // BV) * (2 if pair else 1), heads, cut.count)
    return launcher(_sweep, grid, numbers, constants, tile.warps)


def states_before(
    plan: Plan,
    cut: Segments,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    heads: int,
    reverse: bool = False,
) -> Tensor | None:
    """The state before each segment, [segments, heads, K, V]: the initial one itself where nothing is cut."""
    fine = cut.fine
    if fine is None:
        return initial
    K, V = b.shape[-1], c.shape[-1]
    added = b.new_empty(fine.count, heads, K, V, dtype=torch.float32)
    before = b.new_empty(cut.count, heads, K, V, dtype=torch.float32)
    settings: dict[str, Any] = {"heads": heads, "tile": plan.key, "reverse": reverse, "part": cut.parts}
    sweep(plan, f"add{reverse}", fine, None, b, c, None, log_decay, cu_seqlens, None, added, **settings)
    optional = (initial, log_decay, cu_seqlens, fine.first, cut.first)
    tensors = [added, before, *(log_decay if x is None else x for x in optional)]
    name = f"scan{reverse}"
    run = plan.launches.get(name)
    if run is None:
        packed, documents = cu_seqlens is not None, plan.documents
        run = plan.launches[name] = _scan_launcher(tensors, b.shape[1], cut, initial, documents, reverse, packed)
    run(tensors)
    return before


def _scan_launcher(
    tensors: Sequence[Tensor],
    tokens: int,
    cut: Segments,
    initial: Tensor | None,
    documents: int,
    reverse: bool,
    packed: bool,
) -> Launch:
    fine, block, ahead = cut.fine, 1024, 8
    assert fine is not None
    _, heads, K, V = tensors[0].shape
    strides = (0, 0, 0, 0) if initial is None else initial.stride()
    numbers = (tokens, fine.tokens, fine.per_row, cut.per_row, cut.parts, heads, K * V, *strides)
    groups = (heads // tensors[3].shape[0], 1 if initial is None else heads // initial.shape[1])
    constants = (V, *groups, reverse, packed, initial is not None, block, ahead)
    return launcher(_scan_segments, (-(-K * V // block), heads, documents), numbers, constants, 4)


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
    (B, T, Hq, K), V, n_state = q.shape, v.shape[3], log_decay.shape[0]
    if T == 0:
        final = q.new_zeros(document_count(B, cu_seqlens), n_state, K, V, dtype=torch.float32) if return_state else None
        if final is not None and initial is not None:
            final.copy_(initial)
        return q.new_empty(B, 0, max(Hq, n_state), V), final
    q, k, v = aligned(q), aligned(k), aligned(v)
    initial = None if initial is None else initial.float()
    plan = plan_of(layout_of(q, k, v, log_decay, cu_seqlens, initial), scale, tile, segments)
    o = q.new_empty(B, T, plan.heads, V)
    final = q.new_empty(plan.documents, n_state, K, V, dtype=torch.float32) if return_state else None
    cut = plan.cut or _cut(plan, B, T, V, cu_seqlens, q.device)
    before = states_before(plan, cut, k, v, log_decay, initial, cu_seqlens, heads=n_state)
    name = "y" if final is None else "y and S"
    sweep(plan, name, cut, q, k, v, o, log_decay, cu_seqlens, before, final, heads=plan.heads, tile=plan.key)
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
    (B, T, Hq, K), V, n_state = q.shape, v.shape[3], log_decay.shape[0]
    if T == 0:
        return _nothing_read(d_final, q, k, v, log_decay, initial, decay_gradient)
    heads = max(Hq, n_state)
    do = q.new_zeros(B, T, heads, V) if do is None else aligned(do)
    q, k, v = aligned(q), aligned(k), aligned(v)
    initial, d_final = (None if x is None else x.float() for x in (initial, d_final))
    plan = plan_of(layout_of(q, k, v, log_decay, cu_seqlens, initial, do, d_final), scale, tile, segments)
    cut = plan.cut or _cut(plan, B, T, V, cu_seqlens, q.device)
    grads = [gradient_of(x, heads) for x in (q, k, v)]
    S = states_before(plan, cut, k, v, log_decay, initial, cu_seqlens, heads=n_state)
    S = None if S is None else S.transpose(-1, -2)
    sweep(plan, "dq", cut, do, v, k, grads[0], log_decay, cu_seqlens, S, None, heads=heads, tile=plan.value)
    seed = d_final if d_final is None or heads == n_state else _spread(d_final, heads)
    D = states_before(plan, cut, q, do, log_decay, seed, cu_seqlens, heads=heads, reverse=True)
    # A State's gradient is summed over the heads that read it, so here every head has a state of its own.
    spread = log_decay if heads == n_state else log_decay.repeat_interleave(heads // n_state)
    d_initial = None if initial is None else q.new_empty(plan.documents, heads, K, V, dtype=torch.float32)
    first, second = (k, q, do, grads[2]), (v, do, q, grads[1])
    same = K == V and grads[1].dtype == grads[2].dtype
    settings: dict[str, Any] = {"pair": second if same else None, "heads": heads, "reverse": True}
    sweep(plan, "dv", cut, *first, spread, cu_seqlens, D, d_initial, tile=plan.key, **settings)
    if not same:
        D = None if D is None else D.transpose(-1, -2)
        sweep(plan, "dk", cut, *second, spread, cu_seqlens, D, None, tile=plan.value, **settings)
    d_decay = decay_gradient_of(do, d_final, q, k, v, log_decay, scale, initial, cu_seqlens) if decay_gradient else None
    if d_initial is not None and heads > n_state:
        d_initial = d_initial.unflatten(1, (n_state, -1)).sum(2)
    return gathered(grads[0], q), gathered(grads[1], k), gathered(grads[2], v), d_decay, d_initial


def _nothing_read(
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial: Tensor | None,
    decay_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """`backward` of a call on no tokens, whose final State is the initial one."""
    d_decay, d_initial = torch.zeros_like(log_decay) if decay_gradient else None, None
    if initial is not None:
        d_initial = torch.zeros_like(initial) if d_final is None else d_final.clone()
    return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), d_decay, d_initial


def _spread(d_final: Tensor, heads: int) -> Tensor:
    """The heads that share a State share its gradient [N, H, K, V]: the first of them carries it, of ``heads``."""
    N, n_state, K, V = d_final.shape
    seed = d_final.new_zeros(N, heads, K, V)
    seed[:, :: heads // n_state] = d_final
    return seed


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
        (q, k, v, o, log_decay, S, carried, slots.contiguous()),
        (*numbers, n_state, S.shape[0]),
        (K, V, BK, BV, *groups, 1 << (groups[3] - 1).bit_length()),
        warps=warps,
    )
    return o
