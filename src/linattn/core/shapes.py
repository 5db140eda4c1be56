"""The legend of shapes, what a layer may know of its tokens, and the checks every op shares.

Legend, one letter each, everywhere in the library:

    B batch   T tokens   H heads   D key dim (F: feature dim)   V value dim   W window   w taps   M prefix tokens
    N documents (rows of State: B when a batch is not packed)

Packed documents are one row, [1, T, ...], with ``cu_seqlens`` int32 [N+1]: document n is tokens cu_seqlens[n] to
cu_seqlens[n+1]. Documents of length 0 are legal, so that N can be padded to a fixed size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"{name} must be an int32 tensor of shape [N+1], got {cu_seqlens!r}: wrap it in torch.tensor")
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


def check_scale(op: str, scale: Any) -> None:
    """Refuse a scale that is no number (None is one: the op's own).

    Raises:
        ValueError: with what was given.
    """
    if scale is not None and not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat)):
        raise ValueError(f"{op}: scale must be a float, got {scale!r}")


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
    return count_heads(op, q, k, v, state_heads)


def count_heads(op: str, q: Tensor, k: Tensor, v: Tensor, state_heads: int | None = None) -> Heads:
    """The head counts of q, k, v [..., H, D]; ``state_heads`` is given where log_decay sets it.

    Raises:
        ValueError: counts that do not divide.
    """
    state = max(k.shape[-2], v.shape[-2]) if state_heads is None else state_heads
    heads = Heads(q.shape[-2], k.shape[-2], v.shape[-2], state, max(q.shape[-2], state))
    for name, count in (("q", heads.q), ("k", heads.k), ("v", heads.v), ("the State", heads.state)):
        if count == 0 or heads.out % count or (name in "kv" and heads.state % count):
            if name in "kv" and count and heads.out % count == 0:
                whole = f"the State's {state}" if state_heads is None else f"the {state} entries of log_decay"
            else:
                whole = f"{heads.out}"
            raise ValueError(
                f"{op}: {name} has {count} heads, which does not divide {whole} (q {heads.q}, k {heads.k}, "
                f"v {heads.v}, {'State' if state_heads is None else 'log_decay'} {heads.state})"
            )
    return heads


def check_shared_kv(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Softmax attention's rule for q, k, v [..., H, D]: k and v share one head count, which divides q's.

    Raises:
        ValueError: head counts or head dims that do not fit.
    """
    heads = q.shape[-2], k.shape[-2], v.shape[-2]
    if heads[1] != heads[2] or not heads[1] or heads[0] % heads[1] or not heads[0]:
        raise ValueError(
            f"{op}: k and v must have one head count that divides q's, got q {heads[0]}, k {heads[1]}, v {heads[2]}"
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{op}: q and k must have one head dim, got {q.shape[-1]} and {k.shape[-1]}")


def match_heads(x: Tensor, heads: int) -> Tensor:
    """x [B, T, h, D] as [B, T, heads, D], each head standing for heads/h neighbours. A copy unless h == heads."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def check_state(
    op: str,
    state: Any,
    shapes: Mapping[str, tuple[int, ...]],
    device: torch.device,
    dtype: torch.dtype,
    most: int | None = None,
) -> None:
    """Refuse an initial State whose leaves do not have ``shapes`` and ``dtype``, or that lies on another device.

    A leaf called count is int32 whatever the dtype, and from 0 to ``most`` where its values are checked.

    Raises:
        ValueError: naming the leaf, what it is and what is wanted.
    """
    for name, shape in shapes.items():
        leaf = getattr(state, name, None)
        if not isinstance(leaf, Tensor):
            raise ValueError(f"{op}: initial_state has no {name!r}; it must be the State this op returned")
        if tuple(leaf.shape) != shape:
            raise ValueError(f"{op}: initial_state.{name} must be {list(shape)}, got {list(leaf.shape)}")
        if leaf.device != device:
            raise ValueError(f"{op}: initial_state.{name} is on {leaf.device}, the inputs on {device}")
        wanted = torch.int32 if name == "count" else dtype
        if leaf.dtype != wanted:
            raise ValueError(
                f"{op}: initial_state.{name} must be {wanted} for these inputs, got {leaf.dtype}: "
                f"convert it with .to({wanted})"
            )
        if name == "count" and most is not None and leaf.numel() and values_are_checked(leaf):
            counts = leaf.tolist()
            if min(counts) < 0 or max(counts) > most:
                raise ValueError(f"{op}: initial_state.count must lie in 0 to {most}, its rows, got {counts}")


def check_step(
    op: str,
    tensors: Mapping[str, Tensor | None],
    slots: Tensor,
    pool: Any,
    kind: type,
    room: Callable[[], Mapping[str, tuple[tuple[int, ...], torch.dtype]]],
) -> None:
    """Refuse a decoding step that does not fit its pool; `check_slot_values` looks at what no layout tells.

    Args:
        op: the name to complain under.
        tensors: one token a row: q, k, v [B, H, D], others [B, D]. They share B, dtype and device.
        slots: int32 or int64 [B].
        pool: leaves [slots + 1, ...], of which the last row is no slot.
        kind: the class of the pool.
        room: called once the ranks are known to be right; what a row of each leaf must be: its shape and dtype.

    Raises:
        ValueError: with the offending value and the fix.
    """
    first = slots
    for name, x in tensors.items():
        if x is None:
            continue
        ndim, layout = (3, "[B, H, D]") if name in "qkv" else (2, "[B, D]")
        if x.ndim != ndim:
            raise ValueError(f"{op}: {name} must be {layout}, one token a row, got {list(x.shape)}")
        if first is slots:
            first = x
            if not x.is_floating_point():
                raise ValueError(f"{op}: {name} must be floating point, got {x.dtype}")
        elif x.shape[0] != first.shape[0] or x.dtype != first.dtype or x.device != first.device:
            raise ValueError(
                f"{op}: all inputs must share B, dtype and device; the first is {list(first.shape)} {first.dtype} on "
                f"{first.device}, {name} is {list(x.shape)} {x.dtype} on {x.device}"
            )
    if not isinstance(pool, kind):
        raise ValueError(f"{op}: pool must be a {kind.__name__}, made by new_pool, got {type(pool).__name__}")
    rows = 0
    for name, (shape, dtype) in room().items():
        leaf: Tensor = getattr(pool, name)
        rows = rows or leaf.shape[0]
        if leaf.shape != (rows, *shape):
            raise ValueError(
                f"{op}: these inputs need pool.{name} of shape {[rows, *shape]}, got {list(leaf.shape)}; make the pool "
                "for States of these sizes"
            )
        if leaf.dtype != dtype or leaf.device != first.device:
            raise ValueError(
                f"{op}: these inputs need pool.{name} of {dtype} on {first.device}, got {leaf.dtype} on {leaf.device}"
            )
    _check_slots(op, slots, first)


def _check_slots(op: str, slots: Tensor, first: Tensor) -> None:
    if not isinstance(slots, Tensor):
        raise ValueError(f"{op}: slots must be an int32 tensor, got {slots!r}: wrap it in torch.tensor")
    if slots.dtype not in (torch.int32, torch.int64) or slots.ndim != 1 or slots.shape[0] != first.shape[0]:
        raise ValueError(
            f"{op}: slots must be int32 or int64 [{first.shape[0]}], one a row, got {slots.dtype} {list(slots.shape)}"
        )
    if slots.device != first.device:
        raise ValueError(f"{op}: slots are on {slots.device}, the inputs on {first.device}")


def check_slot_values(op: str, slots: Tensor, pool: Any) -> None:
    """Refuse, where values are checked, slots that are neither -1 nor one of the pool's, or that are named twice.

    Raises:
        ValueError: with the slots and the fix.
    """
    if values_are_checked(slots):
        named, count = slots.tolist(), pool[0].shape[0] - 1
        used = [slot for slot in named if slot != -1]
        if used and (min(used) < 0 or max(used) >= count):
            raise ValueError(f"{op}: slots must be -1 (idle) or 0 to {count - 1}, the pool's {count}, got {named}")
        if len(set(used)) != len(used):
            raise ValueError(f"{op}: no two rows may share a slot, got {named}")
