"""The gate: nothing is timed that does not keep the laws.

The laws run on a small version of the case, in its dtype, on its device and backend. On a GPU the op at full size is
held against the float64 torch backend too, first and last row and head, whose own laws the small version stands for.

    pytest tests/test_bench.py -k gate
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from linattn.bench.cases import BenchCase
from linattn.core.laws import LAWS, Subject, broken_laws
from linattn.core.mixer import Mixer
from linattn.core.numerics import TORCH_TOLERANCE, relative_error, scale_floor
from linattn.mixers.prefix.cases import PrefixCase
from linattn.mixers.shortconv.cases import ShortConvCase

OK = "ok"

BACKWARD_TOKENS = 2**18
"""Longest sequence whose gradients are compared: in float64 a head of 128 keeps some 2 GB for backward."""


def gate(
    mixer: Mixer,
    case: BenchCase,
    *,
    backend: str | None,
    dtype: torch.dtype,
    device: str,
    laws: Sequence[str] = (),
    say: Callable[[str], object] | None = None,
) -> str:
    """The verdict on the small version of ``case``: "ok", or the names of the broken laws, separated by spaces.

    With no backend named it is that of whichever the op chooses, held to the tolerance of one that is not torch's.
    ``laws`` are the names of those to run, none: all. ``say`` is told what is wrong, a line each.
    """
    named: Any = backend
    chosen = {n: law for n, law in LAWS.items() if not laws or n in laws}
    broken = broken_laws(Subject(mixer, small(case), named, dtype, device), chosen)
    for name, wrong in broken.items():
        if say is not None:
            say(f"{mixer.name} {small(case).name}, {name}: {'; '.join(wrong[:3])}")
    return " ".join(broken) or OK


def check_laws(names: Sequence[str]) -> None:
    """Refuse a law that is not in `LAWS`, naming those that are."""
    for name in names:
        if name not in LAWS:
            raise ValueError(f"unknown law {name!r}; choose from {list(LAWS)}")


def small(case: BenchCase) -> BenchCase:
    """The case with two heads (64 channels), unless heads are grouped. The laws choose batch and length."""
    if isinstance(case, ShortConvCase):
        return replace(case, channels=min(case.channels, 64))
    if isinstance(case, PrefixCase):
        return replace(case, tokens=_two_heads(case.tokens), prefix=min(case.prefix, 65))
    return _two_heads(case)


def _two_heads(case: Any) -> Any:
    counts = ("q_heads", "k_heads", "v_heads", "kv_heads", "state_heads")
    grouped = any(getattr(case, name, None) for name in counts)
    return replace(case, batch=2, length=130, **({} if grouped else {"heads": min(case.heads, 2)}))


def parity_at_size(mixer: Mixer, inputs: dict[str, Any], *, backend: str | None) -> str:
    """ "ok", or what is off: the op on all of ``inputs`` against float64 on their first and last row and head.

    Outputs always, gradients of everything with tokens where a sequence has at most `BACKWARD_TOKENS`.
    """
    tokens = [n for n, x in inputs.items() if isinstance(x, Tensor) and "B" in mixer.axes.get(n, "") and x.ndim > 1]
    leaves = {n: inputs[n].detach().requires_grad_() for n in tokens}
    longest = max(inputs[n].shape[1] for n in tokens)
    with torch.set_grad_enabled(longest <= BACKWARD_TOKENS):
        y, _ = mixer.forward({**inputs, **leaves}, return_state=False, backend=backend)
        dy = torch.randn_like(y)
        got = {"y": y.detach(), **_gradients(y, dy, leaves)}
        wrong = set()
        for end in (0, -1):
            piece = {n: _end(mixer, inputs, n, end) for n in inputs}
            wide = {n: piece[n].requires_grad_() if n in leaves else piece[n] for n in piece}
            want_y, _ = mixer.forward(wide, return_state=False, backend="torch")
            want_dy = _slice(dy, "BTH", end, _one_head(mixer, inputs)).to(want_y.dtype)
            want = {"y": want_y.detach(), **_gradients(want_y, want_dy, {n: wide[n] for n in leaves})}
            for name, wanted in want.items():
                axes = "BTH" if name == "y" else mixer.axes[name]
                part = _slice(got[name], axes, end, _one_head(mixer, inputs))
                if not relative_error(part, wanted, (), scale_floor(wanted)) <= 2 * TORCH_TOLERANCE[y.dtype]:
                    wrong.add(f"{name}-at-size")
    return " ".join(sorted(wrong)) or OK


def _gradients(y: Tensor, dy: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    if not y.requires_grad:
        return {}
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


def _one_head(mixer: Mixer, inputs: dict[str, Any]) -> bool:
    """Whether a head can be judged alone: every argument has as many. Channels of a convolution count as heads."""
    axes = {n: mixer.axes.get(n, "") for n, x in inputs.items() if isinstance(x, Tensor)}
    return len({inputs[n].shape[a.index("H")] for n, a in axes.items() if "H" in a}) == 1


def _end(mixer: Mixer, inputs: dict[str, Any], name: str, end: int) -> Any:
    x = inputs[name]
    if not isinstance(x, Tensor):
        return x
    x = _slice(x, mixer.axes.get(name, ""), end, _one_head(mixer, inputs))
    return x.detach().double() if x.is_floating_point() else x


def _slice(x: Tensor, axes: str, end: int, one_head: bool) -> Tensor:
    """The first (0) or last (-1) row, and head where heads can stand alone; axes are kept."""
    for letter in "BH" if one_head else "B":
        if letter in axes:
            axis = axes.index(letter)
            x = x.narrow(axis, 0 if end == 0 else x.shape[axis] - 1, 1)
    return x
