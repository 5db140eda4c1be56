"""An experiment: lightning attention's forward as a chained scan in one pass, beside the two schedules that ship.

    python benchmarks/experiments/chained_scan.py        on a CUDA machine; prints a table, writes nothing

What it is for: the split schedule reads k and v twice. Here each program takes a ticket, in order, for one segment of
one head, finds what the segment adds, waits for the state its predecessor publishes, publishes its own and only then
computes its outputs, so that memory sees q, k, v and o once; k and v are read again from the L2 cache. States pass
through two slots a head, which stay in that cache. It is no backend: no documents, no groups, no gradient.

No program can hang: tickets are given in the order of the text, so the predecessor has always begun, and a wait gives
up after SPINS looks and is reported.
"""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linattn.core.numerics import relative_error
from linattn.core.tiles import launch, multiprocessors
from linattn.mixers.lightning import alibi_slopes, lightning_attention
from linattn.mixers.lightning.triton_sweep import _expm1, _operand

SHAPES = ((4, 32, 2048), (4, 32, 8192), (1, 32, 131072), (1, 16, 524288))
SEGMENTS = (128, 256, 512, 1024, 2048)
TILES = ((64, 128, 8, 3, 1), (64, 128, 8, 2, 1), (64, 64, 4, 3, 1), (64, 64, 4, 2, 2))
"""Chunk, value block, warps, stages, programs on an SM: the tile of the sweep that ships, and smaller ones."""
SPINS = 1_000_000
"""Looks at a flag before a wait gives up: about a second."""
BYTES_A_MS = 4.30e9
CHECKS = ((2, 3, 1024, 128, 0.01), (1, 2, 576, 128, 0.0), (1, 2, 4096, 128, 1e-4))
"""B, H, T, head dim, decay a token, against the float32 torch backend on the same 16-bit inputs."""


@triton.jit
def _chained(
    q,
    k,
    v,
    out,
    log_decay,
    states,
    published,
    counters,
    scale,
    rows,
    tokens,
    x_t,
    heads,
    chains,
    tickets,
    D: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
    SEGMENT: tl.constexpr,
    LIMIT: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Grid (programs that fit at once), each taking tickets (segment, chain); a chain is a (row, head, value block).

    q, k, v, out [rows, x_t] of 16 bits, rows being row and token; states [chains, 2, BV, D] fp32; published [chains]
    counts segments; counters: tickets given, waits given up.
    """
    q_rows = tl.make_tensor_descriptor(q, [rows, x_t], [x_t, 1], [C, D])
    k_rows = tl.make_tensor_descriptor(k, [rows, x_t], [x_t, 1], [C, D])
    v_rows = tl.make_tensor_descriptor(v, [rows, x_t], [x_t, 1], [C, BV])
    out_rows = tl.make_tensor_descriptor(out, [rows, x_t], [x_t, 1], [C, BV])
    dtype = v.dtype.element_ty
    i = tl.arange(0, C)
    at = tl.arange(0, BV)[:, None] * D + tl.arange(0, D)[None, :]
    distance = i[None, :] - i[:, None]
    blocks: tl.constexpr = D // BV

    ticket = tl.atomic_add(counters, 1, sem="relaxed")
    while ticket < tickets:
        chain = ticket % chains
        segment = ticket // chains
        h = (chain // blocks) % heads
        column = h * D
        v_column = column + (chain % blocks) * BV
        first = segment * SEGMENT
        length = tl.minimum(tokens - first, SEGMENT)
        chunks = length // C
        begin = (chain // blocks // heads) * tokens + first
        decay = tl.load(log_decay + h).to(tl.float32)
        log2_decay = decay * 1.4426950408889634
        chunk_less = _expm1(decay * C)
        to_end = tl.exp2(log2_decay * (C - 1 - i))[:, None]

        added = tl.zeros([BV, D], tl.float32)
        for step in tl.range(0, chunks, num_stages=NUM_STAGES):
            ks = k_rows.load([begin + step * C, column])
            vs = v_rows.load([begin + step * C, v_column])
            weighted = (ks.to(tl.float32) * to_end).to(dtype)
            added = tl.dot(tl.trans(vs), weighted, added + added * chunk_less)

        flag = published + chain
        slots = states + chain.to(tl.int64) * (2 * BV * D)
        state = tl.zeros([BV, D], tl.float32)
        if segment > 0:
            seen = tl.atomic_add(flag, 0, sem="acquire")
            looks = 0
            while (seen < segment) & (looks < LIMIT):
                seen = tl.atomic_add(flag, 0, sem="acquire")
                looks += 1
            if seen < segment:
                tl.atomic_add(counters + 1, 1, sem="relaxed")
            tl.debug_barrier()
            # Past the L1 cache, which may hold what this slot had two segments ago.
            state = tl.load(slots + ((segment - 1) % 2) * (BV * D) + at, cache_modifier=".cg")
        tl.store(slots + (segment % 2) * (BV * D) + at, state + state * _expm1(decay * length) + added)
        tl.debug_barrier()
        tl.atomic_xchg(flag, segment + 1, sem="release")

        within = tl.exp2(tl.where(distance >= 0, log2_decay * distance, -float("inf"))) * scale
        since = (tl.exp2(log2_decay * (i + 1)) * scale)[None, :]
        for step in tl.range(0, chunks, num_stages=NUM_STAGES):
            ks = k_rows.load([begin + step * C, column])
            vs = v_rows.load([begin + step * C, v_column])
            qs = q_rows.load([begin + step * C, column])
            p = tl.dot(ks, tl.trans(qs)) * within
            operand, unit = _operand(state, dtype)
            y = tl.dot(operand, tl.trans(qs)) * (since * unit)
            y = tl.dot(tl.trans(vs), p.to(dtype), y)
            out_rows.store([begin + step * C, v_column], tl.trans(y).to(out.dtype.element_ty))
            weighted = (ks.to(tl.float32) * to_end).to(dtype)
            state = tl.dot(tl.trans(vs), weighted, state + state * chunk_less)
        ticket = tl.atomic_add(counters, 1, sem="relaxed")


def chained_forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, segment: int, tile: tuple[int, int, int, int, int]
) -> tuple[Tensor, Tensor]:
    """o and int32 [2]: how many tickets were taken, how many waits gave up.

    q, k, v [B, T, H, D], contiguous; T and ``segment`` are multiples of the tile's chunk.
    """
    B, T, H, D = q.shape
    chunk, value, warps, stages, resident = tile
    assert T % chunk == 0 and segment % chunk == 0 and all(x.is_contiguous() for x in (q, k, v))
    out = torch.empty_like(v)
    chains = B * H * D // value
    tickets = chains * -(-T // segment)
    states = torch.empty(chains, 2, value, D, device=q.device, dtype=torch.float32)
    flags = torch.zeros(chains + 4, device=q.device, dtype=torch.int32)
    tensors = (q, k, v, out, log_decay, states, flags[4:], flags)
    numbers = (1.0, B * T, T, H * D, H, chains, tickets)
    slots = resident * multiprocessors(q.device) if q.is_cuda else 3
    launch(
        _chained, (min(tickets, slots), 1, 1), tensors, numbers, (D, chunk, value, segment, SPINS, stages), warps=warps
    )
    return out, flags[:2]


def draw(B: int, H: int, T: int, D: int, dtype: torch.dtype, device: str = "cuda") -> list[Tensor]:
    """q, k, v [B, T, H, D] from N(0, 1)."""
    generator = torch.Generator(device).manual_seed(T)
    return [torch.randn(B, T, H, D, device=device, generator=generator).to(dtype) for _ in range(3)]


def check(segment: int, tile: tuple[int, int, int, int, int]) -> str:
    """ "ok", or what is wrong, over CHECKS."""
    for B, H, T, D, decay in CHECKS:
        q, k, v = draw(B, H, T, D, torch.bfloat16)
        log_decay = -decay * torch.linspace(1, 0.5, H, device="cuda")
        o, counters = chained_forward(q, k, v, log_decay, segment, tile)
        want, _ = lightning_attention(q.float(), k.float(), v.float(), log_decay, return_state=False, backend="torch")
        error = relative_error(o, want, (0, 2))
        if int(counters[1]):
            return f"{int(counters[1])} waits gave up at T {T}"
        if not error < 1e-2:
            return f"error {error:.1e} at T {T}, decay {decay}"
    return "ok"


def main() -> None:
    """Check every tile and segment, then time those that are right beside what ships."""
    sound = []
    for tile in TILES:
        for segment in SEGMENTS:
            verdict = check(segment, tile)
            print(f"check tile {tile} segment {segment}: {verdict}", flush=True)
            if verdict == "ok":
                sound.append((tile, segment))
    for shape in SHAPES:
        for decay in ("ALiBi", "none"):
            compare(*shape, decay, sound)


def compare(B: int, H: int, T: int, decay: str, sound: list[tuple[tuple[int, int, int, int, int], int]]) -> None:
    """Time the shipped schedule and every sound (tile, segment) on one shape."""
    q, k, v = draw(B, H, T, 128, torch.bfloat16)
    log_decay = -alibi_slopes(H).to("cuda", torch.float32) * (decay == "ALiBi")
    case, floor = f"{B}x{H}x{T} decay {decay}", B * H * T * 1024 / BYTES_A_MS

    def shipped() -> Tensor:
        return lightning_attention(q, k, v, log_decay, return_state=False, backend="triton")[0]

    want = shipped()
    report(case, "shipped", shipped, floor, "")
    for tile, segment in sound:
        run = partial(chained_forward, q, k, v, log_decay, segment, tile)
        o, counters = run()
        note = f"error {relative_error(o, want, (0, 2)):.1e}"
        note += f", {int(counters[1])} waits gave up" * bool(counters[1])
        report(case, f"tile {tile} segment {segment}", run, floor, note)


def report(case: str, name: str, run: Callable[[], Any], floor: float, note: str) -> None:
    """Print a median by events beside the floor by bytes, in ms."""
    ms = triton.testing.do_bench(run, warmup=20, rep=80, return_mode="median")
    print(f"{case:30s} {name:40s} {ms:8.4f} ms {ms / floor:5.2f} x floor {note}", flush=True)


if __name__ == "__main__":
    main()
