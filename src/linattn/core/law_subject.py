"""What a law is asked about, and how an answer is judged: outputs and gradients, by name, against the reference's.

Everything is compared per document and head; see laws.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, Protocol
from unittest import mock

import torch
from torch import Tensor

from linattn.core.mixer import Mixer
from linattn.core.numerics import TORCH_TOLERANCE, relative_error, scale_floor


class Case(Protocol):
    """A named shape with its source; see a mixer's cases.py."""

    @property
    def name(self) -> str:
        """Spelled like b4-h32-t2048-d128."""
        ...

    def draw(self, *, length: int, batch: int, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
        """The op's keyword arguments, freshly drawn."""
        ...


class Subject(NamedTuple):
    """What a law is asked about."""

    mixer: Mixer
    case: Case
    backend: str = "torch"
    dtype: torch.dtype = torch.float64
    device: str = "cpu"

    @property
    def tolerance(self) -> float:
        """Relative; backends other than torch get twice the torch backend's."""
        return TORCH_TOLERANCE[self.dtype] * (1 if self.backend == "torch" else 2)

    def draw(self, length: int, batch: int = 2, seed: int = 0) -> dict[str, Any]:
        """Inputs of this case, dtype and device."""
        return self.case.draw(length=length, batch=batch, dtype=self.dtype, device=self.device, seed=seed)

    def forward(self, inputs: dict[str, Any], **options: Any) -> tuple[Tensor, Any]:
        """The op under test."""
        return self.mixer.forward(inputs, backend=self.backend, **options)


class Result(NamedTuple):
    """Outputs and gradients by name; integers (counts) apart, because they must agree exactly."""

    values: dict[str, Tensor]
    counts: dict[str, Tensor]

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Result:
        """Sorted by dtype."""
        values = {n: x for n, x in tensors.items() if x.is_floating_point()}
        return cls(values, {n: x for n, x in tensors.items() if n not in values})


BOTH = ("",)
THROUGH = (*BOTH, " through y", " through the State")
"""What the gradients that `measure` takes come through.

Apart, because in their sum the larger hides what is wrong with the smaller: in taylor's dk what comes through y,
divided by the tokens' weights, is some tenth of the rest after 130 tokens, and 16 bits allow for a tenth of that.
"""


def measure(
    subject: Subject,
    function: Callable[..., Any],
    inputs: dict[str, Any],
    initial_state: Any,
    through: tuple[str, ...] = BOTH,
) -> Result:
    """Outputs, final State and gradients of a fixed random functional of them, for every floating-point input."""
    leaves = {n: x for n, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()}
    leaves = {n: x.detach().clone().requires_grad_() for n, x in leaves.items()}
    if initial_state is not None:
        fields = zip(type(initial_state)._fields, initial_state, strict=True)
        before = {n: x.detach().clone().requires_grad_(x.is_floating_point()) for n, x in fields}
        initial_state = type(initial_state)(**before)
        leaves |= {f"initial_state.{n}": x for n, x in before.items() if x.is_floating_point()}
    y, state = function(inputs | {n: x for n, x in leaves.items() if n in inputs}, initial_state)
    outputs = {"y": y, **leaves_of("state", state)}
    generator = torch.Generator().manual_seed(1)
    losses = {name: torch.zeros((), dtype=torch.float64, device=y.device) for name in through}
    for output, x in list(outputs.items()):
        if x.is_floating_point() and x.requires_grad:
            # Rounded to the op's dtype, so that op and reference are handed the same gradient of y.
            weight = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, subject.dtype)
            share = (x.double() * weight.double()).sum()
            for path in {"", THROUGH[1 if output == "y" else 2]} & losses.keys():
                losses[path] = losses[path] + share
    for path, loss in losses.items():
        gradients: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            outputs[f"gradient of {name}{path}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return Result.of({n: x.detach() for n, x in outputs.items()})


def compare(subject: Subject, got: Result, want: Result, packed: Tensor | None = None) -> list[str]:
    """What differs, in words; packed: cu_seqlens, each of whose documents is judged by itself."""
    wrong = []
    for name, wanted in want.values.items():
        units = _units(subject.mixer, name, got.values[name], wanted, packed)
        # A document of one token has gradients that are zero but for rounding, and a parameter's is one sum over rows
        # and tokens that may cancel: both are held to the whole's scale.
        shared = name.startswith("gradient of ") and not set("BN") & set(_axes_of(subject.mixer, name, wanted))
        floor = scale_floor(wanted) * (1 if packed is None and not shared else 10)
        error = max((relative_error(g, w, keep, floor) for g, w, keep in units), default=0.0)
        if not error <= subject.tolerance:
            wrong.append(f"{name} is off by {error:.1e}, allowed {subject.tolerance:.0e}")
    for name, wanted in want.counts.items():
        if not torch.equal(got.counts[name].long(), wanted.long()):
            wrong.append(f"{name} is {got.counts[name].tolist()}, should be {wanted.tolist()}")
    return wrong


def _units(
    mixer: Mixer, name: str, got: Tensor, want: Tensor, packed: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, tuple[int, ...]]]:
    """The tensor cut into what is judged by itself: per document, batch row and head."""
    axes = _axes_of(mixer, name, want)
    keep = tuple(i for i, letter in enumerate(axes) if letter in "BNH")
    if packed is None or "T" not in axes or got.shape != want.shape:
        yield got, want, keep
        return
    ends = packed.tolist()
    for a, b in pairwise(ends):
        yield got[:, a:b], want[:, a:b], keep


def _axes_of(mixer: Mixer, name: str, x: Tensor) -> str:
    leaf = name.removeprefix("gradient of ").removesuffix(THROUGH[1]).removesuffix(THROUGH[2])
    if leaf == "y":
        return "BTHV" if x.ndim == 4 else "BTD"
    if "state." in leaf:
        return mixer.state_axes[leaf.split(".")[1]]
    return mixer.axes.get(leaf, "")


def leaves_of(name: str, state: Any) -> dict[str, Tensor]:
    """A State's tensors as name.field."""
    return {f"{name}.{field}": leaf for field, leaf in zip(type(state)._fields, state, strict=True)}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty and its kin return with NaN (integers: their largest value)."""

    def poison(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*args: Any, **kwargs: Any) -> Tensor:
            x = function(*args, **kwargs)
            with torch.no_grad():
                return x.fill_(float("nan") if x.is_floating_point() else _largest(x.dtype))

        return empty

    with (
        mock.patch.object(torch, "empty", poison(torch.empty)),
        mock.patch.object(torch, "empty_like", poison(torch.empty_like)),
        mock.patch.object(torch, "empty_strided", poison(torch.empty_strided)),
        mock.patch.object(Tensor, "new_empty", poison(Tensor.new_empty)),
    ):
        yield


def _largest(dtype: torch.dtype) -> int:
    return 1 if dtype == torch.bool else torch.iinfo(dtype).max
