"""The one kernel of Taylor attention in Triton: a sweep over a document, its state in registers.

Rows that are read (the source: x [F], y [V]) add phi(x) y to the state S; rows that read (r [F], w [V]) take
phi(r) . S, or the gradient of phi(r) . S w in r. Sources come before their readers (forward), or after (reverse), a row
reading itself:

    y        forward, source (k, v), reader q
    dq       forward, source (k, v), reader (q, do)
    dk, dv   reverse, source (q, do / den), reader (k, v)

phi is never in memory. Its products are held as outer products of blocks of 8 dims, which a tile can broadcast; what
adds to the normaliser is Z, the sum of e x' x'^T with x' = (x, 1): z . phi(r) is a quadratic form in r. The order and
coefficients of the State in memory are those of chunked.features.
"""

# pyright: reportAttributeAccessIssue=false
# It takes the triton.py beside this file for triton itself.
# ruff: noqa: RUF005
# Triton joins tuples with +, and knows no star.
from __future__ import annotations

import triton
import triton.language as tl

from linattn.core.triton_parts import (
    adds_for_nobody,
    ends_document,
    of_no_document,
    operand,
    segment_tokens_of,
)


@triton.jit
def _left(x, row, stride, live, BLOCK: tl.constexpr):
    """Dims 8 BLOCK to 8 BLOCK + 7 of rows of x: [C, 8]."""
    i = 8 * BLOCK + tl.arange(0, 8)
    return tl.load(x + row[:, None] * stride + i[None, :], mask=live[:, None], other=0.0)


@triton.jit
def _right(x, row, stride, live, BLOCK: tl.constexpr):
    """The same eight times: [C, 8, 8].

    Loaded so, a thread holds eight in a row and the products are written 16 bytes at a time; with a broadcast of [C, 8]
    they would be written by twos.
    """
    j = 8 * BLOCK + tl.arange(0, 8)[None, None, :] + 0 * tl.arange(0, 8)[None, :, None]
    return tl.load(x + row[:, None, None] * stride + j, mask=live[:, None, None], other=0.0)


@triton.jit
def _products(left, right):
    """[C, 8] and [C, 8, 8] -> left_i right_j: [C, 64]."""
    return tl.reshape(left[:, :, None] * right, [left.shape[0], 64])


@triton.jit
def _linear(x, row, stride, live, F: tl.constexpr, X: tl.constexpr):
    """(x, 1, 0, ..) of rows of x, zeros in dead rows: [C, X]."""
    i = tl.arange(0, X)[None, :]
    tile = tl.load(x + row[:, None] * stride + i, mask=live[:, None] & (i < F), other=0.0)
    return tl.where((i == F) & live[:, None], 1.0, tile).to(x.dtype.element_ty)


@triton.jit
def _place(i, j, F: tl.constexpr):
    """Where x_i x_j stands in phi, and x_i x_j over that entry; i or j = F stands for the constant."""
    low = tl.minimum(i, j)
    high = tl.maximum(i, j)
    pair = 1 + F + low * F - low * (low - 1) // 2 + high - low
    index = tl.where(high < F, pair, tl.where(low < F, 1 + low, 0))
    return index, tl.where((i == j) & (high < F), 1.4142135623730951, 1.0)


@triton.jit
def _pairs(LEFT: tl.constexpr, RIGHT: tl.constexpr, F: tl.constexpr):
    """Of the columns of `_products` of two blocks: place and factor in phi, and which of two equal ones is stored."""
    column = tl.arange(0, 64)
    i = 8 * LEFT + column // 8
    j = 8 * RIGHT + column % 8
    index, factor = _place(i, j, F)
    return index, factor, i <= j


@triton.jit
def _load_state(S, index, held, factor, stride_p, stride_v, v, V: tl.constexpr):
    """Rows of a State in memory: [rows, BV]."""
    inside = held[:, None] & (v[None, :] < V)
    return tl.load(S + index[:, None] * stride_p + v[None, :] * stride_v, mask=inside, other=0.0) * factor[:, None]


@triton.jit
def _store_state(S, tile, index, held, factor, stride_p, stride_v, v, V: tl.constexpr):
    inside = held[:, None] & (v[None, :] < V)
    tl.store(S + index[:, None] * stride_p + v[None, :] * stride_v, tile / factor[:, None], mask=inside)


@triton.jit
def _spread(gradient, BLOCK: tl.constexpr, X: tl.constexpr):
    """The gradient of a block's dims, [C, 8], where they stand in [C, X]; zeros elsewhere."""
    C: tl.constexpr = gradient.shape[0]
    repeated = tl.reshape(tl.broadcast_to(gradient[:, None, :], [C, X // 8, 8]), [C, X])
    return tl.where((tl.arange(0, X) // 8 == BLOCK)[None, :], repeated, 0.0)


@triton.jit
def _load_products(
    S, factor_S, stride_p, stride_v, v, F: tl.constexpr, V: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr
):
    """The second order of a State in memory, a tile [64, BV] for each pair of blocks."""
    tiles = ()
    for n in tl.static_range(len(LEFT)):
        index, factor, _ = _pairs(LEFT[n], RIGHT[n], F)
        tiles = tiles + (_load_state(S, index, index >= 0, factor / factor_S, stride_p, stride_v, v, V),)
    return tiles


@triton.jit
def _store_products(
    S, tiles, factor_S, stride_p, stride_v, v, F: tl.constexpr, V: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr
):
    for n in tl.static_range(len(LEFT)):
        index, factor, stored = _pairs(LEFT[n], RIGHT[n], F)
        _store_state(S, tiles[n], index, stored, factor / factor_S, stride_p, stride_v, v, V)


@triton.jit
def _add_products(S, x, t, x_t, live, y, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """The second order S and what a chunk's rows add to it."""
    tiles = ()
    for n in tl.static_range(len(LEFT)):
        phi = _products(_left(x, t, x_t, live, LEFT[n]), _right(x, t, x_t, live, RIGHT[n]))
        tiles = tiles + (tl.dot(tl.trans(phi), y, S[n]),)
    return tiles


@triton.jit
def _read_products(o, S, r, t, r_t, live, scale, dtype: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """o [C, BV] and what rows of r read of the second order S."""
    for n in tl.static_range(len(LEFT)):
        left = _left(r, t, r_t, live, LEFT[n]).to(tl.float32)
        left *= scale * scale * (0.5 if LEFT[n] == RIGHT[n] else 1.0)
        rounded, unit = operand(S[n], dtype)
        o += tl.dot(_products(left.to(dtype), _right(r, t, r_t, live, RIGHT[n])), rounded) * unit
    return o


@triton.jit
def _products_gradient(
    dr, S, w, r, t, r_t, live, scale, X: tl.constexpr, dtype: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr
):
    """dr [C, X] and what w has in it through the second order S that rows of r read."""
    C: tl.constexpr = w.shape[0]
    for n in tl.static_range(len(LEFT)):
        rounded, unit = operand(S[n], dtype)
        g = tl.reshape(tl.dot(w, tl.trans(rounded)), [C, 8, 8])
        g *= unit * scale * scale * (0.5 if LEFT[n] == RIGHT[n] else 1.0)
        left = _left(r, t, r_t, live, LEFT[n]).to(tl.float32)
        right = _left(r, t, r_t, live, RIGHT[n]).to(tl.float32)
        dr += _spread(tl.sum(g * right[:, None, :], 2), LEFT[n], X)
        dr += _spread(tl.sum(g * left[:, :, None], 1), RIGHT[n], X)
    return dr


@triton.jit
def _divisor(p, scaled, Z, count, dtype: tl.constexpr):
    """What divides a chunk's outputs: its own weights p, and half of Z's form in (scale r, 1) and of the count.

    Z as what 16 bits hold of it and the rest: after few tokens a divisor is small beside its terms.
    """
    rounded, unit = operand(Z, dtype)
    rest = (Z * (1 / unit) - rounded.to(tl.float32)).to(dtype)
    form = tl.dot(scaled, rest, tl.dot(scaled, rounded)) * unit * scaled.to(tl.float32)
    return tl.sum(p, 1) + 0.5 * (tl.sum(form, 1) + count)


@triton.jit
def _sweep(
    x,
    y,
    r,
    w,
    out_y,
    out_r,
    share,
    delta,
    S_in,
    z_in,
    S_out,
    z_out,
    cu_seqlens,
    segment_document,
    segment_start,
    scale,
    tokens,
    segment_tokens,
    per_row,
    part,
    x_n,
    x_t,
    x_h,
    y_n,
    y_t,
    y_h,
    r_n,
    r_t,
    r_h,
    w_n,
    w_t,
    w_h,
    oy_n,
    oy_t,
    oy_h,
    or_n,
    or_t,
    or_h,
    share_n,
    share_h,
    in_n,
    in_h,
    in_p,
    in_v,
    zin_n,
    zin_h,
    out_n,
    out_h,
    out_p,
    out_v,
    zout_n,
    zout_h,
    F: tl.constexpr,
    X: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    X_GROUP: tl.constexpr,
    Y_GROUP: tl.constexpr,
    R_GROUP: tl.constexpr,
    W_GROUP: tl.constexpr,
    STATE_GROUP: tl.constexpr,
    REVERSE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    VALUES: tl.constexpr,
    KEYS: tl.constexpr,
    PACKED: tl.constexpr,
    SPLIT: tl.constexpr,
    INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Grid (heads, segments). FINAL: 0 nothing, 1 the state after each document, 2 what each segment adds.

    part: as `adds_for_nobody` takes it; what nobody reads is not written.
    """
    h = tl.program_id(0)
    segment = tl.program_id(1).to(tl.int64)
    document, row, begin, length, first, last, chunks = segment_tokens_of(
        segment, cu_seqlens, segment_document, segment_start, tokens, segment_tokens, per_row, C, PACKED, SPLIT
    )
    if PACKED and SPLIT:  # noqa: SIM102  what is known at compile time stands apart
        if of_no_document(first, length):
            return
    if SPLIT and FINAL == 2:  # noqa: SIM102
        if adds_for_nobody(first, length, segment_tokens, part, REVERSE):
            return

    x += row * x_n + begin * x_t + (h // X_GROUP).to(tl.int64) * x_h
    y += row * y_n + begin * y_t + (h // Y_GROUP).to(tl.int64) * y_h
    r += row * r_n + begin * r_t + (h // R_GROUP).to(tl.int64) * r_h
    w += row * w_n + begin * w_t + (h // W_GROUP).to(tl.int64) * w_h
    out_y += row * oy_n + begin * oy_t + h.to(tl.int64) * oy_h
    out_r += row * or_n + begin * or_t + h.to(tl.int64) * or_h
    share += row * share_n + begin + h.to(tl.int64) * share_h
    delta += row * share_n + begin + h.to(tl.int64) * share_h

    i = tl.arange(0, C)
    v = tl.arange(0, BV)
    column = tl.arange(0, X)
    dtype = y.dtype.element_ty
    x_index = tl.where(column < F, 1 + column, 0)
    x_held = column <= F
    x_scale = tl.where(column < F, scale, 1.0)
    z_index, z_factor = _place(column[:, None], column[None, :], F)
    # In reverse the state is of phi(scale q), but the sums are of phi(q): scale is put on the reader.
    S_factor = scale * scale if REVERSE else 1.0
    if REVERSE:
        z_factor /= x_scale[:, None] * x_scale[None, :]
        x_factor = 1 / x_scale
    else:
        x_factor = tl.where(x_held, 1.0, 1.0)
    z_held = x_held[:, None] & x_held[None, :]

    state_head = (h // STATE_GROUP).to(tl.int64)
    Sx = tl.zeros([X, BV], tl.float32)
    Z = tl.zeros([X, X], tl.float32)
    count = 0.0
    S = ()
    for _ in tl.static_range(len(LEFT)):
        S = S + (tl.zeros([64, BV], tl.float32),)
    if INITIAL:
        S_in += segment * in_n + state_head * in_h
        z_in += segment * zin_n + state_head * zin_h
        Sx = _load_state(S_in, x_index, x_held, x_factor, in_p, in_v, v, V)
        Z = tl.load(z_in + z_index, mask=z_held, other=0.0) * z_factor
        count = tl.load(z_in)
        S = _load_products(S_in, S_factor, in_p, in_v, v, F, V, LEFT, RIGHT)

    for step in tl.range(0, chunks, num_stages=NUM_STAGES):
        t0 = first + (chunks - 1 - step if REVERSE else step) * C
        t = t0 + i
        live = t < last
        xs = _linear(x, t, x_t, live, F, X)
        ys = tl.load(y + t[:, None] * y_t + v[None, :], mask=live[:, None] & (v < V)[None, :], other=0.0)
        if REVERSE and NORMALIZE:
            weight = tl.load(share + t, mask=live, other=0.0)
            e = tl.load(delta + t, mask=live, other=0.0) * weight
            ys = (ys.to(tl.float32) * weight[:, None]).to(dtype)
        if VALUES or KEYS:
            rs = _linear(r, t, r_t, live, F, X)
            scaled = (rs.to(tl.float32) * x_scale[None, :]).to(dtype)
            reads = (i[None, :] >= i[:, None]) & live[None, :] if REVERSE else i[None, :] <= i[:, None]
            u = tl.where(reads, tl.dot(rs, tl.trans(xs)) * scale + (1 - scale), 0.0)
        if VALUES:
            p = tl.where(reads, 0.5 * u * u + 0.5, 0.0)
            o = tl.dot(p.to(dtype), ys)
            rounded, unit = operand(Sx, dtype)
            o += tl.dot(scaled, rounded) * unit
            o = _read_products(o, S, r, t, r_t, live, scale, dtype, LEFT, RIGHT)
            if NORMALIZE and not REVERSE:
                total = _divisor(p, scaled, Z, count, dtype)
                count += tl.minimum(C, last - t0).to(tl.float32)
                o = o * (1 / total)[:, None]
                tl.store(share + t, 1 / total, mask=live)
            where = live[:, None] & (v < V)[None, :]
            tl.store(out_y + t[:, None] * oy_t + v[None, :], o.to(out_y.dtype.element_ty), mask=where)
        if KEYS:
            ws = tl.load(w + t[:, None] * w_t + v[None, :], mask=live[:, None] & (v < V)[None, :], other=0.0)
            dp = tl.dot(ws, tl.trans(ys))
            if NORMALIZE:
                if REVERSE:
                    dp += e[None, :]
                else:
                    d = tl.load(delta + t, mask=live, other=0.0)
                    dp += d[:, None]
            dr = tl.dot((dp * u).to(dtype), xs) * scale
            rounded, unit = operand(Sx, dtype)
            dx = tl.dot(ws, tl.trans(rounded)) * unit
            if NORMALIZE or (REVERSE and INITIAL):
                rounded, unit = operand(Z, dtype)
                dz = tl.dot(scaled, rounded) * unit
                dx += dz if REVERSE else d[:, None] * dz
            dr += dx * scale
            dr = _products_gradient(dr, S, ws, r, t, r_t, live, scale, X, dtype, LEFT, RIGHT)
            if NORMALIZE and not REVERSE:
                dr = dr * tl.load(share + t, mask=live, other=0.0)[:, None]
            where = live[:, None] & (column < F)[None, :]
            tl.store(out_r + t[:, None] * or_t + column[None, :], dr.to(out_r.dtype.element_ty), mask=where)
        if REVERSE:
            if NORMALIZE:
                Z = tl.dot(tl.trans((xs.to(tl.float32) * e[:, None]).to(dtype)), xs, Z)
        elif NORMALIZE or FINAL != 0:
            Z = tl.dot(tl.trans(xs), xs, Z)
        Sx = tl.dot(tl.trans(xs), ys, Sx)
        S = _add_products(S, x, t, x_t, live, ys, LEFT, RIGHT)

    if FINAL != 0:
        slot = segment
        ends = True
        if FINAL == 1:
            slot = document
            ends = ends_document(first, last, length, chunks, REVERSE)
        if ends & (h % STATE_GROUP == 0):
            S_out += slot * out_n + state_head * out_h
            z_out += slot * zout_n + state_head * zout_h
            _store_state(S_out, Sx, x_index, x_held, x_factor, out_p, out_v, v, V)
            tl.store(z_out + z_index, Z / z_factor, mask=z_held & (column[:, None] <= column[None, :]))
            _store_products(S_out, S, S_factor, out_p, out_v, v, F, V, LEFT, RIGHT)


@triton.jit
def _delta(
    gradient,
    out,
    delta,
    rows,
    heads,
    g_n,
    g_t,
    g_h,
    o_n,
    o_t,
    o_h,
    tokens,
    V: tl.constexpr,
    BV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """-(do . o), [rows, heads, tokens]. Grid (blocks of tokens, heads, rows)."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h = tl.program_id(1).to(tl.int64)
    n = tl.program_id(2).to(tl.int64)
    v = tl.arange(0, BV)
    inside = (t < tokens)[:, None] & (v < V)[None, :]
    g = tl.load(gradient + n * g_n + h * g_h + t[:, None].to(tl.int64) * g_t + v[None, :], mask=inside, other=0.0)
    o = tl.load(out + n * o_n + h * o_h + t[:, None].to(tl.int64) * o_t + v[None, :], mask=inside, other=0.0)
    total = -tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + (n * heads + h) * tokens + t, total, mask=t < tokens)
