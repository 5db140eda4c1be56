"""The laws of a mixer: functions of (mixer, case, backend, dtype, device) that return what is broken, in words.

An empty list means that the law holds. tests/test_contract.py runs them over every mixer and backend, `linattn bench`
runs them before it times, and the GPU tests run them on real shapes. Everything is compared, per document and head,
with the float64 reference of the same inputs, forward and backward.

A case draws inputs: ``case.draw(length=, batch=, dtype=, device=, seed=)`` gives an op's keyword arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, Protocol
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from linattn.core.mixer import Mixer, map_state
from linattn.core.numerics import TORCH_TOLERANCE, relative_error, scale_floor

LENGTHS = (1, 2, 63, 64, 65, 127, 130, 1000)
DOCUMENTS = (3, 0, 64, 1, 130, 0)
"""Lengths of the packed documents: empty ones inside and last, one token, a whole chunk, more than a chunk."""


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


def parity(subject: Subject, length: int = 130) -> list[str]:
    """Law 1 (and 9, over lengths): outputs, final State and every gradient are the reference's, from nothing."""
    inputs = subject.draw(length)
    want = _measure(subject, _whole(subject.mixer.reference), _double(inputs), None, THROUGH)
    return _compare(subject, _measure(subject, _whole(subject.forward), inputs, None, THROUGH), want)


def parity_from_state(subject: Subject, length: int = 130) -> list[str]:
    """Law 1 from an initial State, its gradient included."""
    inputs, before = subject.draw(length), _a_state(subject)
    inputs = _continued(subject.mixer, inputs)
    want = _measure(subject, _whole(subject.mixer.reference), _double(inputs), _double_state(before), THROUGH)
    return _compare(subject, _measure(subject, _whole(subject.forward), inputs, before, THROUGH), want)


def decode_is_the_fold(subject: Subject, length: int = 70, prefill: int = 5) -> list[str]:
    """Law 2: prefill, then `step_` token by token, is the whole; the pool's other slots keep what they hold."""
    mixer, inputs = subject.mixer, subject.draw(length)
    with torch.no_grad():
        want_y, want_state = mixer.reference(_double(inputs))
        y, state = subject.forward(_cut(mixer, inputs, 0, prefill))
        pool = mixer.new_pool(state, 5, capacity=length)
        slots = torch.tensor([3, 0], device=subject.device, dtype=torch.int32)
        other = torch.tensor([1], device=subject.device, dtype=torch.int32)
        mixer.put_(pool, slots, state)
        mixer.put_(pool, other, map_state(lambda leaf: leaf[:1], state))
        idle = torch.tensor([-1], device=subject.device, dtype=torch.int32)
        ys = [y]
        for t in range(prefill, length):
            token = _token(mixer, _continued(mixer, inputs), t)
            token = {n: _pad_row(mixer, n, x) for n, x in token.items()}
            ys.append(mixer.step_(token, pool, torch.cat([slots, idle]), backend=subject.backend)[:-1, None])
        got = Result(*_split({"y": torch.cat(ys, 1), **_leaves("state", mixer.take(pool, slots))}))
        want = Result(*_split({"y": want_y, **_leaves("state", want_state)}))
        untouched = mixer.take(pool, other)
    wrong = _compare(subject, got, want)
    for name, leaf in _leaves("state", untouched).items():
        if not torch.equal(leaf, _leaves("state", state)[name][:1]):
            wrong.append(f"{name} of a slot that no row named has changed")
    return wrong


def a_split_is_the_whole(subject: Subject, length: int = 140) -> list[str]:
    """Law 3: cut anywhere, the second part read from the State of the first."""
    wrong = []
    inputs = subject.draw(length)
    want = _measure(subject, _whole(subject.mixer.reference), _double(inputs), None)
    for at in (1, 63, 64, 100, length - 1):

        def pieces(parts: dict[str, Any], initial_state: Any = None, at: int = at) -> tuple[Tensor, Any]:
            first, state = subject.forward(_cut(subject.mixer, parts, 0, at))
            second, state = subject.forward(_cut(subject.mixer, parts, at, length), initial_state=state)
            return torch.cat([first, second], 1), state

        wrong += [f"split at {at}: {w}" for w in _compare(subject, _measure(subject, pieces, inputs, None), want)]
    return wrong


def combine_is_a_monoid(subject: Subject, length: int = 140) -> list[str]:
    """Law 4: identity is neutral, combine is associative, and summaries combined are the State of the whole."""
    mixer, inputs = subject.mixer, subject.draw(length)
    a, b, c = (mixer.summarize(_cut(mixer, inputs, *ends)) for ends in ((0, 3), (3, 80), (80, length)))
    nothing = mixer.identity(inputs, 2)
    left, right = mixer.combine(mixer.combine(a, b), c), mixer.combine(a, mixer.combine(b, c))
    want = mixer.reference(_double(inputs))[1]
    wrong = []
    for name, got, wanted in (
        ("nothing + a", mixer.combine(nothing, a), a),
        ("a + nothing", mixer.combine(a, nothing), a),
        ("(a + b) + c", left, right),
        ("a + b + c", left, want),
    ):
        a_state, b_state = (Result(*_split(_leaves("state", s))) for s in (got, wanted))
        wrong += [f"{name}: {w}" for w in _compare(subject, a_state, b_state)]
    return wrong


def ranks_are_one(subject: Subject, length: int = 140, cuts: tuple[int, ...] = (1, 40, 104)) -> list[str]:
    """Law 5: unequal slices, each read from the combined summaries of those before it."""
    mixer, inputs = subject.mixer, subject.draw(length)
    ends = (0, *cuts, length)

    def ranks(parts: dict[str, Any], initial_state: Any = None) -> tuple[Tensor, Any]:
        slices = [_cut(mixer, parts, a, b) for a, b in pairwise(ends)]
        before, ys, state = None, [], None
        for piece in slices:
            y, state = subject.forward(piece, initial_state=before)
            ys.append(y)
            summary = mixer.summarize(piece)
            before = summary if before is None else mixer.combine(before, summary)
        return torch.cat(ys, 1), state

    want = _measure(subject, _whole(mixer.reference), _double(inputs), None)
    return _compare(subject, _measure(subject, ranks, inputs, None), want)


def packed_is_alone(subject: Subject) -> list[str]:
    """Law 6: packed documents, with and without initial States, are the documents alone; a NaN does not leave its own.

    Gradients too. Empty documents keep their State.
    """
    mixer = subject.mixer
    documents = [subject.draw(max(n, 1), batch=1, seed=i) for i, n in enumerate(DOCUMENTS)]
    documents = [_cut(mixer, d, 0, n) for d, n in zip(documents, DOCUMENTS, strict=True)]
    wrong = []
    for name, states in (("", None), ("from States, ", _a_state(subject, len(DOCUMENTS)))):
        # Parameters shared by all documents (a decay, a filter) come from the first.
        shared = {n: x for n, x in documents[0].items() if not _per_row(mixer, n)}
        parts = [{**d, **shared} for d in documents]
        if states is not None:
            parts = [_continued(mixer, d) for d in parts]
        packed, cu = _pack(mixer, parts, subject.device)

        def alone(both: dict[str, Any], initial_state: Any = None, parts: list = parts) -> tuple[Tensor, Any]:
            ys, finals = [], []
            for i, d in enumerate(_unpack(mixer, both, parts)):
                state = None if initial_state is None else map_state(lambda leaf, i=i: leaf[i : i + 1], initial_state)
                if DOCUMENTS[i] == 0:
                    finals.append(_nothing(mixer, d, state))
                    continue
                y, final = mixer.reference(d, state)
                ys.append(y)
                finals.append(final)
            return torch.cat(ys, 1), map_state(lambda *leaves: torch.cat(_same_capacity(leaves)), *finals)

        def together(both: dict[str, Any], initial_state: Any = None, cu: Tensor = cu) -> tuple[Tensor, Any]:
            return subject.forward(both, initial_state=initial_state, cu_seqlens=cu)

        want = _measure(subject, alone, _double(packed), _double_state(states))
        got = _measure(subject, together, packed, states)
        wrong += [f"{name}{w}" for w in _compare(subject, got, want, packed=cu)]
    return wrong + _nan_stays(subject, parts=documents)


def permuting_permutes(subject: Subject, length: int = 70) -> list[str]:
    """Law 7: permuting batch rows or heads permutes outputs and States."""
    mixer, wrong = subject.mixer, []
    inputs = subject.draw(length, batch=3)
    y, state = subject.forward(inputs)
    sizes = {
        x.shape[axes.index("H")] for n, axes in mixer.axes.items() if "H" in axes and (x := inputs.get(n)) is not None
    }
    letters = ["B"] + (["H"] if len(sizes) == 1 else [])
    for letter in letters:
        count = 3 if letter == "B" else sizes.copy().pop()
        order = torch.arange(count, device=subject.device).roll(1)
        moved = {n: _permute(x, mixer.axes.get(n, ""), letter, order) for n, x in inputs.items()}
        got_y, got_state = subject.forward(moved)
        state_letter = "N" if letter == "B" else "H"
        want = {"y": y.index_select(0 if letter == "B" else 2, order)}
        for name, leaf in zip(type(state)._fields, state, strict=True):
            want[f"state.{name}"] = _permute(leaf, mixer.state_axes[name], state_letter, order)
        got = {"y": got_y, **_leaves("state", got_state)}
        wrong += [f"{letter}: {w}" for w in _compare(subject, Result(*_split(got)), Result(*_split(want)))]
    return wrong


def the_future_is_unseen(subject: Subject, length: int = 140) -> list[str]:
    """Law 8: changing later tokens leaves earlier outputs as they are, and no gradient flows back to them."""
    mixer, wrong = subject.mixer, []
    inputs = subject.draw(length)
    names = [n for n in inputs if "T" in mixer.axes.get(n, "")]
    for at in (1, 64, 100):
        leaves = {n: inputs[n].detach().clone().requires_grad_() for n in names}
        y, _ = subject.forward({**inputs, **leaves})
        y[:, :at].float().square().sum().backward()
        for n in names:
            grad = leaves[n].grad
            if grad is not None and grad[:, at:].abs().max() != 0:
                wrong.append(f"y[:{at}] has a gradient to {n}[{at}:]")
        changed = {n: torch.cat([inputs[n][:, :at], inputs[n][:, at:] + 1], 1) for n in names}
        got, _ = subject.forward({**inputs, **changed})
        error = relative_error(got[:, :at], y[:, :at], (0,))
        if error > subject.tolerance:
            wrong.append(f"y[:{at}] moved by {error:.1e} when later tokens changed")
    return wrong


def nothing_is_uninitialised(subject: Subject, length: int = 130) -> list[str]:
    """Law 10: with fresh memory full of NaN, everything returned is finite; packed with an empty last document too."""
    wrong = []
    documents = [_cut(subject.mixer, subject.draw(max(n, 1), 1, i), 0, n) for i, n in enumerate(DOCUMENTS)]
    packed, cu = _pack(subject.mixer, documents, subject.device)
    for name, inputs, options in (("", subject.draw(length), {}), ("packed: ", packed, {"cu_seqlens": cu})):
        with poisoned_memory():
            got = _measure(subject, lambda x, initial_state=None, o=options: subject.forward(x, **o), inputs, None)
        wrong += [f"{name}{n} is not finite" for n, x in got.values.items() if not torch.isfinite(x).all()]
    return wrong


def twice_is_the_same(subject: Subject, length: int = 130) -> list[str]:
    """Law 11: the same call gives the same bits."""
    first, second = (_measure(subject, _whole(subject.forward), subject.draw(length), None) for _ in range(2))
    return [f"{n} differs between two runs" for n, x in first.values.items() if not torch.equal(x, second.values[n])]


LAWS: dict[str, Callable[[Subject], list[str]]] = {
    f.__name__: f
    for f in (
        parity,
        parity_from_state,
        decode_is_the_fold,
        a_split_is_the_whole,
        combine_is_a_monoid,
        ranks_are_one,
        packed_is_alone,
        permuting_permutes,
        the_future_is_unseen,
        nothing_is_uninitialised,
        twice_is_the_same,
    )
}


def broken_laws(subject: Subject, laws: dict[str, Callable[[Subject], list[str]]] = LAWS) -> dict[str, list[str]]:
    """The laws that do not hold, and how; an error raised counts as one."""
    broken = {}
    for name, law in laws.items():
        try:
            wrong = law(subject)
        except Exception as error:  # noqa: BLE001  a law that cannot even run is broken, and the gate must say so
            wrong = [f"{type(error).__name__}: {error}"]
        if wrong:
            broken[name] = wrong
    return broken


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


def _whole(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(inputs: dict[str, Any], initial_state: Any = None) -> tuple[Tensor, Any]:
        return function(inputs, initial_state=initial_state)

    return run


BOTH = ("",)
THROUGH = (*BOTH, " through y", " through the State")
"""What the gradients that `_measure` takes come through.

Apart, because in their sum the larger hides what is wrong with the smaller: in taylor's dk what comes through y,
divided by the tokens' weights, is some tenth of the rest after 130 tokens, and 16 bits allow for a tenth of that.
"""


def _measure(
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
    outputs = {"y": y, **_leaves("state", state)}
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
    return Result(*_split({n: x.detach() for n, x in outputs.items()}))


def _compare(subject: Subject, got: Result, want: Result, packed: Tensor | None = None) -> list[str]:
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


def _split(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    values = {n: x for n, x in tensors.items() if x.is_floating_point()}
    return values, {n: x for n, x in tensors.items() if not x.is_floating_point()}


def _leaves(name: str, state: Any) -> dict[str, Tensor]:
    return {f"{name}.{field}": leaf for field, leaf in zip(type(state)._fields, state, strict=True)}


def _double(inputs: dict[str, Any]) -> dict[str, Any]:
    return {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in inputs.items()}


def _double_state(state: Any) -> Any:
    return None if state is None else map_state(lambda x: x.double() if x.is_floating_point() else x, state)


def _cut(mixer: Mixer, inputs: dict[str, Any], a: int, b: int) -> dict[str, Any]:
    """Tokens a to b; what belongs to the first segment alone goes only with it."""
    kept = {n: x for n, x in inputs.items() if a == 0 or n not in mixer.once}
    return {n: x[:, a:b] if isinstance(x, Tensor) and "T" in mixer.axes.get(n, "") else x for n, x in kept.items()}


def _continued(mixer: Mixer, inputs: dict[str, Any]) -> dict[str, Any]:
    return {n: x for n, x in inputs.items() if n not in mixer.once}


def _token(mixer: Mixer, inputs: dict[str, Any], t: int) -> dict[str, Any]:
    return {n: x[:, t] if isinstance(x, Tensor) and "T" in mixer.axes.get(n, "") else x for n, x in inputs.items()}


def _pad_row(mixer: Mixer, name: str, x: Any) -> Any:
    """One idle row of NaN under the others: it must neither be written to a pool nor disturb them."""
    if not isinstance(x, Tensor) or "T" not in mixer.axes.get(name, ""):
        return x
    return torch.cat([x, torch.full_like(x[:1], float("nan"))])


def _same_capacity(leaves: tuple[Tensor, ...]) -> list[Tensor]:
    """Leaves whose second axis is a capacity (softmax: a place a token), filled up with zeros to the largest."""
    if leaves[0].ndim < 2:
        return list(leaves)
    largest = max(leaf.shape[1] for leaf in leaves)
    return [F.pad(leaf, (0, 0) * (leaf.ndim - 2) + (0, largest - leaf.shape[1])) for leaf in leaves]


def _per_row(mixer: Mixer, name: str) -> bool:
    return "B" in mixer.axes.get(name, "")


def _pack(mixer: Mixer, documents: list[dict[str, Any]], device: str) -> tuple[dict[str, Any], Tensor]:
    packed = dict(documents[0])
    for name, axes in mixer.axes.items():
        if name in packed and isinstance(packed[name], Tensor) and "B" in axes:
            packed[name] = torch.cat([d[name] for d in documents], 1 if axes[1:2] in ("T", "M") else 0)
            if axes[1:2] == "M":
                packed["cu_prefix"] = _offsets([d[name].shape[1] for d in documents], device)
    return packed, _offsets(list(DOCUMENTS), device)


def _unpack(mixer: Mixer, packed: dict[str, Any], documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The documents again, cut from the packed tensors, so that gradients reach those."""
    parts = [{n: x for n, x in packed.items() if n != "cu_prefix"} for _ in documents]
    for name, axes in mixer.axes.items():
        if name in packed and isinstance(packed[name], Tensor) and "B" in axes:
            axis = 1 if axes[1:2] in ("T", "M") else 0
            pieces = packed[name].split([d[name].shape[axis] for d in documents], axis)
            for part, piece in zip(parts, pieces, strict=True):
                part[name] = piece
    return parts


def _offsets(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def _nothing(mixer: Mixer, inputs: dict[str, Any], state: Any) -> Any:
    """The State after an empty document: what it began with, or its prefix alone."""
    if state is not None:
        return state
    return mixer.summarize(inputs) if mixer.once & inputs.keys() else mixer.identity(inputs, 1)


def _nan_stays(subject: Subject, parts: list[dict[str, Any]]) -> list[str]:
    mixer = subject.mixer
    tokens = [n for n, axes in mixer.axes.items() if "T" in axes and n in parts[0]]
    bad = DOCUMENTS.index(64)
    spoiled = [
        {**d, **{n: torch.full_like(d[n], float("nan")) for n in tokens}} if i == bad else d
        for i, d in enumerate(parts)
    ]
    packed, cu = _pack(mixer, spoiled, subject.device)
    y, state = subject.forward(packed, cu_seqlens=cu)
    a, b = int(cu[bad]), int(cu[bad + 1])
    rest = torch.cat([y[:, :a], y[:, b:]], 1)
    others = [i for i in range(len(DOCUMENTS)) if i != bad]
    wrong = [] if torch.isfinite(rest).all() else ["a NaN in one document reached the outputs of another"]
    for name, leaf in _leaves("state", state).items():
        if leaf.is_floating_point() and not torch.isfinite(leaf[others]).all():
            wrong.append(f"a NaN in one document reached {name} of another")
    return wrong


def _a_state(subject: Subject, rows: int = 2) -> Any:
    """A State such as a model would hand over: that of 90 tokens."""
    inputs = subject.draw(90, batch=rows, seed=7)
    with torch.no_grad():
        state = subject.mixer.reference(_double(inputs))[1]
    like = subject.mixer.identity(inputs, rows)
    return map_state(lambda x, y: x.to(y.dtype), state, like)


def _permute(x: Any, axes: str, letter: str, order: Tensor) -> Any:
    return x.index_select(axes.index(letter), order) if isinstance(x, Tensor) and letter in axes else x
