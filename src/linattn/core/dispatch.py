"""One dispatcher for every mixer: the first backend that gives no reason to refuse a call runs it.

A backend refuses in words, as a pure function of a `Call`: shapes, strides, dtypes, device. So the decision can be
tested for machines one does not have, and the error says why each backend said no. A named backend obeys or raises;
there is no environment variable, no choice at import, and no exception is read as "unsupported".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from linattn.core.shapes import check_slot_values


class BackendError(ValueError):
    """No backend can run this call; the message says why, backend by backend."""


class Call(NamedTuple):
    """What a backend may look at to decide. Never data."""

    op: str
    shapes: Mapping[str, tuple[int, ...]]
    strides: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    device: str = "cpu"
    capability: tuple[int, int] | None = None
    needs_grad: bool = False
    options: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Backend:
    """One implementation of a mixer.

    refuses: reasons in words why it cannot run the call; [] means it can.
    forward: the op on checked arguments. step_: one token a row from a pool, or None.
    """

    name: str
    refuses: Callable[[Call], list[str]]
    forward: Callable[..., Any]
    step_: Callable[..., Any] | None = None


def describe(op: str, tensors: Mapping[str, Tensor | None], **options: Any) -> Call:
    """The `Call` that these tensors make. The first tensor gives dtype and device."""
    given = {name: x for name, x in tensors.items() if x is not None}
    first = next(iter(given.values()))
    return Call(
        op,
        {name: tuple(x.shape) for name, x in given.items()},
        {name: x.stride() for name, x in given.items()},
        first.dtype,
        first.device.type,
        torch.cuda.get_device_capability(first.device) if first.device.type == "cuda" else None,
        torch.is_grad_enabled() and any(x.requires_grad for x in given.values()),
        options,
    )


def choose(backends: Sequence[Backend], call: Call, wanted: str | None = None) -> Backend:
    """The backend that will run ``call``: the first that does not refuse, or the one named, or an error.

    Raises:
        ValueError: ``wanted`` names no backend of this op.
        BackendError: every backend asked refuses; the message lists the reasons of each.
    """
    pool = [b for b in backends if wanted is None or b.name == wanted]
    if not pool:
        raise ValueError(f"{call.op}: unknown backend {wanted!r}; choose from {[b.name for b in backends]}")
    for backend in pool:
        if not backend.refuses(call):
            return backend
    raise BackendError(explain(pool, call))


def layout_of(*tensors: Tensor | None) -> tuple[Any, ...]:
    """All of these tensors but where they lie and what they hold: shapes, strides, dtypes, devices."""
    return tuple([None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors])


def remembered(
    backends: Sequence[Backend], key: tuple[Any, ...], tensors: Sequence[Tensor | None], find: Callable[[], Backend]
) -> Backend:
    """What ``find`` returns once it has checked tensors of these layouts: found once, where nothing is traced.

    key: whatever else it depends on.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return find()
    signature = (key, layout_of(*[x for x in tensors if isinstance(x, Tensor)]))
    known, backend = _FOUND.get(signature, (None, None))
    if backend is None or known is not backends:
        backend = find()
        if len(_FOUND) >= _MOST_FOUND:
            _FOUND.clear()
        _FOUND[signature] = backends, backend
    return backend


def checked_step(
    op: str,
    backends: Sequence[Backend],
    key: tuple[Any, ...],
    inputs: Sequence[Tensor | None],
    pool: Any,
    slots: Tensor,
    find: Callable[[], Backend],
) -> Callable[..., Tensor]:
    """The step of what ``find`` returns once it has checked these layouts, `remembered`.

    The values of slots are checked each time. key: whatever else it depends on. A backend of an op that is itself a
    step has it as its forward.

    Raises:
        ValueError: what ``find`` and `check_slot_values` say.
    """
    leaves = pool if isinstance(pool, tuple) else ()
    found = remembered(backends, (op, type(pool), *key), (*inputs, slots, *leaves), find)
    check_slot_values(op, slots, pool)
    return found.step_ or found.forward


_FOUND: dict[Any, tuple[Sequence[Backend], Backend]] = {}
_MOST_FOUND = 4096


def explain(backends: Sequence[Backend], call: Call) -> str:
    """The call and every backend's answer to it, for people."""
    where = call.device
    if call.capability is not None:
        where += f", compute capability {call.capability[0]}.{call.capability[1]}"
    lines = [f"{call.op}: no backend can run this call ({call.dtype} on {where})"]
    lines += [f"    {name} {list(shape)}" for name, shape in call.shapes.items()]
    for backend in backends:
        lines += [f"  {backend.name}: {'; '.join(backend.refuses(call)) or 'can run it'}"]
    return "\n".join(lines)


def anything(call: Call) -> list[str]:
    """The refusals of a backend that runs every floating-point call on any device."""
    return [] if call.dtype.is_floating_point else [f"needs floating-point inputs, got {call.dtype}"]


def plain(*tensors: Tensor | None) -> bool:
    """Whether nothing but the call itself wants to see it: no trace, no mode, no transform, no subclass of tensors.

    Then an operator's body may be run past torch's dispatcher, whose layers cost more of the host's time than a launch.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or torch._C._are_functorch_transforms_active():
        return False
    return all(x is None or type(x) is Tensor or type(x) is Parameter for x in tensors)


def in_place(
    operator: Callable[..., Tensor], body: Callable[..., Tensor], written: Iterable[Tensor | None], *arguments: Any
) -> Tensor:
    """What a mutating ``operator`` with this body returns; past torch's dispatcher where nothing else wants to see it.

    written: the tensors that the body writes to, whose versions then say so, as the operator's would.
    """
    if not plain(*[x for x in arguments if isinstance(x, Tensor)]):
        return operator(*arguments)
    y = body(*arguments)
    torch.autograd.graph.increment_version([x for x in written if x is not None and not x.is_inference()])
    return y
