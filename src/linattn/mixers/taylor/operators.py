"""Backends "cuda" and "triton" as torch sees them: operators with schemas, fakes and a gradient, and what they refuse.

Needs no triton: an operator's body imports its kernels on its first run, never in traced code. The two share launches
and everything but the sweeps (cuda.py, triton_sweep.py) and the steps (cuda_step.py, triton_step.py).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linattn.core import nvrtc
from linattn.core.dispatch import Call, describe, in_place, plain
from linattn.core.shapes import document_count
from linattn.core.tiles import layout_refusals, machine_refusals, wants_grad
from linattn.mixers.taylor import cuda, cuda_step
from linattn.mixers.taylor.chunked import TaylorState, empty_state, n_features

MOST_ROWS = 60_000
"""Of documents or batch rows: a grid's second and third axis end at 65,535."""
LARGEST_VALUE_DIM = 256
LARGEST_STEP_DIM = 64
"""Of q and k in a step: 2,145 features."""
LARGEST_SWEPT = {8: 128, 16: 128, 24: 128, 32: 64}
"""Value dim by feature dim: the gradients at 32 x 128 would want 232 KiB of shared memory, 5 too many."""
CUDA_FEATURE_DIM = 16
MOST_READERS = 8
"""Query heads of one State in a step of cuda_step.py, whose features are all in shared memory."""
MOST_WAITING = 16
"""Tokens that wait beside one there, for the same reason."""
PIECES = {"S": 4, "copy": 4, "recent_k": 8, "recent_v": 8}
"""Numbers that it moves at once."""


def describe_step(op: str, q: Tensor, k: Tensor, v: Tensor, pool: Any) -> Call:
    """The `Call` of a step over this pool, a `TaylorState` or a `DeferredPool`.

    Its option "off": `bytes_off`.
    """
    leaves = {name: leaf for name, leaf in zip(pool._fields, pool, strict=True) if leaf is not None}
    return describe(op, {"q": q, "k": k, "v": v, **leaves}, off=bytes_off(pool))


def bytes_off(pool: Any) -> int:
    """How many bytes a leaf of a pool begins off a multiple of 16, at most; a trace cannot say, and there it is 0."""
    if torch.compiler.is_compiling() or not isinstance(pool, tuple):
        return 0
    leaves = (getattr(pool, name, None) for name in PIECES)
    return max([x.storage_offset() * x.element_size() % 16 for x in leaves if x is not None], default=0)


def refuses_cuda(call: Call) -> list[str]:
    """Why the CUDA sweeps cannot run this call; [] means they can."""
    F, V = call.shapes["k"][-1], call.shapes["v"][-1]
    wrong = nvrtc.refusals() + refuses(call)
    if F != CUDA_FEATURE_DIM:
        wrong.append(f"needs a feature dim of {CUDA_FEATURE_DIM}, got {F}")
    if V % 16 or not 32 <= V <= 128:
        return [*wrong, f"needs a value dim that is a multiple of 16 from 32 to 128, got {V}"]
    if "step" in call.op:
        return wrong + _refuses_step_by_cuda(call)
    if call.capability is not None:
        needed, limit = cuda.block_bytes(V, call.capability), nvrtc.block_bytes(call.capability)
        if needed > limit:
            wrong.append(f"needs {needed:,} bytes of shared memory at value dim {V}, this GPU gives a block {limit:,}")
    return wrong


def _refuses_step_by_cuda(call: Call) -> list[str]:
    """What decode.cu asks of a step that Triton does not: few heads and tokens, and whole pieces of its pool."""
    wrong = []
    if call.dtype == torch.float32:
        wrong.append("needs bfloat16 or float16 inputs, got torch.float32")
    n_state = call.shapes["S"][1]
    readers = max(call.shapes["q"][1], n_state) // n_state
    if readers > MOST_READERS:
        wrong.append(f"needs at most {MOST_READERS} query heads a State, got {readers}")
    if "recent_k" in call.shapes and call.shapes["recent_k"][2] > MOST_WAITING:
        wrong.append(f"needs pools of at most {MOST_WAITING} waiting tokens, got {call.shapes['recent_k'][2]}")
    for name, piece in PIECES.items():
        if name in call.shapes:
            outer = zip(call.shapes[name][:2], call.strides[name][:2], strict=True)
            if any(stride % piece for size, stride in outer if size > 1):
                wrong.append(f"needs heads of {name} {piece} numbers apart or a multiple, got {call.strides[name]}")
    if call.options["off"]:
        wrong.append(f"needs pools that begin at multiples of 16 bytes, this one is {call.options['off']} off")
    return wrong


def _refuses_pool(call: Call) -> list[str]:
    """What every step of ours asks of its pool: what a head has lies in one piece."""
    wrong = []
    for name in ("S", "copy", "recent_k", "recent_v", "z", "count"):
        if name not in call.shapes:
            continue
        # count's heads are one piece.
        shape, strides = ((x[name][1:] if name == "count" else x[name][2:]) for x in (call.shapes, call.strides))
        wanted = [math.prod(shape[n + 1 :]) for n in range(len(shape))]
        if any(size > 1 and stride != want for size, stride, want in zip(shape, strides, wanted, strict=True)):
            wrong.append(f"needs each head's {name} contiguous, its strides are {call.strides[name]}")
    return wrong


def refuses(call: Call) -> list[str]:
    """Why the Triton kernels cannot run this call; [] means they can."""
    wrong = machine_refusals(call)
    step = "step" in call.op
    F, V = call.shapes["k"][-1], call.shapes["v"][-1]
    if call.dtype not in (torch.bfloat16, torch.float16) and not (step and call.dtype == torch.float32):
        wrong.append(f"needs bfloat16 or float16 inputs, got {call.dtype}: the tensor cores would round it to TF32")
    rows = max(call.shapes["q"][0], call.shapes.get("cu_seqlens", (0,))[0])
    if rows > MOST_ROWS:
        wrong.append(f"needs at most {MOST_ROWS} rows or documents, got {rows}")
    if step:
        if not 2 <= F <= LARGEST_STEP_DIM:
            wrong.append(f"needs a feature dim from 2 to {LARGEST_STEP_DIM}, got {F}")
        if not 1 <= V <= LARGEST_VALUE_DIM:
            wrong.append(f"needs a value dim from 1 to {LARGEST_VALUE_DIM}, got {V}")
        inner = [n for n in ("q", "k", "v") if call.strides[n][-1] != 1]
        return wrong + [f"needs {n} contiguous along its last axis" for n in inner] + _refuses_pool(call)
    if F not in LARGEST_SWEPT:
        wrong.append(f"needs a feature dim of 8, 16, 24 or 32, got {F}")
    elif V % 8 or not 8 <= V <= LARGEST_SWEPT[F]:
        wrong.append(f"needs a value dim that is a multiple of 8 up to {LARGEST_SWEPT[F]} at feature dim {F}, got {V}")
    return wrong + layout_refusals(call, ("q", "k", "v"))


@functools.cache
def _kernels() -> Any:
    from linattn.mixers.taylor import triton

    return triton


def _states(k: Tensor, v: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """S [rows, H, P, V] and z [rows, H, P], empty."""
    S, z = empty_state(k, rows, max(k.shape[2], v.shape[2]), n_features(k.shape[3]), v.shape[3])
    return S, z


@torch.library.custom_op("linattn::taylor_forward", mutates_args=())
def taylor_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    normalize: bool,
    S: Tensor | None,
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
    sweeps: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o [B, T, Ho, V], the final S [N, H, P, V] and z [N, H, P] (of no rows unless asked for), and the divisor."""
    o, S, z, share = _kernels().forward(q, k, v, scale, normalize, S, z, cu_seqlens, return_state, sweeps)
    if S is None or z is None:
        S, z = _states(k, v, 0)
    return o, S, z, q.new_empty(q.shape[0], o.shape[2], 0, dtype=torch.float32) if share is None else share


@taylor_forward.register_fake
def _(q, k, v, scale, normalize, S, z, cu_seqlens, return_state, sweeps):
    heads = max(q.shape[2], k.shape[2], v.shape[2])
    o = v.new_empty(q.shape[0], q.shape[1], heads, v.shape[3])
    share = q.new_empty(q.shape[0], heads, q.shape[1] if normalize else 0, dtype=torch.float32)
    return o, *_states(k, v, document_count(q.shape[0], cu_seqlens) if return_state else 0), share


@torch.library.custom_op("linattn::taylor_backward", mutates_args=())
def taylor_backward(
    do: Tensor | None,
    dS: Tensor | None,
    dz: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    share: Tensor,
    scale: float,
    normalize: bool,
    S: Tensor | None,
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    sweeps: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and the gradients of the initial S and z (of no rows where there is none)."""
    found = _kernels().backward(do, dS, dz, q, k, v, o, share, scale, normalize, S, z, cu_seqlens, sweeps)
    return (*found[:3], *_states(k, v, 0)) if S is None else found


@taylor_backward.register_fake
def _(do, dS, dz, q, k, v, o, share, scale, normalize, S, z, cu_seqlens, sweeps):
    return *(x.new_empty(x.shape) for x in (q, k, v)), *_states(k, v, 0 if S is None else S.shape[0])


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, scale, normalize, S, z, cu_seqlens, _, sweeps = inputs
    o, _, _, share = output
    # Of sums that are not divided, no gradient reads the output: v stands for it.
    ctx.save_for_backward(q, k, v, o if normalize else v, share, S, z, cu_seqlens)
    ctx.settings = scale, normalize, sweeps
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, run: Any, do: Tensor | None, dS: Tensor | None, dz: Tensor | None) -> tuple[Any, ...]:
    q, k, v, o, share, S, z, cu_seqlens = ctx.saved_tensors
    scale, normalize, sweeps = ctx.settings
    dS, dz = (x if x is not None and x.shape[0] else None for x in (dS, dz))
    dq, dk, dv, dS0, dz0 = run(do, dS, dz, q, k, v, o, share, scale, normalize, S, z, cu_seqlens, sweeps)
    given = S is not None
    return dq, dk, dv, None, None, dS0 if given else None, dz0 if given else None, None, None, None


def _backward(ctx: Any, do: Tensor | None, dS: Tensor | None, dz: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    return _gradients(ctx, taylor_backward, do, dS, dz)


taylor_forward.register_autograd(_backward, setup_context=_setup)


class _Eager(torch.autograd.Function):
    """What the operators do, without torch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = _kernels().forward(*inputs)
        _setup(ctx, inputs, output)
        if output[3] is not None:
            ctx.mark_non_differentiable(output[3])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dS: Tensor | None, dz: Tensor | None, _: Tensor | None) -> Any:
        return _gradients(ctx, _kernels().backward, do, dS, dz)


@torch.library.custom_op("linattn::taylor_summarize", mutates_args=())
def taylor_summarize(k: Tensor, v: Tensor, cu_seqlens: Tensor | None, sweeps: str) -> tuple[Tensor, Tensor]:
    """S [N, H, P, V] and z [N, H, P] of keys and values read from nothing."""
    return _kernels().summarize(k, v, cu_seqlens, sweeps)


@taylor_summarize.register_fake
def _(k, v, cu_seqlens, sweeps):
    return _states(k, v, document_count(k.shape[0], cu_seqlens))


def _setup_summary(ctx: Any, inputs: Any, output: Any) -> None:
    k, v, cu_seqlens, sweeps = inputs
    ctx.save_for_backward(k, v, cu_seqlens)
    ctx.sweeps = sweeps
    ctx.set_materialize_grads(False)


def _backward_summary(ctx: Any, dS: Tensor | None, dz: Tensor | None) -> tuple[Any, ...]:
    # A State's gradient reaches its tokens as the final State's does: through the sweeps in reverse, no output read.
    k, v, cu_seqlens = ctx.saved_tensors
    heads = max(k.shape[2], v.shape[2])
    share = k.new_empty(k.shape[0], heads, 0, dtype=torch.float32)
    _, dk, dv, _, _ = taylor_backward(
        None, dS, dz, k, k, v, v, share, 1.0, False, None, None, cu_seqlens, ctx.sweeps
    )  # fmt: skip
    return dk, dv, None, None


taylor_summarize.register_autograd(_backward_summary, setup_context=_setup_summary)


def summarize(k: Tensor, v: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None, *, sweeps: str) -> TaylorState:
    """`taylor.summarize` on checked arguments."""
    if lengths is None:
        return TaylorState(*taylor_summarize(k, v, cu_seqlens, sweeps))
    # What counts of a row and what lies beyond are a document each; of the States, every second one is dropped.
    B, T = k.shape[:2]
    starts = torch.arange(B, device=k.device, dtype=torch.int32) * T if cu_seqlens is None else cu_seqlens[:-1]
    ends = torch.stack([starts, starts + lengths.to(torch.int32)], 1).flatten()
    offsets = torch.cat([ends, ends.new_full((1,), B * T)])
    S, z = taylor_summarize(k.flatten(0, 1)[None], v.flatten(0, 1)[None], offsets, sweeps)
    return TaylorState(S[::2], z[::2])


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    normalize: bool,
    initial_state: TaylorState | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
    sweeps: str,
) -> tuple[Tensor, TaylorState | None]:
    S0, z0 = (None, None) if initial_state is None else initial_state
    run: Any = taylor_forward
    if plain(q, k, v, S0, z0, cu_seqlens):
        run = _Eager.apply if wants_grad(q, k, v, S0, z0) else _kernels().forward
    o, S, z, _ = run(q, k, v, float(scale), normalize, S0, z0, cu_seqlens, return_state, sweeps)
    return o, TaylorState(S, z) if return_state else None


def forward(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> tuple[Tensor, TaylorState | None]:
    """`taylor_attention` on checked arguments, by the Triton sweeps."""
    return _forward(q, k, v, sweeps="triton", **settings)


def forward_cuda(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> tuple[Tensor, TaylorState | None]:
    """`taylor_attention` on checked arguments, by the CUDA sweeps."""
    return _forward(q, k, v, sweeps="cuda", **settings)


def _step(
    q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor, slots: Tensor, scale: float, normalize: bool, backend: str
) -> Tensor:
    """One token a row: y [B, Ho, V]; S [slots, H, P, V] and z [slots, H, P] are rewritten in place."""
    if backend == "cuda":
        return cuda_step.step_(q, k, v, (S, z), slots, scale, normalize)
    from linattn.mixers.taylor import triton_step

    return triton_step.step_(q, k, v, S, z, slots, scale, normalize)


def _step_deferred(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S: Tensor,
    z: Tensor,
    recent_k: Tensor,
    recent_v: Tensor,
    count: Tensor,
    copy: Tensor | None,
    slots: Tensor,
    scale: float,
    normalize: bool,
    backend: str,
) -> Tensor:
    """One token a row over the leaves of a `DeferredPool`, which are rewritten in place: y [B, Ho, V]."""
    pool = (S, z, recent_k, recent_v, count, copy)
    if backend == "cuda":
        return cuda_step.step_(q, k, v, pool, slots, scale, normalize)
    from linattn.mixers.taylor import triton_step_deferred

    return triton_step_deferred.step_deferred_(q, k, v, *pool, slots, scale, normalize)


DEFERRED = ("S", "z", "recent_k", "recent_v", "count", "copy")
taylor_step = torch.library.custom_op("linattn::taylor_step", mutates_args=("S", "z"))(_step)
taylor_step_deferred = torch.library.custom_op("linattn::taylor_step_deferred", mutates_args=DEFERRED)(_step_deferred)


@taylor_step.register_fake
def _(q, k, v, S, z, slots, scale, normalize, backend):
    return v.new_empty(q.shape[0], max(q.shape[1], S.shape[1]), v.shape[2])


@taylor_step_deferred.register_fake
def _(q, k, v, S, z, recent_k, recent_v, count, copy, slots, scale, normalize, backend):
    return v.new_empty(q.shape[0], max(q.shape[1], S.shape[1]), v.shape[2])


def step_by(
    backend: str, q: Tensor, k: Tensor, v: Tensor, pool: TaylorState, slots: Tensor, *, scale: float, normalize: bool
) -> Tensor:
    """`taylor_step_` on checked arguments."""
    return in_place(taylor_step, _step, pool, q, k, v, *pool, slots, scale, normalize, backend)


def step_deferred_by(
    backend: str, q: Tensor, k: Tensor, v: Tensor, pool: Any, slots: Tensor, *, scale: float, normalize: bool
) -> Tensor:
    """`taylor_step_deferred_` on checked arguments."""
    return in_place(taylor_step_deferred, _step_deferred, pool, q, k, v, *pool, slots, scale, normalize, backend)
