"""Short causal convolution, backend "torch": a sum of w shifted products, any device, ordinary differentiable torch.

On a CPU the tokens go through in blocks that stay in cache. Everything is computed in the sum dtype (fp32; float64 for
float64), whatever the inputs', and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linattn.core.numerics import sum_dtype
from linattn.core.pool import pool_rows
from linattn.core.tails import append_count, append_tail, last_count, last_rows

BLOCK_NUMBERS = 2**18
"""Numbers a block on a CPU: 1 MiB in fp32. At D 2048, T 4096, w 3 one thread takes 14 ms forward and 54 with backward;
22 and 89 in one block, 74 and 235 by F.conv1d."""


class ShortConvState(NamedTuple):
    """What a short convolution remembers: the last w-1 inputs, in their dtype, right-aligned, else zeros.

    x: [N, w-1, D].   count: int32 [N], how many rows are real: min(tokens, w-1).
    """

    x: Tensor
    count: Tensor


def identity(batch: int, taps: int, channels: int, like: Tensor) -> ShortConvState:
    """The State that has read nothing, with ``like``'s device and dtype."""
    count = torch.zeros(batch, dtype=torch.int32, device=like.device)
    return ShortConvState(like.new_zeros(batch, taps - 1, channels), count)


def combine(earlier: ShortConvState, later: ShortConvState) -> ShortConvState:
    """The State of both texts: ``earlier`` shifted out by what ``later`` has read."""
    x = append_tail(earlier.x, later.x, later.count)
    return ShortConvState(x, append_count(earlier.count, later.count, later.x.shape[later.count.ndim]))


def summarize(x: Tensor, taps: int, cu_seqlens: Tensor | None = None) -> ShortConvState:
    """The State of x [B, T, D] read from nothing."""
    return ShortConvState(last_rows(x, taps - 1, cu_seqlens), last_count(x, taps - 1, cu_seqlens))


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    gate: Tensor | None,
    activation: str | None,
    initial_state: ShortConvState | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, ShortConvState | None]:
    """`short_conv` on checked arguments."""
    taps = weight.shape[1]
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    before = identity(rows, taps, x.shape[2], x) if initial_state is None else initial_state
    before = before._replace(x=before.x.to(x.dtype))
    block = max(1, x.shape[1])
    if x.device.type == "cpu":
        block = max(1, BLOCK_NUMBERS // max(1, x.shape[0] * x.shape[2]))
    if cu_seqlens is None:
        gates = [None] * max(1, -(-x.shape[1] // block)) if gate is None else gate.split(block, 1)
        sums = _sums(before.x, x, weight, bias, block)
        y = torch.cat([_finish(s, activation, g, x.dtype) for s, g in zip(sums, gates, strict=True)], 1)
    else:
        laid_out, place = _lay_out(before.x, x, cu_seqlens)
        sums = _sums(laid_out[:, : taps - 1], laid_out[:, taps - 1 :], weight, bias, block)
        y = _finish(torch.cat(list(sums), 1).index_select(1, place), activation, gate, x.dtype)
    if not return_state:
        return y, None
    read = summarize(x, taps, cu_seqlens)
    return y, read if initial_state is None else combine(before, read)


def _sums(before: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, block: int) -> Iterator[Tensor]:
    """bias + sum_j weight_j x_{t-(w-1)+j} in the sum dtype, a block of tokens at a time; ``before`` [B, w-1, D]."""
    dtype = sum_dtype(x.dtype)
    # A tap's weights side by side: products with every third number take half as long again.
    columns = weight.to(dtype).t().contiguous().unbind(0)
    for piece in x.split(block, 1):
        tokens = piece.shape[1]
        seen = torch.cat([before, piece], 1)
        before = seen[:, tokens:]
        seen = seen.to(dtype)
        y = seen[:, :tokens] * columns[0]
        for j, column in enumerate(columns[1:], 1):
            y = torch.addcmul(y, seen[:, j : j + tokens], column)
        yield y if bias is None else y + bias.to(dtype)


def _finish(y: Tensor, activation: str | None, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The activation and the gate on sums, and the one rounding."""
    if activation == "silu":
        y = F.silu(y)
    return (y if gate is None else y * gate).to(dtype)


def _lay_out(before: Tensor, x: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Packed documents, each behind its own rows of ``before`` [N, w-1, D], in one row: [1, N (w-1) + T, D].

    And the place int64 [T] of each token's sum among the sums of that row.
    """
    past, offsets = before.shape[1], cu_seqlens.long()
    documents = offsets.numel() - 1
    starts = offsets + torch.arange(documents + 1, device=x.device) * past
    row = torch.arange(documents * past + x.shape[1], device=x.device)
    document = torch.searchsorted(starts[1:], row, right=True)
    inside = row - starts[document]
    of_state = document * past + inside
    of_token = documents * past + offsets[document] + inside - past
    source = torch.where(inside < past, of_state, of_token)
    laid_out = torch.cat([before.flatten(0, 1), x[0]]).index_select(0, source)[None]
    token = torch.arange(x.shape[1], device=x.device)
    return laid_out, token + torch.searchsorted(offsets[1:], token, right=True) * past


def step_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pool: ShortConvState,
    slots: Tensor,
    *,
    gate: Tensor | None,
    activation: str | None,
) -> Tensor:
    """One token a row: x [B, D], gate [B, D], slots int32 [B] -> y [B, D]; pool in place."""
    rows = pool_rows(pool.count, slots)
    dtype = sum_dtype(x.dtype)
    seen = torch.cat([pool.x.index_select(0, rows), x[:, None].to(pool.x.dtype)], 1)
    pool.x.index_copy_(0, rows, seen[:, 1:])
    pool.count.index_copy_(0, rows, (pool.count.index_select(0, rows) + 1).clamp(max=pool.x.shape[1]))
    y = (seen.to(dtype) * weight.to(dtype).t()).sum(1)
    return _finish(y if bias is None else y + bias.to(dtype), activation, gate, x.dtype)
