"""TransNormerLLM's linearized relative position encoding of queries and keys, as one op.

Backend "triton" makes each angle in registers, once for a query and its key, and reads and writes each number once.
Backend "torch" holds cosines and sines in memory, on any device.

    pytest tests/test_lrpe.py tests/test_nn_positions.py -k lrpe
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linattn.core.dispatch import Backend, Call, anything, choose, describe
from linattn.core.numerics import sum_dtype
from linattn.core.tiles import machine_refusals
from linattn.nn.rotary import check_positions, rotary_angles


def apply_lrpe(
    q: Tensor, k: Tensor, theta: Tensor, positions: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """``x -> [x cos(theta p), x sin(theta p)]`` feature by feature, of queries and of keys.

    Args:
        q, k: [B, T, H, D], or [B, H, D] for one token a row; of one dtype, any strides.
        theta: [H, D], radians per token.
        positions: integers [B, T] or [T]; [B] for one token a row.
        backend: a name obeys or raises; None takes the first that can run the call.

    Returns:
        Both with 2 D features, in q's dtype, differentiable in q, k and theta. Angles are exact to float64 until they
        are less than a turn; the rest is computed in fp32 (float64 for float64).

    Raises:
        ValueError: positions that are not integers, heads that are not theta's, a k unlike q, tensors of several
            devices, an unknown backend.

    Source: TransNormerLLM, arXiv 2307.14995, section 3.1; arXiv 2307.09270.
    """
    check_positions(positions)
    if q.shape[-2:] != theta.shape:
        raise ValueError(f"q has shape {list(q.shape)}; this LRPE is for [B, T, {theta.shape[0]}, {theta.shape[1]}]")
    if k.shape != q.shape or k.dtype != q.dtype:
        raise ValueError(f"apply_lrpe: k must be as q, {q.dtype} {list(q.shape)}; it is {k.dtype} {list(k.shape)}")
    given = {"q": q, "k": k, "theta": theta, "positions": positions}
    if len({x.device for x in given.values()}) > 1:
        where = {name: str(x.device) for name, x in given.items()}
        raise ValueError(f"apply_lrpe: move all to one device; they are on {where}")
    return choose(BACKENDS, describe("apply_lrpe", given), backend).forward(q, k, theta, positions)


class LRPE(nn.Module):
    """`apply_lrpe` with learned angles: the product of an encoded query and key tells their distance.

    It is ``sum_i q_i k_i cos(theta_i (p_q - p_k))``. The features of q and k are doubled. ``theta`` is [H, 1, dh]; it
    starts as ``base^(-2i / D)``, i = 0 ... D - 1 over all D = H dh features, down to 1e-8 radians per token.

    Source: arXiv 2307.14995, section 3.1; arXiv 2307.09270. The published code casts positions to the activations'
    dtype, which in bfloat16 rounds those above 256; this does not.
    """

    def __init__(self, n_heads: int, head_dim: int, base: float = 10000.0) -> None:
        super().__init__()
        self.base = base
        self.theta = nn.Parameter(torch.empty(n_heads, 1, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set theta to its first values."""
        n = self.theta.numel()
        exponents = torch.arange(n, dtype=torch.float64, device=self.theta.device) * (2 / n)
        with torch.no_grad():
            self.theta.copy_((self.base**-exponents).view_as(self.theta))

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Encode q and k [B, T, H, dh] at positions int64 [B, T] or [T], as `apply_lrpe` does: [B, T, H, 2 dh] each."""
        return apply_lrpe(q, k, self.theta[:, 0], positions)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"{self.theta.shape[0]}, {self.theta.shape[2]}, base={self.base}"


def refuses(call: Call) -> list[str]:
    """Why the Triton kernels cannot run this call; [] means they can."""
    wrong = machine_refusals(call)
    if call.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        wrong.append(f"needs bfloat16, float16 or float32 inputs, got {call.dtype}: it computes in float32")
    rows, given = call.shapes["q"][:-2], call.shapes["positions"]
    extra = len(rows) - len(given)
    if extra < 0 or any(p not in (1, n) for p, n in zip(given, rows[extra:], strict=True)):
        wrong.append(f"needs positions that expand to q's {list(rows)}, got {list(given)}")
    return wrong


def torch_forward(q: Tensor, k: Tensor, theta: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """`apply_lrpe` on checked arguments, on any device."""
    dtype = sum_dtype(q.dtype)
    angles = rotary_angles(positions, theta.to(torch.float64).flatten(), dtype)
    cos, sin = (x.unflatten(-1, theta.shape) for x in angles)
    wide = q.to(dtype), k.to(dtype)
    q, k = (torch.cat((x * cos, x * sin), dim=-1).to(q.dtype) for x in wide)
    return q, k


@torch.library.custom_op("linattn::lrpe_forward", mutates_args=())
def lrpe_forward(q: Tensor, k: Tensor, theta: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Both encoded, from q and k [outer, inner, H, D], theta [H, D] and positions [outer, inner]."""
    from linattn.nn import triton_lrpe

    return triton_lrpe.forward(q, k, theta, positions)


@lrpe_forward.register_fake
def _(q, k, theta, positions):
    shape = (*q.shape[:-1], 2 * q.shape[-1])
    return q.new_empty(shape), k.new_empty(shape)


@torch.library.custom_op("linattn::lrpe_backward", mutates_args=())
def lrpe_backward(
    dq: Tensor, dk: Tensor, q: Tensor | None, k: Tensor | None, theta: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and theta, from those of what they became; theta's is empty where q and k are None."""
    from linattn.nn import triton_lrpe

    return triton_lrpe.backward(dq, dk, q, k, theta, positions)


@lrpe_backward.register_fake
def _(dq, dk, q, k, theta, positions):
    shape = (*dq.shape[:-1], dq.shape[-1] // 2)
    return dq.new_empty(shape), dk.new_empty(shape), theta.new_empty(0 if q is None else theta.shape)


def _setup(ctx, inputs, output):
    q, k, theta, positions = inputs
    kept = (q, k) if ctx.needs_input_grad[2] else (None, None)
    ctx.save_for_backward(*kept, theta, positions)


def _backward(ctx, dq, dk):
    *gradients, d_theta = lrpe_backward(dq, dk, *ctx.saved_tensors)
    return *gradients, d_theta if ctx.needs_input_grad[2] else None, None


lrpe_forward.register_autograd(_backward, setup_context=_setup)


def triton_forward(q: Tensor, k: Tensor, theta: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """`apply_lrpe` on checked arguments, by the operators above."""
    shape = (*q.shape[:-1], 2 * q.shape[-1])
    at = _folded(positions.expand(q.shape[:-2]), 2)
    q, k = lrpe_forward(_folded(q, 4), _folded(k, 4), theta, at)
    return q.view(shape), k.view(shape)


def _folded(x: Tensor, axes: int) -> Tensor:
    """x with two axes of tokens, of ``axes`` in all: a view, unless it has more and they do not fold."""
    while x.ndim < axes:
        x = x[None]
    return x if x.ndim == axes else x.flatten(0, x.ndim - axes)


BACKENDS = (Backend("triton", refuses, triton_forward), Backend("torch", anything, torch_forward))
