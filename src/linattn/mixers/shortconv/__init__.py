"""Short causal convolution, one filter of w taps a channel, with its activation and gate: a State of w-1 inputs.

The middle of Based's BaseConv (arXiv 2402.18668); README.md in this folder has the recurrence and its costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from linattn.core.dispatch import Backend, anything, checked_step, choose, describe
from linattn.core.mixer import Mixer
from linattn.core.pool import new_pool, put_, take
from linattn.core.shapes import check_cu_seqlens, check_state, check_step, document_count
from linattn.mixers.shortconv import chunked, operators
from linattn.mixers.shortconv.chunked import ShortConvState, combine, summarize
from linattn.mixers.shortconv.reference import short_conv_reference

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "MIXER",
    "ShortConvState",
    "combine",
    "new_pool",
    "put_",
    "short_conv",
    "short_conv_step_",
    "summarize",
    "take",
]

ACTIVATIONS = (None, "silu")
BACKENDS = (
    Backend("triton", operators.refuses, operators.forward, operators.step_),
    Backend("torch", anything, chunked.forward, chunked.step_),
)


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    activation: str | None = None,
    initial_state: ShortConvState | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, ShortConvState | None]:
    """Causal depthwise convolution, with what usually follows it.

    y_t = act(bias + sum_j weight_j x_{t-(w-1)+j}) gate_t, channel by channel: tap w-1 meets the current token, as in
    a PyTorch Conv1d whose input has w-1 zeros in front. (The convolution of BaseConv, arXiv 2402.18668, appendix.)

    Args:
        x: [B, T, D]. weight: [D, w]. bias: [D].
        gate: [B, T, D], multiplied last.
        activation: None or "silu", before the gate.
        initial_state: the State of what came before, N = B rows (one a document when packed).
        cu_seqlens: int32 [N+1], documents packed in one row; each is read from its own State.
        return_state: False saves the work where nobody reads on.
        backend: a name obeys or raises; None takes the first that can run the call.

    Returns:
        y [B, T, D] in x's dtype, computed in fp32 (float64 for float64) and rounded once, and the State after the
        last token of each document (None when not asked for). Differentiable in every tensor, also from the State.

    Raises:
        ValueError: a shape, dtype or value that does not fit, with the value and the fix.
    """
    if x.ndim != 3 or not x.dtype.is_floating_point:
        raise ValueError(f"short_conv: x must be floating point [B, T, D], got {x.dtype} {list(x.shape)}")
    _check("short_conv", x, weight, bias, gate, activation)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1])
    if initial_state is not None:
        rows = document_count(x.shape[0], cu_seqlens)
        shapes = {"x": (rows, weight.shape[1] - 1, x.shape[2]), "count": (rows,)}
        check_state("short_conv", initial_state, shapes, x.device, x.dtype, weight.shape[1] - 1)
    tensors = {"x": x, "weight": weight, "bias": bias, "gate": gate, "cu_seqlens": cu_seqlens}
    call = describe("short_conv", tensors, activation=activation)
    return choose(BACKENDS, call, backend).forward(
        x,
        weight,
        bias,
        gate=gate,
        activation=activation,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        return_state=return_state,
    )


@torch.no_grad()
def short_conv_step_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pool: ShortConvState,
    slots: Tensor,
    gate: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """One token a row: x [B, D], weight [D, w], bias [D], gate [B, D], slots int32 [B] -> y [B, D].

    The pool's States in ``slots`` are rewritten in place; a slot of -1 is an idle row, whose output means nothing.
    No gradient.

    Raises:
        ValueError: as `short_conv`, or the pool was made for another number of taps, or slots do not fit it.
    """

    def room() -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        _check("short_conv_step_", x, weight, bias, gate, activation)
        return {"x": ((weight.shape[1] - 1, x.shape[1]), x.dtype), "count": ((), torch.int32)}

    def find() -> Backend:
        check_step("short_conv_step_", {"x": x, "gate": gate}, slots, pool, ShortConvState, room)
        given = {"x": x, "weight": weight, "bias": bias, "gate": gate}
        return choose(BACKENDS, describe("short_conv_step_", given, activation=activation), backend)

    key, given = (backend, activation, bias is None, gate is None), (x, weight, bias, gate)
    step = checked_step("short_conv_step_", BACKENDS, key, given, pool, slots, find)
    return step(x, weight, bias, pool, slots, gate=gate, activation=activation)


def _check(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, activation: str | None
) -> None:
    channels = x.shape[-1]
    if weight.ndim != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        hint = "; a Conv1d's [D, 1, w] needs weight[:, 0]" if weight.ndim == 3 else ""
        raise ValueError(f"{op}: weight must be [{channels}, w], got {list(weight.shape)}{hint}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"{op}: bias must be [{channels}], got {list(bias.shape)}")
    if gate is not None and gate.shape != x.shape:
        raise ValueError(f"{op}: gate must be x's shape {list(x.shape)}, got {list(gate.shape)}")
    if gate is not None and gate.dtype != x.dtype:
        raise ValueError(f"{op}: gate must be of x's dtype {x.dtype}, got {gate.dtype}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {ACTIVATIONS}, got {activation!r}")
    for name, tensor in (("weight", weight), ("bias", bias), ("gate", gate)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, x on {x.device}")


def _reference(inputs: Mapping[str, Any], initial_state: ShortConvState | None = None) -> tuple[Tensor, ShortConvState]:
    y, state = short_conv_reference(**inputs, initial_state=initial_state)
    return y, ShortConvState(*state)


MIXER = Mixer(
    name="shortconv",
    axes={"x": "BTH", "weight": "HW", "bias": "H", "gate": "BTH"},
    state_axes={"x": "NWH", "count": "N"},
    reference=_reference,
    forward=lambda inputs, **kw: short_conv(**inputs, **kw),
    identity=lambda inputs, documents: chunked.identity(
        documents, inputs["weight"].shape[1], inputs["x"].shape[2], inputs["x"]
    ),
    summarize=lambda inputs, cu_seqlens=None: summarize(inputs["x"], inputs["weight"].shape[1], cu_seqlens),
    combine=combine,
    new_pool=new_pool,
    step_=lambda inputs, pool, slots, **kw: short_conv_step_(**inputs, pool=pool, slots=slots, **kw),
    take=take,
    put_=put_,
    backends=tuple(b.name for b in BACKENDS),
)
