"""The laws of a mixer: functions of (mixer, case, backend, dtype, device) that return what is broken, in words.

An empty list means that the law holds. tests/test_contract.py runs them over every mixer and backend, `linattn bench`
runs them before it times, and the GPU tests run them on real shapes. Everything is compared, per document and head,
with the float64 reference of the same inputs, forward and backward.

A case draws inputs: ``case.draw(length=, batch=, dtype=, device=, seed=)`` gives an op's keyword arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linattn.core.law_inputs import continued, cut, double, double_state, pack, pad_row, permute, token_of, unpack
from linattn.core.law_subject import (
    THROUGH,
    Result,
    Subject,
    compare,
    leaves_of,
    measure,
    poisoned_memory,
)
from linattn.core.mixer import Mixer, map_state
from linattn.core.numerics import relative_error

LENGTHS = (1, 2, 63, 64, 65, 127, 130, 1000)
DOCUMENTS = (3, 0, 64, 1, 130, 0)
"""Lengths of the packed documents: empty ones inside and last, one token, a whole chunk, more than a chunk."""


def parity(subject: Subject, length: int = 130) -> list[str]:
    """Law 1 (and 9, over lengths): outputs, final State and every gradient are the reference's, from nothing."""
    inputs = subject.draw(length)
    want = measure(subject, _whole(subject.mixer.reference), double(inputs), None, THROUGH)
    return compare(subject, measure(subject, _whole(subject.forward), inputs, None, THROUGH), want)


def parity_from_state(subject: Subject, length: int = 130) -> list[str]:
    """Law 1 from an initial State, its gradient included."""
    inputs, before = subject.draw(length), _a_state(subject)
    inputs = continued(subject.mixer, inputs)
    want = measure(subject, _whole(subject.mixer.reference), double(inputs), double_state(before), THROUGH)
    return compare(subject, measure(subject, _whole(subject.forward), inputs, before, THROUGH), want)


def decode_is_the_fold(subject: Subject, length: int = 70, prefill: int = 5) -> list[str]:
    """Law 2: prefill, then `step_` token by token, is the whole; the pool's other slots keep what they hold."""
    mixer, inputs = subject.mixer, subject.draw(length)
    with torch.no_grad():
        want_y, want_state = mixer.reference(double(inputs))
        y, state = subject.forward(cut(mixer, inputs, 0, prefill))
        pool = mixer.new_pool(state, 5, capacity=length)
        slots = torch.tensor([3, 0], device=subject.device, dtype=torch.int32)
        other = torch.tensor([1], device=subject.device, dtype=torch.int32)
        mixer.put_(pool, slots, state)
        mixer.put_(pool, other, map_state(lambda leaf: leaf[:1], state))
        # The last row is idle; every second number of a table, as a scheduler may keep one.
        rows = torch.tensor([3, 9, 0, 9, -1, 9], device=subject.device, dtype=torch.int32)[::2]
        ys = [y]
        for t in range(prefill, length):
            token = token_of(mixer, continued(mixer, inputs), t)
            token = {n: pad_row(mixer, n, x) for n, x in token.items()}
            ys.append(mixer.step_(token, pool, rows, backend=subject.backend)[:-1, None])
        got = Result.of({"y": torch.cat(ys, 1), **leaves_of("state", mixer.take(pool, slots))})
        want = Result.of({"y": want_y, **leaves_of("state", want_state)})
        untouched = mixer.take(pool, other)
    wrong = compare(subject, got, want)
    for name, leaf in leaves_of("state", untouched).items():
        if not torch.equal(leaf, leaves_of("state", state)[name][:1]):
            wrong.append(f"{name} of a slot that no row named has changed")
    return wrong


def a_split_is_the_whole(subject: Subject, length: int = 140) -> list[str]:
    """Law 3: cut anywhere, the second part read from the State of the first."""
    wrong = []
    inputs = subject.draw(length)
    want = measure(subject, _whole(subject.mixer.reference), double(inputs), None)
    for at in (1, 63, 64, 100, length - 1):

        def pieces(parts: dict[str, Any], initial_state: Any = None, at: int = at) -> tuple[Tensor, Any]:
            first, state = subject.forward(cut(subject.mixer, parts, 0, at))
            second, state = subject.forward(cut(subject.mixer, parts, at, length), initial_state=state)
            return torch.cat([first, second], 1), state

        wrong += [f"split at {at}: {w}" for w in compare(subject, measure(subject, pieces, inputs, None), want)]
    return wrong


def combine_is_a_monoid(subject: Subject, length: int = 140) -> list[str]:
    """Law 4: identity is neutral, combine is associative, and summaries combined are the State of the whole."""
    mixer, inputs = subject.mixer, subject.draw(length)
    a, b, c = (mixer.summarize(cut(mixer, inputs, *ends)) for ends in ((0, 3), (3, 80), (80, length)))
    nothing = mixer.identity(inputs, 2)
    left, right = mixer.combine(mixer.combine(a, b), c), mixer.combine(a, mixer.combine(b, c))
    want = mixer.reference(double(inputs))[1]
    wrong = []
    for name, got, wanted in (
        ("nothing + a", mixer.combine(nothing, a), a),
        ("a + nothing", mixer.combine(a, nothing), a),
        ("(a + b) + c", left, right),
        ("a + b + c", left, want),
    ):
        a_state, b_state = (Result.of(leaves_of("state", s)) for s in (got, wanted))
        wrong += [f"{name}: {w}" for w in compare(subject, a_state, b_state)]
    return wrong


def ranks_are_one(subject: Subject, length: int = 140, cuts: tuple[int, ...] = (1, 40, 104)) -> list[str]:
    """Law 5: unequal slices, each read from the combined summaries of those before it."""
    mixer, inputs = subject.mixer, subject.draw(length)
    ends = (0, *cuts, length)

    def ranks(parts: dict[str, Any], initial_state: Any = None) -> tuple[Tensor, Any]:
        slices = [cut(mixer, parts, a, b) for a, b in pairwise(ends)]
        before, ys, state = None, [], None
        for piece in slices:
            y, state = subject.forward(piece, initial_state=before)
            ys.append(y)
            summary = mixer.summarize(piece)
            before = summary if before is None else mixer.combine(before, summary)
        return torch.cat(ys, 1), state

    want = measure(subject, _whole(mixer.reference), double(inputs), None)
    return compare(subject, measure(subject, ranks, inputs, None), want)


def packed_is_alone(subject: Subject) -> list[str]:
    """Law 6: packed documents, with and without initial States, are the documents alone; a NaN does not leave its own.

    Gradients too. Empty documents keep their State.
    """
    mixer = subject.mixer
    documents = [subject.draw(max(n, 1), batch=1, seed=i) for i, n in enumerate(DOCUMENTS)]
    documents = [cut(mixer, d, 0, n) for d, n in zip(documents, DOCUMENTS, strict=True)]
    wrong = []
    for name, states in (("", None), ("from States, ", _a_state(subject, len(DOCUMENTS)))):
        # Parameters shared by all documents (a decay, a filter) come from the first.
        shared = {n: x for n, x in documents[0].items() if not _per_row(mixer, n)}
        parts = [{**d, **shared} for d in documents]
        if states is not None:
            parts = [continued(mixer, d) for d in parts]
        packed, cu = pack(mixer, parts, subject.device)

        def alone(both: dict[str, Any], initial_state: Any = None, parts: list = parts) -> tuple[Tensor, Any]:
            ys, finals = [], []
            for i, d in enumerate(unpack(mixer, both, parts)):
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

        want = measure(subject, alone, double(packed), double_state(states))
        got = measure(subject, together, packed, states)
        wrong += [f"{name}{w}" for w in compare(subject, got, want, packed=cu)]
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
        moved = {n: permute(x, mixer.axes.get(n, ""), letter, order) for n, x in inputs.items()}
        got_y, got_state = subject.forward(moved)
        state_letter = "N" if letter == "B" else "H"
        want = {"y": y.index_select(0 if letter == "B" else 2, order)}
        for name, leaf in zip(type(state)._fields, state, strict=True):
            want[f"state.{name}"] = permute(leaf, mixer.state_axes[name], state_letter, order)
        got = {"y": got_y, **leaves_of("state", got_state)}
        wrong += [f"{letter}: {w}" for w in compare(subject, Result.of(got), Result.of(want))]
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
    documents = [cut(subject.mixer, subject.draw(max(n, 1), 1, i), 0, n) for i, n in enumerate(DOCUMENTS)]
    packed, cu = pack(subject.mixer, documents, subject.device)
    for name, inputs, options in (("", subject.draw(length), {}), ("packed: ", packed, {"cu_seqlens": cu})):
        with poisoned_memory():
            got = measure(subject, lambda x, initial_state=None, o=options: subject.forward(x, **o), inputs, None)
        wrong += [f"{name}{n} is not finite" for n, x in got.values.items() if not torch.isfinite(x).all()]
    return wrong


def twice_is_the_same(subject: Subject, length: int = 130) -> list[str]:
    """Law 11: the same call gives the same bits."""
    first, second = (measure(subject, _whole(subject.forward), subject.draw(length), None) for _ in range(2))
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


def _whole(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(inputs: dict[str, Any], initial_state: Any = None) -> tuple[Tensor, Any]:
        return function(inputs, initial_state=initial_state)

    return run


def _same_capacity(leaves: tuple[Tensor, ...]) -> list[Tensor]:
    """Leaves whose second axis is a capacity (softmax: a place a token), filled up with zeros to the largest."""
    if leaves[0].ndim < 2:
        return list(leaves)
    largest = max(leaf.shape[1] for leaf in leaves)
    return [F.pad(leaf, (0, 0) * (leaf.ndim - 2) + (0, largest - leaf.shape[1])) for leaf in leaves]


def _per_row(mixer: Mixer, name: str) -> bool:
    return "B" in mixer.axes.get(name, "")


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
    packed, cu = pack(mixer, spoiled, subject.device)
    y, state = subject.forward(packed, cu_seqlens=cu)
    a, b = int(cu[bad]), int(cu[bad + 1])
    rest = torch.cat([y[:, :a], y[:, b:]], 1)
    others = [i for i in range(len(DOCUMENTS)) if i != bad]
    wrong = [] if torch.isfinite(rest).all() else ["a NaN in one document reached the outputs of another"]
    for name, leaf in leaves_of("state", state).items():
        if leaf.is_floating_point() and not torch.isfinite(leaf[others]).all():
            wrong.append(f"a NaN in one document reached {name} of another")
    return wrong


def _a_state(subject: Subject, rows: int = 2) -> Any:
    """A State such as a model would hand over: that of 90 tokens."""
    inputs = subject.draw(90, batch=rows, seed=7)
    with torch.no_grad():
        state = subject.mixer.reference(double(inputs))[1]
    like = subject.mixer.identity(inputs, rows)
    return map_state(lambda x, y: x.to(y.dtype), state, like)
