"""A mixer is a State and four functions; the scan over States is written here, once for all of them.

    identity() -> State                        nothing read yet
    summarize(segment) -> State                the segment read from nothing; no outputs
    combine(earlier, later) -> State           associative
    forward(segment, initial_state) -> (y, final_state)

A State is a NamedTuple of tensors whose first axis is N, one row a document. Decoding is the fold, chunking and
sequence parallelism are the scan, and a document boundary is a reset of the scan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from linattn.core.shapes import Segment

S = TypeVar("S", bound=tuple)
Combine = Callable[[S, S], S]
Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Mixer:
    """What the laws, the bench, the engine and the scan over ranks may know of a mixer.

    ``inputs`` below are an op's keyword arguments by name: tensors with a row per token, and parameters.

    name: the folder's name.
    axes: each tensor argument's axes as letters of the legend, say ``{"q": "BTHD", "log_decay": "H"}``. An argument
        with a T is cut by time; B and H say where rows and heads lie.
    state_axes: the same for the State's leaves, beginning with N.
    reference: (inputs, initial_state) -> (y, State), the float64 definition, not packed.
    forward: (inputs, initial_state=, cu_seqlens=, return_state=, backend=) -> (y, State).
    identity: (inputs, documents) -> State, for inputs of that shape, dtype and device.
    summarize: (inputs, cu_seqlens=) -> State.
    combine: (earlier, later) -> State, over any leading axes.
    new_pool: (state, slots, capacity=None) -> pool of that many slots for States like ``state``; `step_` writes to it.
        ``capacity`` is how many tokens a slot can hold, where that matters (softmax).
    step_: (inputs, pool, slots) -> y for one token a row: inputs without their T axis, slots int32 [B], -1 idle.
    take, put_: (pool, slots) -> State and (pool, slots, state) -> None, the canonical State in and out of a pool.
    once: arguments that belong to the first segment alone (JRT's prefix); a continuation leaves them out.
    backends: names in the order of choice.
    """

    name: str
    axes: Mapping[str, str]
    state_axes: Mapping[str, str]
    reference: Callable[..., tuple[Tensor, Any]]
    forward: Callable[..., tuple[Tensor, Any]]
    identity: Callable[..., Any]
    summarize: Callable[..., Any]
    combine: Callable[[Any, Any], Any]
    new_pool: Callable[..., Any]
    step_: Callable[..., Tensor]
    take: Callable[..., Any]
    put_: Callable[..., None]
    once: frozenset[str] = frozenset()
    backends: tuple[str, ...] = ("torch",)


class Layer(Protocol):
    """A mixer with its projections: what a decoder block holds, built by the mixer's Config.

    Every layer.py has a frozen Config dataclass with ``build(d_model, layer, n_layers) -> Layer`` (layer counts from 0)
    and an nn.Module with these members.
    """

    mixer: Mixer

    def __call__(self, x: Tensor, state: Any, segment: Segment, return_state: bool = True) -> tuple[Tensor, Any]:
        """x [B, T, d_model] -> y [B, T, d_model] and the State after each document, or None."""
        ...

    def identity(self, documents: int) -> Any:
        """The State that has read nothing, for this layer's sizes, device and dtype."""
        ...

    def step_(self, x: Tensor, pool: Any, slots: Tensor, positions: Tensor) -> Tensor:
        """One token a row: x [B, d_model], slots int32 [B], positions int64 [B] -> y [B, d_model]; pool in place."""
        ...


def map_state(function: Callable[..., Tensor], *states: S) -> S:
    """The State whose leaves are ``function`` of the given States' leaves."""
    return type(states[0])(*(function(*leaves) for leaves in zip(*states, strict=True)))


def detach_state(state: S) -> S:
    """The same State without its history of gradients."""
    return map_state(torch.Tensor.detach, state)


def state_bytes(state: tuple) -> int:
    """Bytes that a State's tensors hold."""
    return sum(leaf.numel() * leaf.element_size() for leaf in state)


def select(condition: Tensor, x: S, y: S) -> S:
    """Leaf by leaf ``x`` where ``condition`` (over the leading axes), else ``y``."""

    def leaf(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(condition.reshape(condition.shape + (1,) * (b.ndim - condition.ndim)), a, b)

    return map_state(leaf, x, y)


def scan(combine: Combine, elements: S, fresh: Tensor | None = None) -> S:
    """Inclusive scan along the first axis: out[i] = elements[j] + ... + elements[i], j the last fresh place <= i.

    Args:
        combine: associative, over any leading axes.
        elements: leaves [n, rows, ...].
        fresh: bool [n, rows]; True where nothing earlier may enter. None: never.

    Recursive halving: O(n) combines in O(log n) steps, differentiable, no loop over n.
    """
    return _scan(combine, elements, fresh)[0]


def _scan(combine: Combine, x: S, fresh: Tensor | None) -> tuple[S, Tensor | None]:
    n = x[0].shape[0]
    if n == 1:
        return x, fresh

    def every(a: int, b: int | None = None, step: int = 2) -> tuple[S, Tensor | None]:
        return map_state(lambda leaf: leaf[a:b:step], x), None if fresh is None else fresh[a:b:step]

    pairs = _join(combine, every(0, n - n % 2), every(1))
    odd, odd_fresh = _scan(combine, *pairs)
    if n == 2:
        head = every(0, 1, 1)
        return _stack(head, (odd, odd_fresh))
    rest = (n - 1) // 2
    before = map_state(lambda leaf: leaf[:rest], odd), None if odd_fresh is None else odd_fresh[:rest]
    even = _stack(every(0, 1, 1), _join(combine, before, every(2)))
    return _interleave(even, (odd, odd_fresh))


def _join(combine: Combine, a: tuple[S, Any], b: tuple[S, Any]) -> tuple[S, Any]:
    """The operator of the scan with resets: b alone where b is fresh."""
    joined = combine(a[0], b[0])
    if b[1] is None:
        return joined, None
    return select(b[1], b[0], joined), a[1] | b[1]


def _stack(a: tuple[S, Any], b: tuple[S, Any]) -> tuple[S, Any]:
    cat = map_state(lambda x, y: torch.cat([x, y]), a[0], b[0])
    return cat, None if a[1] is None else torch.cat([a[1], b[1]])


def _interleave(even: tuple[S, Any], odd: tuple[S, Any]) -> tuple[S, Any]:
    """a0 b0 a1 b1 ...; ``even`` may be one longer."""

    def leaf(a: Tensor, b: Tensor) -> Tensor:
        paired = torch.stack([a[: len(b)], b], dim=1).flatten(0, 1)
        return paired if len(a) == len(b) else torch.cat([paired, a[len(b) :]])

    return map_state(leaf, even[0], odd[0]), None if even[1] is None else leaf(even[1], odd[1])
