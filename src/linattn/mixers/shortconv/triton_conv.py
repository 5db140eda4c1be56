"""Short convolution in Triton: each program walks a stretch of rows of one block of columns, top to bottom.

The w-1 rows before the present one stay in registers, and so do the w-1 unfinished rows of dx in the backward, so that
every number is read once and written once; what a program reads beside its own rows are w-1 of each neighbour's.
"""

# pyright: reportAttributeAccessIssue=false
# It takes the triton.py beside this file for triton itself.
# ruff: noqa: RUF005
# Triton's tuples are joined by +.
from __future__ import annotations

import triton
import triton.language as tl

from linattn.core.triton_parts import slot_of


@triton.jit
def _first_document(cu_seqlens, documents, token, STEPS: tl.constexpr):
    """The document that holds ``token``, or the first of the empty ones that begin there. 2^STEPS > documents + 1."""
    under = tl.zeros((), tl.int32)
    for i in tl.static_range(STEPS):
        more = under + (1 << (STEPS - 1 - i))
        fits = more <= documents + 1
        offset = tl.load(cu_seqlens + more - 1, mask=fits, other=0)
        under = tl.where(fits & (offset < token), more, under)
    found = tl.load(cu_seqlens + tl.minimum(under, documents))
    n = tl.where(found == token, under, under - 1)
    return tl.minimum(tl.maximum(n, 0), documents - 1)


@triton.jit
def _bounds(cu_seqlens, n, tokens, PACKED: tl.constexpr):
    """First token of document n, and the one behind its last."""
    if PACKED:
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens + n).to(tl.int32), 0), tokens)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens + n + 1).to(tl.int32), start), tokens)
    else:
        start = tl.zeros((), tl.int32)
        end = tl.zeros((), tl.int32) + tokens
    return start, end


@triton.jit
def _next_document(cu_seqlens, n, stop, lo, hi, tokens, PACKED: tl.constexpr):
    """The next document that the rows lo to hi meet, or ``stop``; the last program takes the empty ones at the end."""
    if PACKED:
        start = tl.load(cu_seqlens + n + 1).to(tl.int32)
        return tl.where((start < hi) | (hi == tokens), n + 1, stop)
    else:  # noqa: RET505  what follows a constexpr branch would be compiled for both
        return stop


@triton.jit
def _rows_before(x, x_t, initial, initial_w, a, start, inside, W: tl.constexpr, INITIAL: tl.constexpr):
    """The w-1 rows before token a of a document that begins at ``start``, oldest first, in fp32."""
    past = ()
    for i in tl.static_range(W - 1):
        row = a - (W - 1) + i
        value = tl.load(x + row.to(tl.int64) * x_t, mask=inside & (row >= start), other=0.0).to(tl.float32)
        if INITIAL:
            of_state = initial + (row - start + (W - 1)) * initial_w
            value += tl.load(of_state, mask=inside & (row < start), other=0.0).to(tl.float32)
        past = past + (value,)
    return past


@triton.jit
def _stretch(blocks, segments, segment_rows, tokens, channels, BD: tl.constexpr):
    """This program's first row and the one behind its last, the batch row, its columns, and which of them exist."""
    pid = tl.program_id(0)
    lo = (pid // blocks) % segments * segment_rows
    hi = tl.minimum(lo + segment_rows, tokens)
    b = pid // (blocks * segments)
    d = pid % blocks * BD + tl.arange(0, BD)
    return lo, hi, b, d, d < channels


@triton.jit
def _taps(weight, weight_w, inside, W: tl.constexpr):
    taps = ()
    for i in tl.static_range(W):
        taps = taps + (tl.load(weight + i * weight_w, mask=inside, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _conv_forward(
    x,
    weight,
    bias,
    gate,
    initial,
    cu_seqlens,
    y,
    final,
    tokens,
    channels,
    documents,
    blocks,
    segments,
    segment_rows,
    x_n,
    x_t,
    x_d,
    weight_d,
    weight_w,
    bias_d,
    gate_n,
    gate_t,
    gate_d,
    initial_n,
    initial_w,
    initial_d,
    W: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    GATE: tl.constexpr,
    INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
    STEPS: tl.constexpr,
    BD: tl.constexpr,
    U: tl.constexpr,
):
    """Grid (blocks * segments * rows). y [B, T, D] and final [N, w-1, D] are contiguous; STEPS > 0 says packed.

    U rows are fetched together, so that enough bytes are under way.
    """
    lo, hi, b, d, inside = _stretch(blocks, segments, segment_rows, tokens, channels, BD)
    x_at = x + b.to(tl.int64) * x_n + d.to(tl.int64) * x_d
    gate_at = gate + b.to(tl.int64) * gate_n + d.to(tl.int64) * gate_d
    y_at = y + b.to(tl.int64) * tokens * channels + d
    taps = _taps(weight + d * weight_d, weight_w, inside, W)
    if BIAS:
        shift = tl.load(bias + d * bias_d, mask=inside, other=0.0).to(tl.float32)
    n = _first_document(cu_seqlens, documents, lo, STEPS) if STEPS > 0 else b
    stop = documents if STEPS > 0 else n + 1
    while n < stop:
        start, end = _bounds(cu_seqlens, n, tokens, STEPS > 0)
        t, until = tl.maximum(start, lo), tl.minimum(end, hi)
        initial_at = initial + n.to(tl.int64) * initial_n + d.to(tl.int64) * initial_d
        past = _rows_before(x_at, x_t, initial_at, initial_w, t, start, inside, W, INITIAL)
        if FINAL:
            final_at = final + n.to(tl.int64) * (W - 1) * channels + d
            # What a text shorter than the State leaves of the State before it.
            for i in tl.static_range(W - 1):
                kept = (i >= end - start) & (start >= lo)
                place = final_at + (i - (end - start)) * channels
                tl.store(place, past[i].to(final.dtype.element_ty), mask=inside & kept)
        for _ in range(0, until - t, U):
            xs = ()
            gates = ()
            for u in tl.static_range(U):
                live = inside & (t + u < until)
                row = (t + u).to(tl.int64)
                xs = xs + (tl.load(x_at + row * x_t, mask=live, other=0.0),)
                if GATE:
                    gates = gates + (tl.load(gate_at + row * gate_t, mask=live, other=0.0),)
            for u in tl.static_range(U):
                live = inside & (t + u < until)
                window = past + (xs[u].to(tl.float32),)
                s = taps[0] * window[0]
                for i in tl.static_range(1, W):
                    s += taps[i] * window[i]
                if BIAS:
                    s += shift
                if SILU:
                    s *= tl.sigmoid(s)
                if GATE:
                    s *= gates[u].to(tl.float32)
                tl.store(y_at + (t + u).to(tl.int64) * channels, s.to(y.dtype.element_ty), mask=live)
                if FINAL and W > 1:
                    of_state = t + u - end + (W - 1)
                    tl.store(final_at + of_state * channels, xs[u], mask=live & (of_state >= 0))
                past = window[1:]
            t += U
        n = _next_document(cu_seqlens, n, stop, lo, hi, tokens, STEPS > 0)


@triton.jit
def _conv_backward(
    x,
    weight,
    bias,
    gate,
    initial,
    cu_seqlens,
    dy,
    d_final,
    dx,
    d_gate,
    d_initial,
    partial,
    tokens,
    channels,
    documents,
    blocks,
    segments,
    segment_rows,
    x_n,
    x_t,
    x_d,
    weight_d,
    weight_w,
    bias_d,
    gate_n,
    gate_t,
    gate_d,
    initial_n,
    initial_w,
    initial_d,
    dy_n,
    dy_t,
    dy_d,
    d_final_n,
    d_final_w,
    d_final_d,
    W: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    GATE: tl.constexpr,
    INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
    STEPS: tl.constexpr,
    BD: tl.constexpr,
    U: tl.constexpr,
):
    """Grid as `_conv_forward`. dx, d_gate, d_initial and partial are contiguous.

    partial [programs of a column, w + 1, D]: sums of the taps' gradients over this program's rows, and the bias's.
    Row t of ds = dy gate act'(s) adds to dx of rows t-(w-1) to t; the first of these is then whole. So the walk goes
    w-1 rows past its own, and one that begins a document ends the rows before it too: the initial State's gradient.
    """
    lo, hi, b, d, inside = _stretch(blocks, segments, segment_rows, tokens, channels, BD)
    x_at = x + b.to(tl.int64) * x_n + d.to(tl.int64) * x_d
    gate_at = gate + b.to(tl.int64) * gate_n + d.to(tl.int64) * gate_d
    dy_at = dy + b.to(tl.int64) * dy_n + d.to(tl.int64) * dy_d
    out = b.to(tl.int64) * tokens * channels + d
    taps = _taps(weight + d * weight_d, weight_w, inside, W)
    shift = tl.zeros((BD,), tl.float32)
    if BIAS:
        shift = tl.load(bias + d * bias_d, mask=inside, other=0.0).to(tl.float32)
    zero = tl.zeros((BD,), tl.float32)
    d_shift = zero
    d_taps = ()
    for j in tl.static_range(W):  # noqa: B007  a name of its own: those of a while loop keep their type
        d_taps = d_taps + (zero,)
    n = _first_document(cu_seqlens, documents, lo, STEPS) if STEPS > 0 else b
    stop = documents if STEPS > 0 else n + 1
    while n < stop:
        start, end = _bounds(cu_seqlens, n, tokens, STEPS > 0)
        first, until = tl.maximum(start, lo), tl.minimum(end, hi)
        t = first
        initial_at = initial + n.to(tl.int64) * initial_n + d.to(tl.int64) * initial_d
        past = _rows_before(x_at, x_t, initial_at, initial_w, t, start, inside, W, INITIAL)
        unfinished = ()
        for i in tl.static_range(W - 1):  # noqa: B007
            unfinished = unfinished + (zero,)
        for _ in range(0, until - t + (W - 1), U):
            xs = ()
            dys = ()
            gates = ()
            for u in tl.static_range(U):
                live = inside & (t + u < end)
                row = (t + u).to(tl.int64)
                xs = xs + (tl.load(x_at + row * x_t, mask=live, other=0.0),)
                dys = dys + (tl.load(dy_at + row * dy_t, mask=live, other=0.0),)
                if GATE:
                    gates = gates + (tl.load(gate_at + row * gate_t, mask=live, other=0.0),)
            for u in tl.static_range(U):
                mine = t + u < until
                window = past + (xs[u].to(tl.float32),)
                ds = dys[u].to(tl.float32)
                if SILU or GATE:
                    s = shift + taps[0] * window[0]
                    for i in tl.static_range(1, W):
                        s += taps[i] * window[i]
                    slope = zero + 1.0
                    if SILU:
                        chance = tl.sigmoid(s)
                        slope = chance * (1 + s * (1 - chance))
                        s *= chance
                    if GATE:
                        place = d_gate + out + (t + u).to(tl.int64) * channels
                        tl.store(place, (ds * s).to(d_gate.dtype.element_ty), mask=inside & mine)
                        ds *= gates[u].to(tl.float32)
                    ds *= slope
                # Selected, not multiplied: a NaN stays where it is.
                ds = tl.where(t + u < end, ds, 0.0)
                own = tl.where(mine, ds, 0.0)
                d_shift += own
                sums = ()
                whole = unfinished + (zero,)
                done = ()
                for i in tl.static_range(W):
                    sums = sums + (d_taps[i] + own * window[i],)
                    done = done + (whole[i] + taps[i] * ds,)
                d_taps = sums
                unfinished = done[1:]
                past = window[1:]
                # Row t + u - (w-1) is whole now.
                row = t + u - (W - 1)
                value = done[0]
                wanted = inside & (row < until) & (row >= tl.where(start >= lo, start - (W - 1), first))
                if FINAL:
                    of_state = d_final + n.to(tl.int64) * d_final_n + d.to(tl.int64) * d_final_d
                    of_state += (t + u - end).to(tl.int64) * d_final_w
                    value += tl.load(of_state, mask=wanted & (t + u >= end), other=0.0).to(tl.float32)
                place = dx + out + row.to(tl.int64) * channels
                tl.store(place, value.to(dx.dtype.element_ty), mask=wanted & (row >= first))
                if INITIAL and W > 1:
                    place = d_initial + (n.to(tl.int64) * (W - 1) + (t + u - start)) * channels + d
                    tl.store(place, value.to(d_initial.dtype.element_ty), mask=wanted & (row < start))
            t += U
        n = _next_document(cu_seqlens, n, stop, lo, hi, tokens, STEPS > 0)
    partial += (tl.program_id(0) // blocks).to(tl.int64) * (W + 1) * channels + d
    for i in tl.static_range(W):
        tl.store(partial + i * channels, d_taps[i], mask=inside)
    tl.store(partial + W * channels, d_shift, mask=inside)


@triton.jit
def _conv_step(
    x,
    weight,
    bias,
    gate,
    pool,
    count,
    slots,
    y,
    channels,
    blocks,
    n_slots,
    x_n,
    x_d,
    weight_d,
    weight_w,
    bias_d,
    gate_n,
    gate_d,
    pool_n,
    pool_w,
    pool_d,
    count_n,
    slots_n,
    W: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    GATE: tl.constexpr,
    BD: tl.constexpr,
):
    """One token a row, grid (blocks * rows): the rows of a slot move up by one. An idle row's y is 0."""
    pid = tl.program_id(0)
    block = pid % blocks
    row = (pid // blocks).to(tl.int64)
    alive, slot = slot_of(slots, row * slots_n, n_slots)
    d = block * BD + tl.arange(0, BD)
    inside = d < channels
    live = inside & alive
    wide = d.to(tl.int64)
    token = tl.load(x + row * x_n + wide * x_d, mask=live, other=0.0)
    taps = _taps(weight + d * weight_d, weight_w, inside, W)
    pool_at = pool + slot * pool_n + wide * pool_d
    window = ()
    for i in tl.static_range(W - 1):
        window = window + (tl.load(pool_at + i * pool_w, mask=live, other=0.0),)
    window = window + (token.to(pool.dtype.element_ty),)
    s = tl.zeros((BD,), tl.float32)
    for i in tl.static_range(W):
        s += taps[i] * window[i].to(tl.float32)
    if BIAS:
        s += tl.load(bias + d * bias_d, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        s *= tl.sigmoid(s)
    if GATE:
        s *= tl.load(gate + row * gate_n + wide * gate_d, mask=live, other=0.0).to(tl.float32)
    tl.store(y + row * channels + d, tl.where(alive, s, 0.0).to(y.dtype.element_ty), mask=inside)
    for i in tl.static_range(W - 1):
        tl.store(pool_at + i * pool_w, window[i + 1], mask=live)
    if block == 0:
        at = count + slot * count_n
        tl.store(at, tl.minimum(tl.load(at) + 1, W - 1), mask=alive)
