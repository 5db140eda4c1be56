"""The legend of shapes, what a layer may know of its tokens, and the checks every op shares.

Legend, one letter each, everywhere in the library:

    B batch   T tokens   H heads   D key dim (F: feature dim)   V value dim   W window   w taps   M prefix tokens
    N documents (rows of State: B when a batch is not packed)

Packed documents are one row, [1, T, ...], with ``cu_seqlens`` int32 [N+1]: document n is tokens cu_seqlens[n] to
cu_seqlens[n+1]. Documents of length 0 are legal, so that N can be padded to a fixed size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_CHECK_CUDA_VALUES: ContextVar[bool] = ContextVar("linattn_checked", default=False)


@dataclass(frozen=True)
class Segment:
    """What a layer may know of its tokens besides their vectors.

    positions: int64 [B, T], each token's place in its own document.
    cu_seqlens: int32 [N+1] when the batch is packed (then B is 1), else None.
    prefix_lengths: int64 [B] or [N], how many first tokens a prefix model reads without causality; first call only.
    scan: set by distributed/sequence.py. ``scan(mixer, inputs, state)`` gives the State before this rank's tokens.
    """

    positions: Tensor
    cu_seqlens: Tensor | None = None
    prefix_lengths: Tensor | None = None
    scan: Callable[..., Any] | None = None

    def before(self, mixer: Any, inputs: dict[str, Any], state: Any) -> Any:
        """The State before these tokens: ``state`` itself, or what the scan over ranks makes of it."""
        return state if self.scan is None else self.scan(mixer, inputs, state)


@contextmanager
def checked() -> Iterator[None]:
    """Within this context the values of index tensors are checked on CUDA too, at the cost of a host sync a call."""
    token = _CHECK_CUDA_VALUES.set(True)
    try:
        yield
    finally:
        _CHECK_CUDA_VALUES.reset(token)


def values_are_checked(x: Tensor) -> bool:
    """Whether the values of index tensor ``x`` may be looked at: on the CPU, or inside `checked`; never in a trace."""
    if torch.compiler.is_compiling() or x.is_meta:
        return False
    return x.device.type == "cpu" or _CHECK_CUDA_VALUES.get()


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, tokens: int, name: str = "cu_seqlens") -> None:
    """Refuse document offsets that do not cut ``tokens`` tokens into documents. Shapes always, values where allowed.

    Raises:
        ValueError: with the offending value and the fix.
    """
    if batch != 1:
        raise ValueError(
            f"{name} packs documents into one row, but the batch is {batch}: reshape [B, T, ...] to [1, B*T, ...]"
        )
    if tokens == 0:
        raise ValueError(f"{name} was given with no tokens at all: leave the call out")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name} must be int32 or int64 of shape [N+1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    if values_are_checked(cu_seqlens):
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first != 0 or last != tokens:
            raise ValueError(f"{name} must run from 0 to the {tokens} tokens given, got {first} to {last}")
        falls = (cu_seqlens[1:] < cu_seqlens[:-1]).nonzero()
        if falls.numel():
            i = int(falls[0])
            a, b = int(cu_seqlens[i]), int(cu_seqlens[i + 1])
            raise ValueError(f"{name} must not decrease: entry {i} is {a}, entry {i + 1} is {b}")


def document_count(batch: int, cu_seqlens: Tensor | None) -> int:
    """Rows of State that a call has: documents when packed, else batch rows."""
    return batch if cu_seqlens is None else cu_seqlens.numel() - 1


def document_of_token(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The document index int64 [T] of every token of a packed row; empty documents own none."""
    places = torch.arange(tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].long(), places, right=True)


@dataclass(frozen=True)
class Heads:
    """Head counts of one attention call: outputs have ``out`` heads, the State has ``state``."""

    q: int
    k: int
    v: int
    state: int
    out: int


def check_attention(op: str, q: Tensor, k: Tensor, v: Tensor, state_heads: int | None = None) -> Heads:
    """Check q [B, T, Hq, D], k [B, T, Hk, D], v [B, T, Hv, V] against one another; return the head counts.

    q and k may have fewer heads than v and the State, and k and v fewer than q; each count divides the largest.

    Raises:
        ValueError: a wrong rank, a mismatch of B, T, D, dtype or device, or head counts that do not divide.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{op}: {name} must be [B, T, H, D], got {list(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{op}: q, k and v must share dtype and device; q is {q.dtype} on {q.device}, "
                f"{name} is {x.dtype} on {x.device}"
            )
        if x.shape[:2] != q.shape[:2]:
            raise ValueError(f"{op}: q is {list(q.shape)}, {name} is {list(x.shape)}: B and T must agree")
    if not q.dtype.is_floating_point:
        raise ValueError(f"{op}: q, k and v must be floating point, got {q.dtype}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"{op}: q and k must have one head dim, got {q.shape[3]} and {k.shape[3]}")
    state = max(k.shape[2], v.shape[2]) if state_heads is None else state_heads
    heads = Heads(q.shape[2], k.shape[2], v.shape[2], state, max(q.shape[2], state))
    for name, count in (("q", heads.q), ("k", heads.k), ("v", heads.v), ("the State", heads.state)):
        if count == 0 or heads.out % count or (name in "kv" and heads.state % count):
            raise ValueError(
                f"{op}: {name} has {count} heads, which does not divide {heads.out} (q {heads.q}, k {heads.k}, "
                f"v {heads.v}, State {heads.state})"
            )
    return heads


def match_heads(x: Tensor, heads: int) -> Tensor:
    """x [B, T, h, D] as [B, T, heads, D], each head standing for heads/h neighbours. A copy unless h == heads."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def check_state(op: str, state: Any, shapes: dict[str, tuple[int, ...]], device: torch.device) -> None:
    """Refuse an initial State whose leaves do not have ``shapes``, or that lies on another device.

    Raises:
        ValueError: naming the leaf, its shape and the wanted one.
    """
    for name, shape in shapes.items():
        leaf = getattr(state, name, None)
        if leaf is None:
            raise ValueError(f"{op}: initial_state has no {name!r}; it must be the State this op returned")
        if tuple(leaf.shape) != shape:
            raise ValueError(f"{op}: initial_state.{name} must be {list(shape)}, got {list(leaf.shape)}")
        if leaf.device != device:
            raise ValueError(f"{op}: initial_state.{name} is on {leaf.device}, the inputs on {device}")
