"""Backend "triton" as torch sees it: operators with schemas, fakes and a gradient, and what it refuses.

Needs no triton: an operator's body imports triton.py on its first run, never in traced code.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linattn.core.dispatch import Call, in_place, plain
from linattn.core.shapes import document_count
from linattn.core.tiles import layout_refusals, machine_refusals, wants_grad
from linattn.mixers.lightning.chunked import LightningState

MOST_ROWS = 60_000
"""Of documents or batch rows: a grid's third axis ends at 65,535."""
LARGEST_DIM = 256
"""Of keys and values: a state of 256 x 64 in fp32 is what one program's registers hold."""


def refuses(call: Call) -> list[str]:
    """Why the Triton kernels cannot run this call; [] means they can."""
    wrong = machine_refusals(call)
    step = call.op.endswith("step_")
    if call.dtype not in (torch.bfloat16, torch.float16) and not (step and call.dtype == torch.float32):
        wrong.append(f"needs bfloat16 or float16 inputs, got {call.dtype}: the tensor cores would round it to TF32")
    for name in ("k", "v"):
        dim = call.shapes[name][-1]
        if dim % 8 or not 8 <= dim <= LARGEST_DIM:
            wrong.append(f"needs head dims that are multiples of 8 up to {LARGEST_DIM}, {name}'s is {dim}")
    rows = max(call.shapes["q"][0], call.shapes.get("cu_seqlens", (0,))[0])
    if rows > MOST_ROWS:
        wrong.append(f"needs at most {MOST_ROWS} rows or documents, got {rows}")
    if step:
        inner = [n for n in ("q", "k", "v") if call.strides[n][-1] != 1]
        wrong += [f"needs {n} contiguous along its last axis" for n in inner]
    else:
        wrong += layout_refusals(call, ("q", "k", "v"))
    return wrong


@functools.cache
def _kernels() -> Any:
    from linattn.mixers.lightning import triton

    return triton


@torch.library.custom_op("linattn::lightning_forward", mutates_args=())
def lightning_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    """o [B, T, Ho, V] and the final S [N, H, K, V], of no rows unless asked for."""
    o, S = _kernels().forward(q, k, v, log_decay, scale, initial, cu_seqlens, return_state)
    return o, q.new_empty(0, log_decay.shape[0], q.shape[3], v.shape[3], dtype=torch.float32) if S is None else S


@lightning_forward.register_fake
def _(q, k, v, log_decay, scale, initial, cu_seqlens, return_state):
    heads, n_state = max(q.shape[2], log_decay.shape[0]), log_decay.shape[0]
    rows = document_count(q.shape[0], cu_seqlens) if return_state else 0
    o = q.new_empty(q.shape[0], q.shape[1], heads, v.shape[3])
    return o, q.new_empty(rows, n_state, q.shape[3], v.shape[3], dtype=torch.float32)


@torch.library.custom_op("linattn::lightning_backward", mutates_args=())
def lightning_backward(
    do: Tensor | None,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    decay_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dlog_decay (of no entries unless asked for), and the initial S's gradient (likewise)."""
    dq, dk, dv, d_decay, d_initial = _kernels().backward(
        do, d_final, q, k, v, log_decay, scale, initial, cu_seqlens, decay_gradient
    )
    if d_decay is None:
        d_decay = log_decay.new_empty(0)
    if d_initial is None:
        d_initial = q.new_empty(0, log_decay.shape[0], q.shape[3], v.shape[3], dtype=torch.float32)
    return dq, dk, dv, d_decay, d_initial


@lightning_backward.register_fake
def _(do, d_final, q, k, v, log_decay, scale, initial, cu_seqlens, decay_gradient):
    grads = [x.new_empty(x.shape) for x in (q, k, v)]
    rows = 0 if initial is None else initial.shape[0]
    d_initial = q.new_empty(rows, log_decay.shape[0], q.shape[3], v.shape[3], dtype=torch.float32)
    return *grads, log_decay.new_empty(log_decay.shape[0] if decay_gradient else 0), d_initial


def _setup(ctx, inputs, output):
    *tensors, scale, initial, cu_seqlens, _ = inputs
    ctx.save_for_backward(*tensors, initial, cu_seqlens)
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _backward(ctx, do, d_final):
    q, k, v, log_decay, initial, cu_seqlens = ctx.saved_tensors
    if d_final is not None and not d_final.shape[0]:
        d_final = None
    wanted = ctx.needs_input_grad
    dq, dk, dv, d_decay, d_initial = lightning_backward(
        do, d_final, q, k, v, log_decay, ctx.scale, initial, cu_seqlens, wanted[3]
    )
    return dq, dk, dv, d_decay if wanted[3] else None, None, None if initial is None else d_initial, None, None


lightning_forward.register_autograd(_backward, setup_context=_setup)


class _Eager(torch.autograd.Function):
    """What the operators do, without torch's dispatcher: its layers took more of the host's time than the launches."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        _setup(ctx, inputs, None)
        return _kernels().forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, d_final: Tensor | None) -> Any:
        q, k, v, log_decay, initial, cu_seqlens = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3]
        dq, dk, dv, d_decay, d_initial = _kernels().backward(
            do, d_final, q, k, v, log_decay, ctx.scale, initial, cu_seqlens, wanted
        )
        return dq, dk, dv, d_decay, None, d_initial, None, None


def _step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, S: Tensor, carried: Tensor, slots: Tensor, scale: float
) -> Tensor:
    """One token a row: o [B, Ho, V]; S [slots, H, K, V] and carried [slots, H] are rewritten in place."""
    return _kernels().step_(q, k, v, log_decay, S, carried, slots, scale)


lightning_step = torch.library.custom_op("linattn::lightning_step", mutates_args=("S", "carried"))(_step)


@lightning_step.register_fake
def _(q, k, v, log_decay, S, carried, slots, scale):
    return q.new_empty(q.shape[0], max(q.shape[1], S.shape[1]), v.shape[2])


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    initial_state: LightningState | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, LightningState | None]:
    """`lightning_attention` on checked arguments."""
    initial = None if initial_state is None else initial_state.S
    if not plain(q, k, v, log_decay, initial, cu_seqlens):
        o, S = lightning_forward(q, k, v, log_decay, scale, initial, cu_seqlens, return_state)
    else:
        run = _Eager.apply if wants_grad(q, k, v, log_decay, initial) else _kernels().forward
        o, S = run(q, k, v, log_decay, float(scale), initial, cu_seqlens, return_state)
    if S is None or not return_state:
        return o, None
    tokens = q.shape[1] if cu_seqlens is None else cu_seqlens.diff()[:, None]
    carried = (log_decay.float() * tokens).expand(S.shape[0], -1)
    return o, LightningState(carried if initial_state is None else initial_state.log_decay + carried, S)


def step_(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, pool: LightningState, slots: Tensor, *, scale: float
) -> Tensor:
    """`lightning_step_` on checked arguments."""
    return in_place(lightning_step, _step, pool, q, k, v, log_decay, pool.S, pool.log_decay, slots, scale)
