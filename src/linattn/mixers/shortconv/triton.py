"""Short convolution, backend "triton": what the operators of this folder run on a GPU, plain tensors in and out.

The kernels are in triton_conv.py; how a call is cut among programs is `Tile` and `segment_rows`. Never run as a script.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linattn.core.shapes import document_count
from linattn.core.tiles import block_of, launch, multiprocessors
from linattn.mixers.shortconv.triton_conv import _conv_backward, _conv_forward, _conv_step


@dataclass(frozen=True)
class Tile:
    """How one program is built: columns, rows at most, rows fetched together, warps."""

    columns: int
    rows: int
    fetched: int
    warps: int


FORWARD = (Tile(512, 64, 4, 4), Tile(1024, 64, 4, 4), Tile(512, 128, 8, 4), Tile(256, 64, 4, 2))
BACKWARD = (Tile(512, 128, 4, 4), Tile(256, 128, 4, 2), Tile(512, 128, 2, 4), Tile(256, 128, 4, 4))
"""The first is chosen. Four columns a thread: with two, the counting of rows would cost as much as the sums."""
STEP_COLUMNS = 1024
PROGRAMS_AN_SM = 4
"""Rows a program are halved, to 16, until there are so many."""
MANY_TAPS = 4
"""Above it a program has 128 columns, one a thread: the rows in registers are as many as the taps."""


def forward_tile(taps: int) -> Tile:
    """The forward's tile for so many taps."""
    return FORWARD[0] if taps <= MANY_TAPS else Tile(128, 64, 2, 4)


def backward_tile(taps: int) -> Tile:
    """The backward's."""
    return BACKWARD[0] if taps <= MANY_TAPS else Tile(128, 128, 1, 4)


def segment_rows(tile: Tile, rows: int, tokens: int, blocks: int, device: torch.device) -> int:
    """How many rows a program walks: the tile's, or fewer where that leaves multiprocessors idle."""
    wanted = PROGRAMS_AN_SM * (multiprocessors(device) if device.type == "cuda" else 1)
    size = tile.rows
    while size > 16 and rows * blocks * -(-tokens // size) < wanted:
        size //= 2
    return size


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    return_state: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """y [B, T, D] and the State's rows [N, w-1, D] after each document (of no documents when not asked for)."""
    B, T, D = x.shape
    W, documents = weight.shape[1], document_count(B, cu_seqlens)
    y = x.new_empty(B, T, D)
    final = x.new_empty(documents if return_state else 0, W - 1, D)
    if not D or not B:
        return y, final
    tile = tile or forward_tile(W)
    blocks, segments, rows, BD = _cut(tile, B, T, D, x.device)
    given = (x, weight, bias, gate, initial, cu_seqlens)
    tensors = [*(t if t is not None else x for t in given), y, final]
    numbers = (T, D, documents, blocks, segments, rows, *_strides(x, weight, bias, gate, initial))
    flags = (W, bias is not None, silu, gate is not None, initial is not None, return_state, _steps(cu_seqlens))
    launch(_conv_forward, (B * segments * blocks, 1, 1), tensors, numbers, (*flags, BD, tile.fetched), warps=tile.warps)
    return y, final


def backward(
    dy: Tensor | None,
    d_final: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, and the gradients of bias, gate and the initial State, each of no entries where that is absent."""
    B, T, D = x.shape
    W, documents = weight.shape[1], document_count(B, cu_seqlens)
    dx = x.new_empty(B, T, D)
    d_gate = x.new_empty(gate.shape if gate is not None else 0)
    d_initial = x.new_empty(documents if initial is not None else 0, W - 1, D)
    tile = tile or backward_tile(W)
    blocks, segments, rows, BD = _cut(tile, B, T, D, x.device)
    partial = x.new_empty(B * segments, W + 1, D, dtype=torch.float32)
    if D and B:
        # A zero that is read everywhere stands for the gradient of a y that nobody used.
        dy = x.new_zeros(()).expand(B, T, D) if dy is None else dy
        given = (x, weight, bias, gate, initial, cu_seqlens, dy, d_final)
        tensors = [*(t if t is not None else x for t in given), dx, d_gate, d_initial, partial]
        strides = (*_strides(x, weight, bias, gate, initial), *dy.stride())
        strides += d_final.stride() if d_final is not None else (0, 0, 0)
        numbers = (T, D, documents, blocks, segments, rows, *strides)
        flags = (W, bias is not None, silu, gate is not None, initial is not None, d_final is not None)
        constants = (*flags, _steps(cu_seqlens), BD, tile.fetched)
        launch(_conv_backward, (B * segments * blocks, 1, 1), tensors, numbers, constants, warps=tile.warps)
    sums = partial.sum(0)
    d_weight = weight.new_empty(weight.shape).copy_(sums[:W].t())
    d_bias = bias.new_empty(bias.shape).copy_(sums[W]) if bias is not None else x.new_empty(0)
    return dx, d_weight, d_bias, d_gate, d_initial


def step_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    pool: Tensor,
    count: Tensor,
    slots: Tensor,
    silu: bool,
) -> Tensor:
    """One token a row: y [B, D]; pool [slots + 1, w-1, D] and count [slots + 1] in place."""
    B, D = x.shape
    y = x.new_empty(B, D)
    if not D or not B:
        return y
    BD = min(STEP_COLUMNS, block_of(D))
    blocks = -(-D // BD)
    tensors = [x, weight, bias if bias is not None else x, gate if gate is not None else x, pool, count, slots, y]
    optional = (bias.stride(0) if bias is not None else 0, *(gate.stride() if gate is not None else (0, 0)))
    strides = (*x.stride(), *weight.stride(), *optional, *pool.stride(), count.stride(0), slots.stride(0))
    constants = (weight.shape[1], bias is not None, silu, gate is not None, BD)
    numbers = (D, blocks, count.shape[0] - 1, *strides)
    launch(_conv_step, (B * blocks, 1, 1), tensors, numbers, constants, warps=4)
    return y


def _cut(tile: Tile, B: int, T: int, D: int, device: torch.device) -> tuple[int, int, int, int]:
    """Blocks of columns, segments of rows, rows a segment, columns a block."""
    BD = min(tile.columns, block_of(D))
    blocks = max(1, -(-D // BD))
    rows = segment_rows(tile, B, T, blocks, device)
    return blocks, max(1, -(-T // rows)), rows, BD


def _strides(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, initial: Tensor | None
) -> tuple[int, ...]:
    of_gate = gate.stride() if gate is not None else (0, 0, 0)
    of_initial = initial.stride() if initial is not None else (0, 0, 0)
    return *x.stride(), *weight.stride(), bias.stride(0) if bias is not None else 0, *of_gate, *of_initial


def _steps(cu_seqlens: Tensor | None) -> int:
    """Steps of a bisection over the offsets; 0 where nothing is packed."""
    return 0 if cu_seqlens is None else (cu_seqlens.numel()).bit_length()
