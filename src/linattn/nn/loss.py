"""Cross-entropy from hidden states, so that the logits of a long batch need never exist at once.

At 65,536 tokens and 50,264 columns the float32 logits are 13 GB, and their gradient as much again. With ``chunk`` only
``chunk`` rows of them live at a time. This computes a loss; it does not know which tokens a model should predict.

    pytest tests/test_nn_loss.py
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from linattn.core.numerics import sum_dtype
from linattn.nn.embedding import cut_logits

IGNORED = -100
"""The target of a row that has no loss."""


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int | None = None,
    chunk: int | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Cross-entropy in nats of ``softmax(hidden @ weight^T)`` against targets.

    Args:
        hidden: [N, D].
        weight: [V, D], the head's, in hidden's dtype (any under autocast, which decides for both).
        targets: int64 [N]; -100 is ignored.
        vocab_size: columns from here on are padding and no part of the softmax; None is V.
        chunk: rows whose logits live at a time; None takes all N at once. With a chunk, "mean" and "sum" compute the
            gradients during forward (three matrix products in all, none repeated), "none" computes the logits a second
            time in backward, and neither has a second derivative.
        reduction: "mean" is over the targets that are not ignored; 0, with zero gradients, if all are.

    Returns:
        float32 (float64 if hidden is): a scalar, or [N] for "none", zero at ignored rows.
        Logits are a product in hidden's dtype; everything after it is float32 (float64).

    Raises:
        ValueError: a shape, dtype, chunk or reduction that does not fit; on the CPU and outside torch.compile, a target
            outside 0 to vocab_size - 1 other than -100.
    """
    vocab_size = int(weight.shape[0]) if vocab_size is None else vocab_size
    _check(hidden, weight, targets, vocab_size, chunk, reduction)
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        # Cast here, because backward runs outside autocast and would repeat the logits in another dtype.
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    rows = reduction == "none"
    if chunk is None:
        logits = cut_logits(F.linear(hidden, weight), vocab_size).to(sum_dtype(hidden.dtype))
        loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none" if rows else "sum")
    elif not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        loss, _ = _row_losses(hidden, weight, targets, vocab_size, chunk)
        loss = loss if rows else loss.sum()
    elif rows:
        loss = _ChunkedRows.apply(hidden, weight, targets, vocab_size, chunk)
    else:
        loss = _ChunkedSum.apply(hidden, weight, targets, vocab_size, chunk)
    if reduction == "mean":
        loss = loss / (targets != IGNORED).sum().clamp(min=1)
    return loss


class _ChunkedSum(torch.autograd.Function):
    """The sum of the losses. The gradient of a sum is one number times gradients that forward already knows."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk: int) -> Tensor:
        dtype = sum_dtype(hidden.dtype)
        d_hidden, d_weight = _gradient_buffers(ctx, hidden, weight)
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        for rows in _chunks(len(hidden), chunk):
            logits = _logits(hidden[rows], weight, vocab_size)
            loss, lse = _losses(logits, targets[rows])
            total = total + loss.sum()
            ones = torch.ones_like(loss)
            _add_gradients(logits, lse, targets[rows], ones, hidden[rows], weight, d_hidden, d_weight, rows)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if g is None else (g * grad).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return scaled[0], scaled[1], None, None, None


class _ChunkedRows(torch.autograd.Function):
    """One loss a row. The weight's gradient mixes the rows by the incoming gradient, so backward needs the logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk: int) -> Tensor:
        loss, lse = _row_losses(hidden, weight, targets, vocab_size, chunk)
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.sizes = vocab_size, chunk
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, lse = ctx.saved_tensors
        vocab_size, chunk = ctx.sizes
        d_hidden, d_weight = _gradient_buffers(ctx, hidden, weight)
        for rows in _chunks(len(hidden), chunk):
            logits = _logits(hidden[rows], weight, vocab_size)
            _add_gradients(logits, lse[rows], targets[rows], grad[rows], hidden[rows], weight, d_hidden, d_weight, rows)
        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype)
        return d_hidden, d_weight, None, None, None


def _chunks(n: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, n)) for start in range(0, n, chunk)]


def _logits(hidden: Tensor, weight: Tensor, vocab_size: int) -> Tensor:
    """New logits [C, V] in the dtype of sums, -inf in the padded columns."""
    logits = F.linear(hidden, weight).to(sum_dtype(hidden.dtype))
    if vocab_size < weight.shape[0]:
        logits[:, vocab_size:] = -math.inf
    return logits


def _losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The losses [C], zero where ignored, and the log of the softmax's denominator [C]."""
    lse = logits.logsumexp(-1)
    picked = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return torch.where(targets == IGNORED, 0.0, lse - picked), lse


def _row_losses(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk: int) -> tuple[Tensor, Tensor]:
    loss = torch.empty(len(hidden), dtype=sum_dtype(hidden.dtype), device=hidden.device)
    lse = torch.empty_like(loss)
    for rows in _chunks(len(hidden), chunk):
        loss[rows], lse[rows] = _losses(_logits(hidden[rows], weight, vocab_size), targets[rows])
    return loss, lse


def _gradient_buffers(ctx: Any, hidden: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Room for the gradients that are asked for; the weight's is a sum over chunks, so it is in the dtype of sums."""
    d_hidden = d_weight = None
    if ctx.needs_input_grad[0]:
        d_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    if ctx.needs_input_grad[1]:
        d_weight = torch.zeros(weight.shape, dtype=sum_dtype(weight.dtype), device=weight.device)
    return d_hidden, d_weight


def _add_gradients(
    logits: Tensor,
    lse: Tensor,
    targets: Tensor,
    row_grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    rows: slice,
) -> None:
    """Turn a chunk's logits into their gradient, (softmax - onehot) row_grad, in place, and carry it one product on."""
    picked = targets.clamp(min=0)[:, None]
    scores = logits.sub_(lse[:, None]).exp_()
    scores.scatter_(1, picked, scores.gather(1, picked) - 1)
    scores.mul_(torch.where(targets == IGNORED, 0.0, row_grad)[:, None])
    narrow = scores.to(hidden.dtype)
    if d_hidden is not None:
        d_hidden[rows] = narrow @ weight
    if d_weight is not None:
        d_weight += narrow.T @ hidden


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk: int | None, reduction: str) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [N, D] and [V, D]; flatten B and T"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets are {targets.dtype} {list(targets.shape)}; hidden needs torch.int64 [{hidden.shape[0]}]"
        )
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}; cast one, or run under autocast")
    if not 1 <= vocab_size <= weight.shape[0]:
        raise ValueError(f"vocab_size is {vocab_size}; it must be 1 to the weight's {weight.shape[0]} rows")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1 row, or None for all rows at once")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction {reduction!r} is not one of ['mean', 'sum', 'none']")
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = ((targets < 0) | (targets >= vocab_size)) & (targets != IGNORED)
        if wrong.any():
            raise ValueError(
                f"target {int(targets[wrong][0])} is outside 0 to {vocab_size - 1}; use {IGNORED} for no loss"
            )
