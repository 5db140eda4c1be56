"""Taylor attention, backends "cuda" and "triton": what operators.py runs on a GPU. Plain tensors in and out.

This file says which sweeps a call makes, over which segments (core/segments.py), and launches what they share.
triton_sweep.py holds Triton's sweeps for any F, cuda.py launches those of kernels/*.cu for F = 16; the forward is one
pass, its gradients two. README.md in this folder writes the cost model down. Never run as a script.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from linattn.core.dispatch import layout_of
from linattn.core.segments import Segments, cut_segments
from linattn.core.shapes import document_count
from linattn.core.tiles import Launch, aligned, block_of, gathered, gradient_of, launcher
from linattn.mixers.taylor import cuda
from linattn.mixers.taylor.chunked import TaylorState, empty_state, n_features
from linattn.mixers.taylor.cuda import Operands, Pass
from linattn.mixers.taylor.triton_scan import _scan_segments
from linattn.mixers.taylor.triton_sweep import _delta, _sweep

AGAIN = 0.4
"""What finding the segments' states costs over the pass itself: two of its five kinds of product."""
PARTS = 2
"""In how many parts cuda.py's sweeps sum a segment up, by a program each: twice as many fit without outputs."""


@dataclass(frozen=True)
class Tile:
    """How a program is built: tokens a chunk, warps, load stages, programs on an SM, least columns of (x, 1, 0, ..).

    parts: in how many a segment is summed up.
    """

    chunk: int
    warps: int
    stages: int
    resident: int
    linear: int = 32
    parts: int = 1


def tile_for(F: int, V: int) -> Tile:
    """The tile of every sweep. On an H200 (F 16, V 64) two load stages took 1.27 ms where one took 1.14."""
    return Tile(64, 4, 1, 2) if V <= 64 and F <= 16 else Tile(64, 8, 1, 1)


def cuda_tile(V: int, output: bool = True) -> Tile:
    """What of a tile cuda.py's sweeps have on capability 9.0. output: whether there is any, or sums are found alone."""
    few = V <= 64
    return Tile(64 if few else 128, 0, 0, cuda.resident_of(V, output, True), parts=PARTS if few and output else 1)


def blocks_of(F: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The pairs of blocks of 8 dims, each once: their left and their right ones."""
    pairs = [(i, j) for i in range(F // 8) for j in range(i, F // 8)]
    return tuple(i for i, _ in pairs), tuple(j for _, j in pairs)


def empty_states(like: Tensor, rows: int, heads: int, P: int, V: int) -> tuple[Tensor, TaylorState]:
    """A buffer [rows, heads, P V + P] of fp32, and its S [rows, heads, P, V] and z [rows, heads, P]."""
    buffer = like.new_empty(rows, heads, P * V + P, dtype=torch.float32)
    return buffer, TaylorState(buffer[..., : P * V].unflatten(-1, (P, V)), buffer[..., P * V :])


@dataclass(frozen=True)
class Plan:
    """What calls on tensors of one layout share: sizes, how rows are cut, and the passes by name.

    cut: None where documents are packed, whose lengths are on the device. passes: each is prepared when it first runs.
    """

    documents: int
    heads: int
    state_heads: int
    scale: float
    normalize: bool
    sweeps: str
    tile: Tile
    cut: Segments | None
    segments: int | None
    passes: dict[str, Callable[[Any], None]] = field(default_factory=dict)


@functools.lru_cache(4096)
def plan_of(
    layout: tuple[Any, ...], scale: float, normalize: bool, sweeps: str, tile: Tile | None, segments: int | None
) -> Plan:
    """The plan of calls whose first four tensors are q, k, v and cu_seqlens; layout: all that they read.

    tile, segments: to be taken instead of `tile_for`'s, and of as many a row as the cost model says.
    """
    q, k, v, packed = layout[:4]
    (B, T, Hq, F), V, device = q[0], v[0][3], q[3]
    documents, state_heads = B if packed is None else packed[0][0] - 1, max(k[0][2], v[0][2])
    tile = tile or (cuda_tile(V) if sweeps == "cuda" else tile_for(F, V))
    plan = Plan(documents, max(Hq, state_heads), state_heads, scale, normalize, sweeps, tile, None, segments)
    return plan if packed is not None else replace(plan, cut=_cut(B, T, plan.heads, tile, None, device, segments))


def sweep(
    plan: Plan,
    name: str,
    cut: Segments,
    x: Tensor,
    y: Tensor,
    r: Tensor | None = None,
    w: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None,
    heads: int,
    state_heads: int,
    out_y: Tensor | None = None,
    out_r: Tensor | None = None,
    share: Tensor | None = None,
    delta: Tensor | None = None,
    reverse: bool = False,
    state_in: TaylorState | None = None,
    state_out: TaylorState | None = None,
    summary: bool = False,
    part: int = 0,
) -> None:
    """One pass by the plan's sweeps: source (x, y), reader (r, w), in `Operands`' and `Pass`'s terms.

    name: what the plan keeps the pass under; everything but the tensors' addresses must follow from plan and name.
    """
    (S_in, z_in), (S_out, z_out) = state_in or _NO_STATE, state_out or _NO_STATE
    leaves = (S_in, z_in, S_out, z_out)
    operands = Operands(x, y, r, w, out_y, out_r, share, delta, *leaves, cu_seqlens, cut.document, cut.start)
    run = plan.passes.get(name)
    if run is None:
        how = Pass(heads, state_heads, plan.scale, plan.normalize, reverse, summary, part)
        made = cuda.prepared(operands, how, cut) if plan.sweeps == "cuda" else _prepared(operands, how, cut, plan.tile)
        run = plan.passes[name] = made
    run(operands)


_NO_STATE = (None, None)


def _prepared(operands: Operands, how: Pass, cut: Segments, tile: Tile) -> Callable[[Operands], None]:
    """What launches `_sweep` on operands of these layouts; where there is none, x stands and is not read."""
    x, heads = operands.x, how.heads
    F, V = x.shape[-1], operands.y.shape[-1]
    numbers = [how.scale, x.shape[1], cut.tokens, cut.per_row, how.part]
    given = [x if t is None else t for t in operands[:6]]
    for t in given:
        numbers += t.stride()[:3]
    numbers += (0, 0) if operands.share is None else operands.share.stride()[:2]
    for S, z in ((operands.S_in, operands.z_in), (operands.S_out, operands.z_out)):
        numbers += (0,) * 6 if S is None or z is None else (*S.stride(), *z.stride()[:2])
    constants = (
        F,
        max(tile.linear, block_of(F + 1)),
        V,
        max(block_of(V), 64),
        tile.chunk,
        *blocks_of(F),
        *(heads // t.shape[2] for t in given[:4]),
        heads // how.state_heads,
        how.reverse,
        how.normalize,
        operands.out_y is not None,
        operands.out_r is not None,
        operands.cu_seqlens is not None,
        cut.per_row != 1,
        operands.S_in is not None,
        0 if operands.S_out is None else 2 if how.summary else 1,
        tile.stages,
    )
    launched = launcher(_sweep, (heads, cut.count, 1), numbers, constants, tile.warps)

    def run(operands: Operands) -> None:
        x = operands.x
        launched([x if t is None else t for t in operands])

    return run


def states_before(
    plan: Plan,
    cut: Segments,
    x: Tensor,
    y: Tensor,
    initial: TaylorState | None,
    cu_seqlens: Tensor | None,
    *,
    heads: int,
    reverse: bool = False,
    **weights: Any,
) -> TaylorState | None:
    """The state before each segment (in reverse: behind it); the initial one itself where nothing is cut.

    weights: the source's share and delta.
    """
    if cut.fine is None:
        return initial
    P, V = n_features(x.shape[-1]), y.shape[-1]
    added, out = empty_states(x, cut.fine.count, heads, P, V)
    sizes: dict[str, Any] = {"heads": heads, "state_heads": heads, "cu_seqlens": cu_seqlens}
    added_up: dict[str, Any] = {"summary": True, "part": cut.parts, "reverse": reverse, "state_out": out}
    sweep(plan, f"add{reverse}", cut.fine, x, y, **added_up, **sizes, **weights)
    before, views = empty_states(x, cut.count, heads, P, V)
    name = f"scan{reverse}"
    run = plan.passes.get(name)
    if run is None:
        sizes = {"tokens": x.shape[1], "heads": heads, "P": P, "V": V}
        run = plan.passes[name] = _scan_launcher(plan, cut, initial, cu_seqlens is not None, reverse, **sizes)
    S, z = initial or _NO_STATE
    run([added if t is None else t for t in (added, before, S, z, cu_seqlens, cut.first, cut.fine.first)])
    return views


def _scan_launcher(
    plan: Plan,
    cut: Segments,
    initial: TaylorState | None,
    packed: bool,
    reverse: bool,
    *,
    tokens: int,
    heads: int,
    P: int,
    V: int,
) -> Launch:
    fine, size, block, ahead = cut.fine, P * V + P, 1024, 4
    assert fine is not None
    strides = (0,) * 4 if initial is None else (*initial.S.stride()[:2], *initial.z.stride()[:2])
    numbers = (tokens, cut.tokens, cut.per_row, fine.per_row, heads, size, P * V, *strides)
    group = 1 if initial is None else heads // initial.S.shape[1]
    constants = (cut.parts, reverse, packed, initial is not None, group, block, ahead)
    return launcher(_scan_segments, (-(-size // block), heads, plan.documents), numbers, constants, 4)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    normalize: bool,
    S0: Tensor | None,
    z0: Tensor | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
    sweeps: str = "triton",
    tile: Tile | None = None,
    segments: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """o [B, T, Ho, V], the final S [N, H, P, V] and z [N, H, P], and share [B, Ho, T], 1 / divisor.

    S and z are None unless asked for, and share is where nothing is divided.
    """
    (B, T, Hq, F), V, n_state = q.shape, v.shape[3], max(k.shape[2], v.shape[2])
    heads, P = max(Hq, n_state), n_features(F)
    documents = document_count(B, cu_seqlens)
    o = v.new_empty(B, T, heads, V)
    share = q.new_empty(B, heads, T, dtype=torch.float32) if normalize else None
    final = empty_state(q, documents, n_state, P, V) if return_state else None
    S, z = final or _NO_STATE
    if T == 0:
        for x, x0 in zip(final or (), (S0, z0), strict=False):
            x.zero_() if x0 is None else x.copy_(x0)
        return o, S, z, share
    q, k, v, cu_seqlens = aligned(q), aligned(k), aligned(v), _offsets(cu_seqlens)
    initial = _sums(S0, z0)
    plan = plan_of(layout_of(q, k, v, cu_seqlens, *(initial or _NO_STATE)), scale, normalize, sweeps, tile, segments)
    cut = plan.cut or _cut(B, T, heads, plan.tile, cu_seqlens, q.device, segments)
    before = states_before(plan, cut, k, v, initial, cu_seqlens, heads=n_state)
    sizes: dict[str, Any] = {"heads": heads, "state_heads": n_state}
    states: dict[str, Any] = {"state_in": before, "state_out": final}
    name = "y" if final is None else "y and state"
    sweep(plan, name, cut, k, v, q, cu_seqlens=cu_seqlens, out_y=o, share=share, **sizes, **states)
    return o, S, z, share


def summarize(
    k: Tensor, v: Tensor, cu_seqlens: Tensor | None, sweeps: str = "triton", segments: int | None = None
) -> tuple[Tensor, Tensor]:
    """S [N, H, P, V] and z [N, H, P] of keys and values read from nothing: rows are split over the SMs and added up."""
    (B, T, Hk, F), Hv, V = k.shape, v.shape[2], v.shape[3]
    heads, P = max(Hk, Hv), n_features(F)
    documents = document_count(B, cu_seqlens)
    if T == 0:
        zeros = [k.new_zeros(documents, heads, *sizes, dtype=torch.float32) for sizes in ((P, V), (P,))]
        return zeros[0], zeros[1]
    k, v, cu_seqlens = aligned(k), aligned(v), _offsets(cu_seqlens)
    tile = cuda_tile(V, output=False) if sweeps == "cuda" else None
    plan = plan_of(layout_of(k, k, v, cu_seqlens), 1.0, False, sweeps, tile, segments)
    cut = plan.cut or Segments(documents, T, 1)
    rows = cut.fine or cut
    buffer, out = empty_states(k, rows.count, heads, P, V)
    sizes: dict[str, Any] = {"heads": heads, "state_heads": heads}
    sweep(plan, "summary", rows, k, v, cu_seqlens=cu_seqlens, state_out=out, summary=True, **sizes)
    if cut.per_row != 1:
        buffer = buffer.unflatten(0, (B, -1)).sum(1)
    return buffer[..., : P * V].unflatten(-1, (P, V)).contiguous(), buffer[..., P * V :].contiguous()


def backward(
    do: Tensor | None,
    dS: Tensor | None,
    dz: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    share: Tensor | None,
    scale: float,
    normalize: bool,
    S0: Tensor | None,
    z0: Tensor | None,
    cu_seqlens: Tensor | None,
    sweeps: str = "triton",
    tile: Tile | None = None,
    segments: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dq, dk, dv, and the gradients of S0 and z0 (None where there is none)."""
    (B, T, Hq, F), V, n_state = q.shape, v.shape[3], max(k.shape[2], v.shape[2])
    if T == 0:
        return _nothing_read(dS, dz, q, k, v, S0, z0)
    heads, P, through_outputs = max(Hq, n_state), n_features(F), do is not None
    documents = document_count(B, cu_seqlens)
    do = q.new_zeros(B, T, heads, V) if do is None else aligned(do)
    q, k, v, cu_seqlens = aligned(q), aligned(k), aligned(v), _offsets(cu_seqlens)
    initial, seed = _sums(S0, z0), _seed(dS, dz, documents, n_state, heads, P, V)
    layout = layout_of(q, k, v, cu_seqlens, do, o, share, *(initial or _NO_STATE), *(seed or _NO_STATE))
    plan = plan_of(layout, scale, normalize, sweeps, tile, segments)
    cut = plan.cut or _cut(B, T, heads, plan.tile, cu_seqlens, q.device, segments)
    dq, dk, dv = (gradient_of(x, heads, None if sweeps == "cuda" else torch.float32) for x in (q, k, v))
    common: dict[str, Any] = {"cu_seqlens": cu_seqlens, "heads": heads}
    if normalize:
        assert share is not None
        common |= {"share": share, "delta": _delta_of(plan, do, o, share)}
    if through_outputs:
        before = states_before(plan, cut, k, v, initial, cu_seqlens, heads=n_state)
        sweep(plan, "dq", cut, k, v, q, do, out_r=dq, state_in=before, state_heads=n_state, **common)
    else:
        dq.zero_()
    behind = states_before(plan, cut, q, do, seed, reverse=True, **common)
    # A State's gradient is summed over the heads that read it, so here every head has a state of its own.
    first = None if S0 is None else empty_state(q, documents, heads, P, V)
    states: dict[str, Any] = {"state_in": behind, "state_out": first, "state_heads": heads}
    sweep(plan, "dk, dv", cut, q, do, k, v, out_y=dv, out_r=dk, reverse=True, **states, **common)
    dS0, dz0 = first or _NO_STATE
    if first is not None and heads > n_state:
        dS0, dz0 = (x.unflatten(1, (n_state, -1)).sum(2) for x in first)
    return gathered(dq, q), gathered(dk, k), gathered(dv, v), dS0, dz0


def _nothing_read(
    dS: Tensor | None, dz: Tensor | None, q: Tensor, k: Tensor, v: Tensor, S0: Tensor | None, z0: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """`backward` of a call on no tokens, whose final State is the initial one."""
    given = ((S0, dS), (z0, dz))
    dS0, dz0 = (None if x is None else torch.zeros_like(x) if d is None else d.clone() for x, d in given)
    return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), dS0, dz0


def _delta_of(plan: Plan, do: Tensor, o: Tensor, share: Tensor) -> Tensor:
    """do . o of every output, [B, H, T] like ``share``: what all gradients of one token's weights have in common."""
    delta = torch.empty_like(share)
    run = plan.passes.get("delta")
    if run is None:
        (B, T, heads, V), block = do.shape, 64
        numbers = (B, heads, *do.stride()[:3], *o.stride()[:3], T)
        constants = (V, max(16, block_of(V)), block)
        run = plan.passes["delta"] = launcher(_delta, (-(-T // block), heads, B), numbers, constants, 4)
    run((do, o, delta))
    return delta


def _seed(
    dS: Tensor | None, dz: Tensor | None, documents: int, n_state: int, heads: int, P: int, V: int
) -> TaylorState | None:
    """The final State's gradient, which the heads that share a State share: the first of them carries it."""
    like = dS if dS is not None else dz
    if like is None:
        return None
    seed = TaylorState(like.new_zeros(documents, heads, P, V), like.new_zeros(documents, heads, P))
    for leaf, gradient in zip(seed, (dS, dz), strict=True):
        if gradient is not None:
            leaf[:, :: heads // n_state] = gradient
    return seed


def _cut(
    rows: int, tokens: int, heads: int, tile: Tile, cu_seqlens: Tensor | None, device: torch.device, n: int | None
) -> Segments:
    settings: dict[str, Any] = {"again": AGAIN, "parts": tile.parts, "shortest": 512, "segments": n}
    return cut_segments(rows, tokens, heads, tile.resident, tile.chunk, cu_seqlens, device, **settings)


def _sums(S: Tensor | None, z: Tensor | None) -> TaylorState | None:
    return None if S is None or z is None else TaylorState(S.float().contiguous(), z.float().contiguous())


def _offsets(cu_seqlens: Tensor | None) -> Tensor | None:
    """Documents' offsets as cuda.py's kernels read them."""
    return None if cu_seqlens is None else cu_seqlens.to(torch.int32)
