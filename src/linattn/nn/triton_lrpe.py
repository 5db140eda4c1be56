"""LRPE in Triton: a program holds some tokens of one head, and makes their angles once for queries and keys."""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalSubscript=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# Kernels are Triton's language, not Python's types.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linattn.core.tiles import block_of, launch

WARPS, WIDEST = 8, 128
NUMBERS_FORWARD, NUMBERS_BACKWARD = 4096, 2048
"""16 and 8 numbers a thread, of each of the 2 and 6 tensors that are read.

More threads than features: then each loads the thetas of its own, else all cosines and sines go by shared memory.
"""
STEPS = 16
"""Blocks of tokens a backward program, which sums theta's gradient over them: what is left to sum is in float64."""


@triton.jit
def _part_of_turn(theta, inside):
    """Radians per token -> 2^64 times its part of a turn, in [-1/2, 1/2), and what `_cos_sin` multiplies by.

    That is pi / 2^32, or NaN where theta is not finite.
    """
    radians = tl.load(theta, mask=inside, other=0.0).to(tl.float64)
    turns = radians * 0.15915494309189535
    turns -= tl.floor(turns + 0.5)
    unit = (radians - radians + 7.314590396335798e-10).to(tl.float32)
    return (turns * 18446744073709551616.0).to(tl.int64)[None, :], unit[None, :]


@triton.jit
def _cos_sin(position, turn, unit):
    """Of int64 position * turn / 2^64 turns, to 3e-7: the product loses whole turns, and nothing else, when it wraps.

    Half a turn changes signs; at most pi / 2 radians remain. The polynomials are least-maximum fits of
    (sin(x) / x - 1) / x^2 and (cos(x) - 1) / x^2 in x^2, off by 5e-9 of a sine and 5e-8 of a cosine.
    """
    phase = ((position * turn) >> 32).to(tl.int32)
    odd = phase + 0x40000000 < 0
    x = (phase << 1).to(tl.float32) * unit
    z = x * x
    sin = x + x * z * (-0.16666657096 + z * (0.0083330172913 + z * (-0.00019806615185 + z * 2.6000547305e-06)))
    cos = 1 + z * (-0.49999932293 + z * (0.041663989453 + z * (-0.0013855927167 + z * 2.3194386067e-05)))
    return tl.where(odd, -cos, cos), tl.where(odd, -sin, sin)


@triton.jit
def _place(outer, block, inner, positions, p_o, p_i, ROWS: tl.constexpr):
    """Of a block's tokens, [ROWS, 1] each: where they are in ``inner`` and in all, their positions, and which exist."""
    within = block * ROWS + tl.arange(0, ROWS)
    exists = within < inner
    within = within.to(tl.int64)
    position = tl.load(positions + outer * p_o + within * p_i, mask=exists, other=0).to(tl.int64)
    return within[:, None], (outer * inner + within)[:, None], position[:, None], exists[:, None]


@triton.jit
def _lrpe_forward(
    q,
    k,
    theta,
    positions,
    q_out,
    k_out,
    blocks,
    inner,
    theta_h,
    theta_d,
    p_o,
    p_i,
    q_o,
    q_i,
    q_h,
    q_d,
    k_o,
    k_i,
    k_h,
    k_d,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (outer x blocks of ROWS tokens, heads, blocks of features). q, k by strides, what is written contiguous."""
    h = tl.program_id(1).to(tl.int64)
    d = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    turn, unit = _part_of_turn(theta + h * theta_h + d * theta_d, d < D)
    outer = (tl.program_id(0) // blocks).to(tl.int64)
    within, row, position, exists = _place(outer, tl.program_id(0) % blocks, inner, positions, p_o, p_i, ROWS)
    d = d[None, :]
    inside = exists & (d < D)
    wide_q = tl.load(q + outer * q_o + within * q_i + h * q_h + d * q_d, mask=inside, other=0.0).to(tl.float32)
    wide_k = tl.load(k + outer * k_o + within * k_i + h * k_h + d * k_d, mask=inside, other=0.0).to(tl.float32)
    cos, sin = _cos_sin(position, turn, unit)
    at = (row * H + h) * (2 * D) + d
    tl.store(q_out + at, (wide_q * cos).to(q_out.dtype.element_ty), mask=inside)
    tl.store(q_out + at + D, (wide_q * sin).to(q_out.dtype.element_ty), mask=inside)
    tl.store(k_out + at, (wide_k * cos).to(k_out.dtype.element_ty), mask=inside)
    tl.store(k_out + at + D, (wide_k * sin).to(k_out.dtype.element_ty), mask=inside)


@triton.jit
def _one_backward(dy, x, dx, dy_at, dy_d, x_at, at, D, cos, sin, inside, LEARN: tl.constexpr):
    """dx of one of q and k is stored; what its angles would have of gradient is returned."""
    of_cos = tl.load(dy + dy_at, mask=inside, other=0.0).to(tl.float32)
    of_sin = tl.load(dy + dy_at + D * dy_d, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + at, (of_cos * cos + of_sin * sin).to(dx.dtype.element_ty), mask=inside)
    turned = of_sin * cos - of_cos * sin
    if LEARN:
        turned *= tl.load(x + x_at, mask=inside, other=0.0).to(tl.float32)
    return turned


@triton.jit
def _lrpe_backward(
    dq,
    dk,
    q,
    k,
    theta,
    positions,
    q_grad,
    k_grad,
    partial,
    blocks,
    inner,
    theta_h,
    theta_d,
    p_o,
    p_i,
    dq_o,
    dq_i,
    dq_h,
    dq_d,
    dk_o,
    dk_i,
    dk_h,
    dk_d,
    q_o,
    q_i,
    q_h,
    q_d,
    k_o,
    k_i,
    k_h,
    k_d,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    LEARN: tl.constexpr,
):
    """Grid as `_lrpe_forward`, a program STEPS blocks of tokens; partial [programs, H, D] is theta's gradient of each.

    dx = dy_cos cos + dy_sin sin; dtheta = sum of p x (dy_sin cos - dy_cos sin) over tokens, of queries and keys.
    """
    h = tl.program_id(1).to(tl.int64)
    d = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    turn, unit = _part_of_turn(theta + h * theta_h + d * theta_d, d < D)
    d = d[None, :]
    outer = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * STEPS
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(STEPS):
        within, row, position, exists = _place(outer, first + step, inner, positions, p_o, p_i, ROWS)
        inside = exists & (d < D)
        cos, sin = _cos_sin(position, turn, unit)
        at = (row * H + h) * D + d
        dy_at = outer * dq_o + within * dq_i + h * dq_h + d * dq_d
        x_at = outer * q_o + within * q_i + h * q_h + d * q_d
        turned = _one_backward(dq, q, q_grad, dy_at, dq_d, x_at, at, D, cos, sin, inside, LEARN)
        dy_at = outer * dk_o + within * dk_i + h * dk_h + d * dk_d
        x_at = outer * k_o + within * k_i + h * k_h + d * k_d
        turned += _one_backward(dk, k, k_grad, dy_at, dk_d, x_at, at, D, cos, sin, inside, LEARN)
        sums += position.to(tl.float32) * turned
    if LEARN:
        columns = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        to = partial + (tl.program_id(0).to(tl.int64) * H + h) * D + columns
        tl.store(to, tl.sum(sums.to(tl.float64), 0), mask=columns < D)


def tile(dim: int, numbers: int) -> tuple[int, int]:
    """Rows and features a block of so many numbers."""
    block = min(WIDEST, block_of(dim))
    return numbers // block, block


def forward(q: Tensor, k: Tensor, theta: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Both [outer, inner, H, 2 D], contiguous, of q and k [outer, inner, H, D] of any strides."""
    outer, inner, H, D = q.shape
    encoded = q.new_empty(outer, inner, H, 2 * D), k.new_empty(outer, inner, H, 2 * D)
    if q.numel():
        rows, block = tile(D, NUMBERS_FORWARD)
        blocks = -(-inner // rows)
        grid = (outer * blocks, H, -(-D // block))
        numbers = (blocks, inner, *theta.stride(), *positions.stride(), *q.stride(), *k.stride())
        launch(_lrpe_forward, grid, (q, k, theta, positions, *encoded), numbers, (H, D, rows, block), warps=WARPS)
    return encoded


def backward(
    dq: Tensor, dk: Tensor, q: Tensor | None, k: Tensor | None, theta: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k, contiguous, and theta; the last is empty where q and k are None."""
    outer, inner, H, D = *dq.shape[:-1], dq.shape[-1] // 2
    rows, block = tile(D, NUMBERS_BACKWARD)
    blocks = -(-inner // (rows * STEPS))
    learn = q is not None
    gradients = dq.new_empty(outer, inner, H, D), dk.new_empty(outer, inner, H, D)
    partial = torch.empty(outer * blocks if learn else 0, H, D, dtype=torch.float64, device=theta.device)
    if dq.numel():
        xs = (q, k) if learn else gradients  # of which nothing is read
        grid = (outer * blocks, H, -(-D // block))
        numbers = (blocks, inner, *[n for x in (theta, positions, dq, dk, *xs) for n in x.stride()])
        tensors = (dq, dk, *xs, theta, positions, *gradients, partial)
        launch(_lrpe_backward, grid, tensors, numbers, (H, D, rows, block, STEPS, learn), warps=WARPS)
    return *gradients, partial.sum(0).to(theta.dtype) if learn else theta.new_empty(0)
