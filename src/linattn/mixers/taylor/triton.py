"""Taylor attention, backend "triton": what operators.py runs on a GPU. Plain tensors in and out.

The forward is one sweep, its gradients two (triton_sweep.py); how a call is tiled and cut in segments is `tile_for` and
core/segments.py, whose cost model README.md in this folder writes down. Never run as a script.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linattn.core.segments import Segments, cut_segments
from linattn.core.tiles import block_of, launch
from linattn.mixers.taylor import cuda
from linattn.mixers.taylor.chunked import TaylorState, n_features
from linattn.mixers.taylor.triton_sweep import _delta, _scan_segments, _sweep

AGAIN = 0.4
"""What finding the segments' states costs over the pass itself: two of its five kinds of product."""


@dataclass(frozen=True)
class Tile:
    """How a program is built: tokens a chunk, warps, load stages, programs on an SM, least columns of (x, 1, 0, ..)."""

    chunk: int
    warps: int
    stages: int
    resident: int
    linear: int = 32


def tile_for(F: int, V: int) -> Tile:
    """The tile of every sweep. On an H200 (F 16, V 64) two load stages took 1.27 ms where one took 1.14."""
    return Tile(64, 4, 1, 2) if V <= 64 and F <= 16 else Tile(64, 8, 1, 1)


def blocks_of(F: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The pairs of blocks of 8 dims, each once: their left and their right ones."""
    pairs = [(i, j) for i in range(F // 8) for j in range(i, F // 8)]
    return tuple(i for i, _ in pairs), tuple(j for _, j in pairs)


def empty_states(like: Tensor, rows: int, heads: int, P: int, V: int) -> tuple[Tensor, TaylorState]:
    """A buffer [rows, heads, P V + P] of fp32, and its S [rows, heads, P, V] and z [rows, heads, P]."""
    buffer = like.new_empty(rows, heads, P * V + P, dtype=torch.float32)
    return buffer, TaylorState(buffer[..., : P * V].unflatten(-1, (P, V)), buffer[..., P * V :])


def sweep(
    x: Tensor,
    y: Tensor,
    r: Tensor | None,
    w: Tensor | None,
    tile: Tile,
    cut: Segments,
    *,
    heads: int,
    scale: float,
    normalize: bool,
    cu_seqlens: Tensor | None,
    state_heads: int,
    out_y: Tensor | None = None,
    out_r: Tensor | None = None,
    share: Tensor | None = None,
    delta: Tensor | None = None,
    reverse: bool = False,
    state_in: TaylorState | None = None,
    state_out: TaylorState | None = None,
    summary: bool = False,
) -> None:
    """Launch `_sweep`: source (x, y), reader (r, w), in `_sweep`'s terms. share, delta: [rows, heads, T] fp32."""
    F, V = x.shape[-1], y.shape[-1]
    given = [t if t is not None else x for t in (x, y, r, w, out_y, out_r)]
    dummy = y.new_empty(0, dtype=torch.float32) if share is None and state_in is None and state_out is None else None
    spare = next(t for t in (share, state_in and state_in.S, state_out and state_out.S, dummy) if t is not None)
    states = [state_in or TaylorState(spare, spare), state_out or TaylorState(spare, spare)]
    indices = [t if t is not None else spare for t in (cu_seqlens, cut.document, cut.start)]
    tensors = [
        *given,
        *(t if t is not None else spare for t in (share, delta)),
        *(t for state in states for t in (state.S, state.z)),
        *indices,
    ]
    numbers = [scale, x.shape[1], cut.tokens, cut.per_row]
    for t in given:
        numbers += t.stride()[:3]
    numbers += share.stride()[:2] if share is not None else (0, 0)
    for state, asked in zip(states, (state_in, state_out), strict=True):
        numbers += (*state.S.stride(), *state.z.stride()[:2]) if asked is not None else (0,) * 6
    left, right = blocks_of(F)
    constants = (
        F,
        max(tile.linear, block_of(F + 1)),
        V,
        max(block_of(V), 64),
        tile.chunk,
        left,
        right,
        *(heads // t.shape[2] for t in given[:4]),
        heads // state_heads,
        reverse,
        normalize,
        out_y is not None,
        out_r is not None,
        cu_seqlens is not None,
        cut.per_row != 1,
        state_in is not None,
        0 if state_out is None else 2 if summary else 1,
        tile.stages,
    )
    launch(_sweep, (heads, cut.count, 1), tensors, numbers, constants, warps=tile.warps)


def states_before(
    x: Tensor,
    y: Tensor,
    tile: Tile,
    cut: Segments,
    *,
    heads: int,
    documents: int,
    initial: TaylorState | None,
    sweeps: str,
    **common: Any,
) -> TaylorState | None:
    """The state before each segment (in reverse: behind it); the initial one itself where nothing is cut."""
    if cut.fine is None:
        return initial
    P, V, reverse, cu_seqlens = n_features(x.shape[-1]), y.shape[-1], common.get("reverse", False), common["cu_seqlens"]
    added, out = empty_states(x, cut.fine.count, heads, P, V)
    common |= {"heads": heads, "state_heads": heads, "state_in": None, "state_out": out, "summary": True}
    if sweeps == "cuda":
        sums = {"share": None, "delta": None, "reverse": False} | common
        cuda.value_sweep(x, y, None, None, cut.fine, **sums)
    else:
        sweep(x, y, None, None, tile, cut.fine, **common)
    before, views = empty_states(x, cut.count, heads, P, V)
    block = 1024
    S, z = (added, added) if initial is None else (initial.S, initial.z)
    given = [t if t is not None else added for t in (cu_seqlens, cut.first)]
    numbers = (x.shape[1], cut.tokens, cut.per_row, heads, P * V + P, P * V, *S.stride()[:2], *z.stride()[:2])
    group = 1 if initial is None else heads // initial.S.shape[1]
    constants = (reverse, cu_seqlens is not None, initial is not None, group, block)
    grid = (-(-(P * V + P) // block), heads, documents)
    launch(_scan_segments, grid, [added, before, S, z, *given], numbers, constants, warps=4)
    return views


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o [B, T, Ho, V], the final S [N, H, P, V] and z [N, H, P] (of no rows when not asked for), share [B, Ho, T]."""
    B, T, F, V = *q.shape[:2], q.shape[3], v.shape[3]
    n_state = max(k.shape[2], v.shape[2])
    heads, P = max(q.shape[2], n_state), n_features(F)
    documents = B if cu_seqlens is None else cu_seqlens.numel() - 1
    o = v.new_empty(B, T, heads, V)
    rows = documents if return_state else 0
    S = q.new_empty(rows, n_state, P, V, dtype=torch.float32)
    z = q.new_empty(rows, n_state, P, dtype=torch.float32)
    share = q.new_empty(B, heads, T if normalize else 0, dtype=torch.float32)
    if T == 0:
        if S0 is None or z0 is None or not return_state:
            return o, S.zero_(), z.zero_(), share
        return o, S.copy_(S0), z.copy_(z0), share
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    initial = _sums(S0, z0)
    tile = tile or tile_for(F, V)
    cut = _cut(B, T, heads, tile, cu_seqlens, q.device, segments)
    common: dict[str, Any] = {"scale": scale, "normalize": normalize, "cu_seqlens": cu_seqlens}
    before = states_before(
        k, v, tile, cut, heads=n_state, documents=documents, initial=initial, sweeps=sweeps, **common
    )
    common |= {"heads": heads, "state_heads": n_state, "share": share if normalize else None, "delta": None}
    common |= {"state_in": before, "state_out": TaylorState(S, z) if return_state else None, "reverse": False}
    if sweeps == "cuda":
        cuda.value_sweep(k, v, q, o, cut, **common)
    else:
        sweep(k, v, q, None, tile, cut, out_y=o, **common)
    return o, S, z, share


def summarize(
    k: Tensor, v: Tensor, cu_seqlens: Tensor | None, sweeps: str = "triton", segments: int | None = None
) -> tuple[Tensor, Tensor]:
    """S [N, H, P, V] and z [N, H, P] of keys and values read from nothing: rows are split over the SMs and added up."""
    B, T, F, V = *k.shape[:2], k.shape[3], v.shape[3]
    heads, P = max(k.shape[2], v.shape[2]), n_features(F)
    documents = B if cu_seqlens is None else cu_seqlens.numel() - 1
    if T == 0:
        return k.new_zeros(documents, heads, P, V, dtype=torch.float32), k.new_zeros(
            documents, heads, P, dtype=torch.float32
        )
    k, v = _aligned(k), _aligned(v)
    tile = tile_for(F, V)
    cut = _cut(B, T, heads, tile, None, k.device, segments) if cu_seqlens is None else Segments(documents, T, 1)
    rows = cut if cut.fine is None else cut.fine
    buffer, out = empty_states(k, rows.count, heads, P, V)
    common: dict[str, Any] = {"heads": heads, "state_heads": heads, "scale": 1.0, "normalize": False}
    common |= {"cu_seqlens": cu_seqlens, "state_in": None, "state_out": out, "summary": True}
    if sweeps == "cuda":
        cuda.value_sweep(k, v, None, None, rows, share=None, delta=None, reverse=False, **common)
    else:
        sweep(k, v, None, None, tile, rows, **common)
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
    share: Tensor,
    scale: float,
    normalize: bool,
    S0: Tensor | None,
    z0: Tensor | None,
    cu_seqlens: Tensor | None,
    sweeps: str = "triton",
    tile: Tile | None = None,
    segments: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and the gradients of S0 and z0 (of no rows when there is none)."""
    B, T, F, V = *q.shape[:2], q.shape[3], v.shape[3]
    n_state = max(k.shape[2], v.shape[2])
    heads, P = max(q.shape[2], n_state), n_features(F)
    documents = B if cu_seqlens is None else cu_seqlens.numel() - 1
    rows = documents if S0 is not None else 0
    dS0 = q.new_empty(rows, heads, P, V, dtype=torch.float32)
    dz0 = q.new_empty(rows, heads, P, dtype=torch.float32)
    group = heads // n_state
    if T == 0:
        dS0, dz0 = dS0[:, :n_state].zero_(), dz0[:, :n_state].zero_()
        if S0 is not None and dS is not None:
            dS0.copy_(dS)
        if S0 is not None and dz is not None:
            dz0.copy_(dz)
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), dS0, dz0
    through_outputs = do is not None
    do = q.new_zeros(B, T, heads, V) if do is None else _aligned(do)
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    delta = None
    if normalize:
        delta = torch.empty_like(share)
        block = 64
        numbers = (B, heads, *do.stride()[:3], *o.stride()[:3], T)
        grid = (-(-T // block), heads, B)
        launch(_delta, grid, (do, o, delta), numbers, (V, max(16, block_of(V)), block), warps=4)
    seed = None
    if dS is not None or dz is not None:
        # The heads that share a State share its gradient: the first of them carries it.
        like = dS if dS is not None else dz
        assert like is not None
        seed = TaylorState(like.new_zeros(documents, heads, P, V), like.new_zeros(documents, heads, P))
        if dS is not None:
            seed.S[:, ::group] = dS
        if dz is not None:
            seed.z[:, ::group] = dz
    sums_dtype = torch.float32 if sweeps == "triton" else None
    grads = [_gradient(x, heads, sums_dtype) for x in (q, k, v)]
    common: dict[str, Any] = {"scale": scale, "normalize": normalize, "cu_seqlens": cu_seqlens}
    tile = tile or tile_for(F, V)
    cut = _cut(B, T, heads, tile, cu_seqlens, q.device, segments)
    sums: dict[str, Any] = {"share": share if normalize else None, "delta": delta, "heads": heads}
    if through_outputs:
        initial = _sums(S0, z0)
        before = states_before(
            k, v, tile, cut, heads=n_state, documents=documents, initial=initial, sweeps=sweeps, **common
        )
        reads = {"state_heads": n_state, "state_in": before, "state_out": None, "reverse": False} | sums | common
        if sweeps == "cuda":
            cuda.key_sweep(k, v, q, do, grads[0], cut, **reads)
        else:
            sweep(k, v, q, do, tile, cut, out_r=grads[0], **reads)
    else:
        grads[0].zero_()
    common |= {"reverse": True}
    behind = states_before(q, do, tile, cut, documents=documents, initial=seed, sweeps=sweeps, **common, **sums)
    common |= {"state_heads": heads, "state_in": behind, **sums}
    first = TaylorState(dS0, dz0) if S0 is not None else None
    if sweeps == "cuda":
        cuda.value_sweep(q, do, k, grads[2], cut, state_out=None, **common)
        cuda.key_sweep(q, do, k, v, grads[1], cut, state_out=first, **common)
    else:
        sweep(q, do, k, v, tile, cut, out_y=grads[2], out_r=grads[1], state_out=first, **common)
    dq, dk, dv = (_gathered(g, x) for g, x in zip(grads, (q, k, v), strict=True))
    if group > 1:
        dS0, dz0 = (x.unflatten(1, (n_state, group)).sum(2) for x in (dS0, dz0))
    return dq, dk, dv, dS0, dz0


def _cut(
    rows: int, tokens: int, heads: int, tile: Tile, cu_seqlens: Tensor | None, device: torch.device, n: int | None
) -> Segments:
    return cut_segments(
        rows, tokens, heads, tile.resident, tile.chunk, cu_seqlens, device, again=AGAIN, shortest=512, segments=n
    )


def _sums(S: Tensor | None, z: Tensor | None) -> TaylorState | None:
    return None if S is None or z is None else TaylorState(S.float().contiguous(), z.float().contiguous())


def _aligned(x: Tensor) -> Tensor:
    """``x`` itself, or a copy where its rows cannot be fetched in pieces of 16 bytes.

    An expanded gradient is such, and a view that begins off 16 bytes, which strides do not tell `refuses`.
    """
    outer = x.stride()[:3]
    fits = x.stride(3) == 1 and all(s % 8 == 0 for s in outer) and outer[1] > 0 and x.data_ptr() % 16 == 0
    return x if fits else x.contiguous()


def _gradient(x: Tensor, heads: int, dtype: torch.dtype | None) -> Tensor:
    """Where a sweep writes the gradient of x: in ``dtype`` a head where several heads share x's, to be summed then."""
    same = x.shape[2] == heads or dtype is None
    return torch.empty(*x.shape[:2], heads, x.shape[3], device=x.device, dtype=x.dtype if same else dtype)


def _gathered(gradient: Tensor, x: Tensor) -> Tensor:
    if gradient.shape[2] == x.shape[2]:
        return gradient
    return gradient.unflatten(2, (x.shape[2], -1)).sum(3, dtype=torch.float32).to(x.dtype)
