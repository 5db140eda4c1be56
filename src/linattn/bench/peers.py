"""Peers: other implementations measured beside ours in the same run. Optional, imported when asked for, never needed.

A peer is a function of (op, inputs, grad) that gives a `Ready` or says in words why it cannot be had. A new peer is
one function and one line in `PEERS`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module, metadata
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from linattn.bench.cases import MIXERS

SCORE_BYTES = {"cpu": 2**31, "cuda": 2**34}
"""What the quadratic form may hold at a time: beyond, it would measure the machine's swapping."""

CUDA_ONLY = "runs on CUDA only"

ATTENTION = ("taylor", "prefix", "lightning", "window", "softmax")


class Ready(NamedTuple):
    """A call that can be timed.

    run: () -> y, laid out as the implementation likes it. leaves: what a backward pass goes to.
    """

    run: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]


Build = Callable[[str, dict[str, Any], bool], "Ready | str"]


class Peer(NamedTuple):
    """An implementation by name.

    ops: which ops it stands beside. same: whether it computes their function, so that its output can be checked.
    build: (op, inputs of the op, whether gradients are wanted) -> `Ready`, or the reason why not.
    version: of what is measured, for the record. quadratic: whether its cost is that of causal attention.
    """

    name: str
    ops: tuple[str, ...]
    same: bool
    build: Build
    version: Callable[[], str]
    quadratic: bool = False

    def computes(self, op: str) -> bool:
        """Whether its output should be the op's."""
        return self.same or op == "softmax"


def leaf(x: Tensor, grad: bool) -> Tensor:
    """x as an input whose gradient is asked for, or not."""
    return x.detach().requires_grad_(grad)


def quadratic(op: str, inputs: dict[str, Any], grad: bool) -> Ready | str:
    """The op by its definition, scores and all, in the inputs' dtype; 16-bit inputs are widened to fp32."""
    first = next(x for x in inputs.values() if isinstance(x, Tensor))
    heads = max(x.shape[2] for x in inputs.values() if isinstance(x, Tensor) and x.ndim == 4)
    # Scores, weights, and what backward keeps of them.
    need = first.shape[0] * heads * first.shape[1] ** 2 * first.element_size() * (6 if grad else 3)
    allowed = SCORE_BYTES.get(first.device.type, 2**31)
    if need > allowed:
        return f"the scores need about {need / 2**30:.0f} GiB, more than the {allowed / 2**30:.0f} allowed"
    leaves = {
        n: leaf(x, grad) for n, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 4
    }

    def run() -> Tensor:
        wide = {n: x.to(torch.promote_types(x.dtype, torch.float32)) for n, x in leaves.items()}
        return MIXERS[op].reference({**inputs, **wide})[0].to(first.dtype)

    return Ready(run, tuple(leaves.values()))


def sdpa(backend: SDPBackend | None) -> Build:
    """Causal softmax attention by torch, with the op's heads and value dim: what the op stands in for.

    Linear attention's narrow q and k are replaced by ones as wide as v, as an attention layer's are.
    """

    def build(op: str, inputs: dict[str, Any], grad: bool) -> Ready | str:
        q, k, v = inputs["q"], inputs["k"], inputs["v"]
        cuda = v.device.type == "cuda"
        if backend is not None and not cuda:
            return CUDA_ONLY
        if backend is None and cuda:
            return "on CUDA its backends are measured one by one"
        if op not in ("softmax", "window"):
            q, k = torch.randn_like(v), torch.randn_like(v)
        leaves = tuple(leaf(x, grad) for x in (q, k, v))

        def run() -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in leaves)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

        def run_on() -> Tensor:
            assert backend is not None
            with sdpa_kernel(backend):
                return run().transpose(1, 2)

        return Ready(run_on if backend is not None else lambda: run().transpose(1, 2), leaves)

    return build


def fla_simple_gla(op: str, inputs: dict[str, Any], grad: bool) -> Ready | str:
    """flash-linear-attention's chunk_simple_gla: decay by g_gamma, scale 1."""
    gla = _import("fla.ops.simple_gla", inputs)
    if isinstance(gla, str):
        return gla
    q, k, v = leaves = tuple(leaf(inputs[n], grad) for n in "qkv")
    if len({x.shape[2] for x in leaves}) != 1:
        return "needs as many heads of q, k and v"
    decay = inputs["log_decay"].float()
    return Ready(lambda: gla.chunk_simple_gla(q, k, v, g_gamma=decay, scale=1.0)[0], leaves)


def fla_based(function: str) -> Build:
    """flash-linear-attention's Based ops: "parallel_based" (quadratic) or "fused_chunk_based"."""

    def build(op: str, inputs: dict[str, Any], grad: bool) -> Ready | str:
        based = _import("fla.ops.based", inputs)
        if isinstance(based, str):
            return based
        q, k, v = leaves = tuple(leaf(inputs[n], grad) for n in "qkv")
        if len({x.shape[2] for x in leaves}) != 1:
            return "needs as many heads of q, k and v"
        run = getattr(based, function)
        return Ready(lambda: run(q, k, v, scale=None, use_norm=inputs.get("normalize", True)), leaves)

    return build


def lightning_attn(op: str, inputs: dict[str, Any], grad: bool) -> Ready | str:
    """Lightning Attention-2 by its authors: heads before tokens, slopes positive; copies made beforehand."""
    ops = _import("lightning_attn.ops", inputs)
    if isinstance(ops, str):
        return ops
    q, k, v = leaves = tuple(leaf(inputs[n].transpose(1, 2).contiguous(), grad) for n in "qkv")
    if len({x.shape[1] for x in leaves}) != 1:
        return "needs as many heads of q, k and v"
    slopes = -inputs["log_decay"].float()[:, None, None]
    return Ready(lambda: ops.lightning_attn_func(q, k, v, slopes).transpose(1, 2), leaves)


def flex_window(op: str, inputs: dict[str, Any], grad: bool) -> Ready | str:
    """torch's FlexAttention, compiled, with a causal mask of ``window`` keys; the mask of blocks is made beforehand."""
    if inputs["q"].device.type != "cuda":
        return CUDA_ONLY
    return flex_call(inputs, grad, _compiled)


def flex_call(inputs: dict[str, Any], grad: bool, compiled: Callable[[Any], Any]) -> Ready:
    """`flex_window` on any device; ``compiled`` makes the function that runs from torch's."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = leaves = tuple(leaf(inputs[n], grad) for n in "qkv")
    T, window, scale = q.shape[1], inputs["window"], inputs.get("scale")
    mask = create_block_mask(lambda b, h, i, j: (i >= j) & (i - j < window), None, None, T, T, device=str(q.device))
    attend = compiled(flex_attention)

    def run() -> Tensor:
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return attend(*heads, block_mask=mask, scale=scale, enable_gqa=q.shape[2] != k.shape[2]).transpose(1, 2)

    return Ready(run, leaves)


def flash_window(op: str, inputs: dict[str, Any], grad: bool) -> Ready | str:
    """FlashAttention-2's own sliding window, as torch has it: rows are packed documents of one length."""
    varlen = _import("torch.nn.attention.varlen", inputs)
    if isinstance(varlen, str):
        return varlen
    if "window_size" not in inspect.signature(varlen.varlen_attn).parameters:
        return f"torch {torch.__version__} gives varlen_attn no window_size"
    return flash_call(inputs, grad, varlen.varlen_attn)


def flash_call(inputs: dict[str, Any], grad: bool, attend: Callable[..., Any]) -> Ready | str:
    """`flash_window` by any function with varlen_attn's arguments."""
    q, k, v = leaves = tuple(leaf(inputs[n], grad) for n in "qkv")
    if len({x.shape[2] for x in leaves}) != 1 or inputs.get("scale") is not None:
        return "needs as many heads of q, k and v, and their own scale"
    B, T = q.shape[:2]
    ends = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q.device)
    # FlashAttention counts the keys before a token, not its own.
    window = (inputs["window"] - 1, 0)

    def run() -> Tensor:
        return attend(*(x.flatten(0, 1) for x in (q, k, v)), ends, ends, T, T, window_size=window).unflatten(0, (B, T))

    return Ready(run, leaves)


def torch_conv(compiled: bool) -> Build:
    """torch's depthwise conv1d with left padding, then the activation and the gate; eager, or compiled as one."""

    def build(op: str, inputs: dict[str, Any], grad: bool) -> Ready | str:
        if compiled and inputs["x"].device.type != "cuda":
            return CUDA_ONLY
        names = tuple(n for n in ("x", "weight", "bias", "gate") if inputs.get(n) is not None)
        leaves = tuple(leaf(inputs[n], grad) for n in names)
        activation = inputs.get("activation")

        def conv(*tensors: Tensor) -> Tensor:
            given = dict(zip(names, tensors, strict=True))
            x, weight = given["x"], given["weight"]
            D, taps = weight.shape
            y = F.conv1d(x.transpose(1, 2), weight[:, None], given.get("bias"), padding=taps - 1, groups=D)
            y = y[..., : x.shape[1]].transpose(1, 2)
            y = F.silu(y) if activation == "silu" else y
            return y * given["gate"] if "gate" in given else y

        function = _compiled(conv) if compiled else conv
        return Ready(lambda: function(*leaves), leaves)

    return build


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for these shapes alone: what was compiled before counts against no limit of recompilations."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def _import(module: str, inputs: dict[str, Any]) -> Any:
    """The module, or why it cannot be had."""
    if inputs["q"].device.type != "cuda":
        return CUDA_ONLY
    try:
        return import_module(module)
    except Exception as error:  # noqa: BLE001  a peer broken by a newer triton raises anything; that is its reason
        return f"import {module}: {type(error).__name__}: {error}"


def _of(package: str) -> Callable[[], str]:
    def version() -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return ""

    return version


_torch = _of("torch")

PEERS = (
    Peer("quadratic", ("taylor", "prefix", "lightning", "window"), True, quadratic, lambda: "", True),
    Peer("sdpa", ATTENTION, False, sdpa(None), _torch, True),
    Peer("sdpa-flash", ATTENTION, False, sdpa(SDPBackend.FLASH_ATTENTION), _torch, True),
    Peer("sdpa-cudnn", ATTENTION, False, sdpa(SDPBackend.CUDNN_ATTENTION), _torch, True),
    Peer("sdpa-efficient", ATTENTION, False, sdpa(SDPBackend.EFFICIENT_ATTENTION), _torch, True),
    Peer("fla-chunk_simple_gla", ("lightning",), True, fla_simple_gla, _of("flash-linear-attention")),
    Peer("fla-parallel_based", ("taylor",), True, fla_based("parallel_based"), _of("flash-linear-attention"), True),
    Peer("fla-fused_chunk_based", ("taylor",), True, fla_based("fused_chunk_based"), _of("flash-linear-attention")),
    Peer("lightning_attn", ("lightning",), True, lightning_attn, _of("lightning_attn")),
    Peer("flex_attention", ("window",), True, flex_window, _torch),
    Peer("FA2-window", ("window",), True, flash_window, _torch),
    Peer("conv1d", ("shortconv",), True, torch_conv(False), _torch),
    Peer("conv1d-compiled", ("shortconv",), True, torch_conv(True), _torch),
)
"""In the order of the table. fla's distribution is named flash-linear-attention."""

RIVALS = tuple(p.name for p in PEERS if p.name not in ("quadratic", "sdpa", "sdpa-efficient"))
"""Those of a GPU's tables: public kernels that one would use instead."""


def peers_of(op: str) -> tuple[Peer, ...]:
    """The peers that stand beside an op."""
    return tuple(p for p in PEERS if op in p.ops)
