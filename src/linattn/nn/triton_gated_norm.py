"""The norm without parameters times a gate in Triton: a program holds whole rows and reads each number once."""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalSubscript=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# Kernels are Triton's language, not Python's types.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linattn.core.tiles import block_of, launch

NUMBERS_A_PROGRAM, NUMBERS_A_WARP = 2048, 512
"""16 numbers a thread: 32 bytes of each 16-bit tensor under way."""
MOST_WARPS = 16


@triton.jit
def _place(pid, rows, inner, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Row over ``inner`` and within it, the columns, and which of them exist, for [outer, inner, D] tensors."""
    row = pid.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (d < columns)[None, :]
    return (row // inner)[:, None], (row % inner)[:, None], row[:, None], d[None, :], inside


@triton.jit
def _norm_forward(
    x,
    gate,
    y,
    eps,
    rows,
    inner,
    x_o,
    x_i,
    x_d,
    gate_o,
    gate_i,
    gate_d,
    D: tl.constexpr,
    SIGMOID: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (blocks of ROWS rows). x and gate are [rows / inner, inner, D] by strides, y is contiguous."""
    outer, within, row, d, inside = _place(tl.program_id(0), rows, inner, D, ROWS, BLOCK)
    wide = tl.load(x + outer * x_o + within * x_i + d * x_d, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + outer * gate_o + within * gate_i + d * gate_d, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / D + eps)[:, None]
    if SIGMOID:
        g = tl.sigmoid(g)
    tl.store(y + row * D + d, (wide * scale * g).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward(
    dy,
    x,
    gate,
    dx,
    d_gate,
    eps,
    rows,
    inner,
    dy_o,
    dy_i,
    dy_d,
    x_o,
    x_i,
    x_d,
    gate_o,
    gate_i,
    gate_d,
    D: tl.constexpr,
    SIGMOID: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid as `_norm_forward`. With n = x r, r = 1 / rms: dx = r (dn - n mean(dn n)), dn = dy act(gate)."""
    outer, within, row, d, inside = _place(tl.program_id(0), rows, inner, D, ROWS, BLOCK)
    wide = tl.load(x + outer * x_o + within * x_i + d * x_d, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + outer * gate_o + within * gate_i + d * gate_d, mask=inside, other=0.0).to(tl.float32)
    dn = tl.load(dy + outer * dy_o + within * dy_i + d * dy_d, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / D + eps)[:, None]
    normed = wide * scale
    dg = dn * normed
    if SIGMOID:
        g = tl.sigmoid(g)
        dg *= g * (1 - g)
    dn *= g
    tl.store(d_gate + row * D + d, dg.to(d_gate.dtype.element_ty), mask=inside)
    along = (tl.sum(dn * normed, 1) / D)[:, None]
    tl.store(dx + row * D + d, (scale * (dn - normed * along)).to(dx.dtype.element_ty), mask=inside)


def tile(dim: int) -> tuple[int, int, int]:
    """Rows a program, the power of two that holds a row, warps."""
    block = block_of(dim)
    rows = max(1, NUMBERS_A_PROGRAM // block)
    return rows, block, min(MOST_WARPS, max(1, rows * block // NUMBERS_A_WARP))


def forward(x: Tensor, gate: Tensor, eps: float, sigmoid: bool) -> Tensor:
    """y [outer, inner, D], contiguous, of x and gate of any strides."""
    y = x.new_empty(x.shape)
    if x.numel():
        numbers = (eps, x.shape[0] * x.shape[1], x.shape[1], *x.stride(), *gate.stride())
        _launch(_norm_forward, (x, gate, y), numbers, x.shape, sigmoid)
    return y


def backward(dy: Tensor, x: Tensor, gate: Tensor, eps: float, sigmoid: bool) -> tuple[Tensor, Tensor]:
    """The gradients of x and gate, contiguous."""
    dx, d_gate = x.new_empty(x.shape), gate.new_empty(gate.shape)
    if x.numel():
        numbers = (eps, x.shape[0] * x.shape[1], x.shape[1], *dy.stride(), *x.stride(), *gate.stride())
        _launch(_norm_backward, (dy, x, gate, dx, d_gate), numbers, x.shape, sigmoid)
    return dx, d_gate


def _launch(kernel, tensors: tuple[Tensor, ...], numbers: tuple[float, ...], shape: torch.Size, sigmoid: bool) -> None:
    rows, block, warps = tile(shape[2])
    grid = (-(-shape[0] * shape[1] // rows), 1, 1)
    launch(kernel, grid, tensors, numbers, (shape[2], sigmoid, rows, block), warps=warps)
