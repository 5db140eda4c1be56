"""A norm without parameters times a gate, as one op: what follows the attention in TransNormerLLM.

Apart they are three passes over memory forward and more backward; backend "triton" reads each number once and rounds
once. Backend "torch" is `rms_norm` and a product, on any device.

    pytest tests/test_gated_norm.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from linattn.core.dispatch import Backend, Call, anything, choose, describe
from linattn.core.tiles import machine_refusals
from linattn.nn.norm import rms_norm

ACTIVATIONS = (None, "sigmoid")
LARGEST_DIM = 16384
"""A program holds a whole row: 32 numbers a thread at 16 warps."""


def gated_rms_norm(
    x: Tensor, gate: Tensor, eps: float = 1e-6, *, activation: str | None = None, backend: str | None = None
) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * act(gate)`` over the last axis.

    Args:
        x, gate: [..., D], of one dtype, any strides.
        eps: added to the mean square, in units of x squared.
        activation: None or "sigmoid", on the gate.
        backend: a name obeys or raises; None takes the first that can run the call.

    Returns:
        [..., D] in x's dtype, computed in fp32 (float64 for float64), and differentiable in both.

    Raises:
        ValueError: shapes, dtypes or devices that differ, an unknown activation or backend.

    Source: TransNormerLLM, arXiv 2307.14995, section 3.1; the sigmoid, arXiv 2405.17381.
    """
    if gate.shape != x.shape or gate.dtype != x.dtype or gate.device != x.device:
        raise ValueError(
            f"gated_rms_norm: the gate must be as x, {x.dtype} {list(x.shape)} on {x.device}; "
            f"it is {gate.dtype} {list(gate.shape)} on {gate.device}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"gated_rms_norm: activation must be one of {ACTIVATIONS}, got {activation!r}")
    call = describe("gated_rms_norm", {"x": x, "gate": gate})
    return choose(BACKENDS, call, backend).forward(x, gate, eps, activation == "sigmoid")


def refuses(call: Call) -> list[str]:
    """Why the Triton kernels cannot run this call; [] means they can."""
    wrong = machine_refusals(call)
    if call.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        wrong.append(f"needs bfloat16, float16 or float32 inputs, got {call.dtype}: sums are in float32")
    dim = call.shapes["x"][-1]
    if dim > LARGEST_DIM:
        wrong.append(f"needs a last axis of at most {LARGEST_DIM}, got {dim}: a program holds a whole row")
    return wrong


def torch_forward(x: Tensor, gate: Tensor, eps: float, sigmoid: bool) -> Tensor:
    """`gated_rms_norm` on checked arguments, on any device."""
    return rms_norm(x, None, eps) * (gate.sigmoid() if sigmoid else gate)


@torch.library.custom_op("linattn::gated_norm_forward", mutates_args=())
def gated_norm_forward(x: Tensor, gate: Tensor, eps: float, sigmoid: bool) -> Tensor:
    """y of x and gate [outer, inner, D]."""
    from linattn.nn import triton_gated_norm

    return triton_gated_norm.forward(x, gate, eps, sigmoid)


@gated_norm_forward.register_fake
def _(x, gate, eps, sigmoid):
    return x.new_empty(x.shape)


@torch.library.custom_op("linattn::gated_norm_backward", mutates_args=())
def gated_norm_backward(dy: Tensor, x: Tensor, gate: Tensor, eps: float, sigmoid: bool) -> tuple[Tensor, Tensor]:
    """The gradients of x and gate."""
    from linattn.nn import triton_gated_norm

    return triton_gated_norm.backward(dy, x, gate, eps, sigmoid)


@gated_norm_backward.register_fake
def _(dy, x, gate, eps, sigmoid):
    return x.new_empty(x.shape), gate.new_empty(gate.shape)


def _setup(ctx, inputs, output):
    x, gate, ctx.eps, ctx.sigmoid = inputs
    ctx.save_for_backward(x, gate)


def _backward(ctx, dy):
    return *gated_norm_backward(dy, *ctx.saved_tensors, ctx.eps, ctx.sigmoid), None, None


gated_norm_forward.register_autograd(_backward, setup_context=_setup)


def triton_forward(x: Tensor, gate: Tensor, eps: float, sigmoid: bool) -> Tensor:
    """`gated_rms_norm` on checked arguments, by the operators above."""
    return gated_norm_forward(_three_axes(x), _three_axes(gate), eps, sigmoid).view(x.shape)


def _three_axes(x: Tensor) -> Tensor:
    """x [..., D] as [outer, inner, D]; a view, unless more than two axes lie in front and do not fold."""
    while x.ndim < 3:
        x = x[None]
    return x if x.ndim == 3 else x.flatten(0, -3)


BACKENDS = (Backend("triton", refuses, triton_forward), Backend("torch", anything, torch_forward))
