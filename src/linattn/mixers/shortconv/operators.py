"""Backend "triton" as torch sees it: operators with schemas, fakes and a gradient, and what it refuses.

Needs no triton: an operator's body imports triton.py on its first run, never in traced code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linattn.core.dispatch import Call, in_place
from linattn.core.shapes import document_count
from linattn.core.tails import append_count, last_count
from linattn.core.tiles import machine_refusals
from linattn.mixers.shortconv.chunked import ShortConvState

MOST_TAPS = 16
"""Every tap's row of inputs stays in registers."""


def refuses(call: Call) -> list[str]:
    """Why the Triton kernels cannot run this call; [] means they can. Any strides will do."""
    wrong = machine_refusals(call)
    if call.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        wrong.append(f"needs bfloat16, float16 or float32 inputs, got {call.dtype}: sums are in float32")
    taps = call.shapes["weight"][1]
    if taps > MOST_TAPS:
        wrong.append(f"needs at most {MOST_TAPS} taps, got {taps}: their rows are kept in registers")
    return wrong


@torch.library.custom_op("linattn::shortconv_forward", mutates_args=())
def shortconv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    """y [B, T, D] and the State's rows [N, w-1, D], of no documents unless asked for."""
    from linattn.mixers.shortconv import triton

    return triton.forward(x, weight, bias, gate, initial, cu_seqlens, silu, return_state)


@shortconv_forward.register_fake
def _(x, weight, bias, gate, initial, cu_seqlens, silu, return_state):
    rows = document_count(x.shape[0], cu_seqlens) if return_state else 0
    return x.new_empty(x.shape), x.new_empty(rows, weight.shape[1] - 1, x.shape[2])


@torch.library.custom_op("linattn::shortconv_backward", mutates_args=())
def shortconv_backward(
    dy: Tensor | None,
    d_final: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias, dgate and the initial rows' gradient, each of no entries where its input is absent."""
    from linattn.mixers.shortconv import triton

    return triton.backward(dy, d_final, x, weight, bias, gate, initial, cu_seqlens, silu)


@shortconv_backward.register_fake
def _(dy, d_final, x, weight, bias, gate, initial, cu_seqlens, silu):
    rows = 0 if initial is None else document_count(x.shape[0], cu_seqlens)
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        x.new_empty(0) if gate is None else gate.new_empty(gate.shape),
        x.new_empty(rows, weight.shape[1] - 1, x.shape[2]),
    )


def _setup(ctx, inputs, output):
    *tensors, silu, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.silu = silu
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, d_final):
    x, weight, bias, gate, initial, cu_seqlens = ctx.saved_tensors
    if d_final is not None and not d_final.shape[0]:
        d_final = None
    dx, d_weight, d_bias, d_gate, d_initial = shortconv_backward(
        dy, d_final, x, weight, bias, gate, initial, cu_seqlens, ctx.silu
    )
    optional = ((bias, d_bias), (gate, d_gate), (initial, d_initial))
    return dx, d_weight, *(None if given is None else gradient for given, gradient in optional), None, None, None


shortconv_forward.register_autograd(_backward, setup_context=_setup)


def _step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    pool: Tensor,
    count: Tensor,
    slots: Tensor,
    silu: bool,
) -> Tensor:
    """One token a row: y [B, D]; pool [slots + 1, w-1, D] and count [slots + 1] are rewritten in place."""
    from linattn.mixers.shortconv import triton

    return triton.step_(x, weight, bias, gate, pool, count, slots, silu)


shortconv_step = torch.library.custom_op("linattn::shortconv_step", mutates_args=("pool", "count"))(_step)


@shortconv_step.register_fake
def _(x, weight, bias, gate, pool, count, slots, silu):
    return x.new_empty(x.shape)


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
    initial = None if initial_state is None else initial_state.x
    y, final = shortconv_forward(x, weight, bias, gate, initial, cu_seqlens, activation == "silu", return_state)
    if not return_state:
        return y, None
    past = weight.shape[1] - 1
    count = last_count(x, past, cu_seqlens)
    return y, ShortConvState(final, count if initial_state is None else append_count(initial_state.count, count, past))


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
    """`short_conv_step_` on checked arguments."""
    return in_place(shortconv_step, _step, pool, x, weight, bias, gate, *pool, slots, activation == "silu")
