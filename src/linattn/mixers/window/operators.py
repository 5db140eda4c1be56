"""Backend "triton" as torch sees it: operators with schemas, fakes and a gradient, and what it refuses.

Needs no triton: an operator's body imports triton.py on its first run, never in traced code. The State after the text
is a copy of rows: ordinary differentiable torch, outside the operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linattn.core.dispatch import Call, in_place
from linattn.core.tiles import machine_refusals
from linattn.mixers.window.chunked import WindowPool, WindowState, combine, summarize

MOST_ROWS = 60_000
"""Of documents or batch rows: a grid's third axis ends at 65,535."""
LARGEST_DIM = 128
"""Of keys and values: gradients of 64 x 128 keys and values, in fp32, are what four warps' registers hold."""


def refuses(call: Call) -> list[str]:
    """Why the Triton kernels cannot run this call; [] means they can."""
    wrong = machine_refusals(call)
    step = call.op.endswith("step_")
    if call.dtype not in (torch.bfloat16, torch.float16) and not (step and call.dtype == torch.float32):
        wrong.append(f"needs bfloat16 or float16 inputs, got {call.dtype}: the tensor cores would round it to TF32")
    for name in ("k", "v"):
        dim = call.shapes[name][-1]
        if not 1 <= dim <= LARGEST_DIM:
            wrong.append(f"needs head dims up to {LARGEST_DIM}, {name}'s is {dim}")
    rows = max(call.shapes["q"][0], call.shapes.get("cu_seqlens", (0,))[0])
    if rows > MOST_ROWS:
        wrong.append(f"needs at most {MOST_ROWS} rows or documents, got {rows}")
    for name in ("q", "k", "v"):
        stride = call.strides[name][-1]
        if stride != 1 and call.shapes[name][-1] != 1:
            wrong.append(f"needs {name} contiguous along its last axis, its stride there is {stride}")
    return wrong


@torch.library.custom_op("linattn::window_forward", mutates_args=())
def window_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state_k: Tensor | None,
    state_v: Tensor | None,
    count: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """y [B, T, Hq, V], and log2 of the sum of 2^(scaled scores), float32 [B, Hq, T]."""
    from linattn.mixers.window import triton

    return triton.forward(q, k, v, state_k, state_v, count, cu_seqlens, window, scale)


@window_forward.register_fake
def _(q, k, v, state_k, state_v, count, cu_seqlens, window, scale):
    B, T, heads = q.shape[:3]
    return q.new_empty(B, T, heads, v.shape[3]), q.new_empty(B, heads, T, dtype=torch.float32)


@torch.library.custom_op("linattn::window_backward", mutates_args=())
def window_backward(
    dy: Tensor,
    y: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state_k: Tensor | None,
    state_v: Tensor | None,
    count: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and the gradients of the State's keys and values (of no rows where there is no State)."""
    from linattn.mixers.window import triton

    return triton.backward(dy, y, lse, q, k, v, state_k, state_v, count, cu_seqlens, window, scale)


@window_backward.register_fake
def _(dy, y, lse, q, k, v, state_k, state_v, count, cu_seqlens, window, scale):
    states = [x.new_empty(0) if s is None else s.new_empty(s.shape) for s, x in ((state_k, k), (state_v, v))]
    return *(x.new_empty(x.shape) for x in (q, k, v)), *states


def _setup(ctx, inputs, output):
    *tensors, window, scale = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.window, ctx.scale = window, scale
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dlse):
    if dy is None:
        return (None,) * 9
    dq, dk, dv, *states = window_backward(dy, *ctx.saved_tensors, ctx.window, ctx.scale)
    given = [d if wanted else None for d, wanted in zip(states, ctx.needs_input_grad[3:5], strict=True)]
    return dq, dk, dv, *given, None, None, None, None


window_forward.register_autograd(_backward, setup_context=_setup)


def _step(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, tokens: Tensor, slots: Tensor, scale: float
) -> Tensor:
    """One token a row: y [B, Hq, V]; the rings [slots + 1, W, H, ...] and their counts are rewritten in place."""
    from linattn.mixers.window import triton

    return triton.step_(q, k, v, ring_k, ring_v, tokens, slots, scale)


window_step = torch.library.custom_op("linattn::window_step", mutates_args=("ring_k", "ring_v", "tokens"))(_step)


@window_step.register_fake
def _(q, k, v, ring_k, ring_v, tokens, slots, scale):
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    scale: float,
    initial_state: WindowState | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, WindowState | None]:
    """`window_attention` on checked arguments."""
    before = (None, None, None) if initial_state is None else tuple(initial_state)
    y, _ = window_forward(q, k, v, *before, cu_seqlens, window, scale)
    if not return_state:
        return y, None
    read = summarize(k, v, window, cu_seqlens)
    return y, read if initial_state is None else combine(initial_state, read)


def step_(q: Tensor, k: Tensor, v: Tensor, pool: WindowPool, slots: Tensor, *, scale: float) -> Tensor:
    """`window_step_` on checked arguments."""
    return in_place(window_step, _step, pool, q, k, v, *pool, slots, scale)
