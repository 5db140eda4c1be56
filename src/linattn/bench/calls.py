"""What is timed: calls of one op, ours and the peers', built from one draw of inputs and judged before they run.

Not the timing, and not the table: see ops.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from linattn.bench.cases import MIXERS, BenchCase, Pass, at_length, draw_inputs, length_of
from linattn.bench.costs import attention_flops
from linattn.bench.gate import OK, gate, parity_at_size, small
from linattn.bench.peers import Peer, Ready, leaf, peers_of
from linattn.bench.setting import (
    ANOTHER_OP,
    FLOPS_PER_S,
    HOST,
    IN_GRAPH,
    STEP_LAW,
    STEPS,
    Entries,
    Entry,
    Setting,
    in_words,
)
from linattn.bench.timing import MAX_POOLS, graph_replay, rotate, sets_beyond_cache
from linattn.bench.variants import variants_of
from linattn.core.dispatch import BackendError
from linattn.core.mixer import Mixer, state_bytes
from linattn.core.numerics import TORCH_TOLERANCE, relative_error


def entries_of(setting: Setting, case: BenchCase, pass_: Pass) -> Entries:
    """What to time of a case and pass, and what cannot be had, with reasons."""
    if pass_ == "step":
        return _step_entries(setting, case)
    grad = pass_ == "fwdbwd"
    first = draw_inputs(setting.op, case, setting.dtype, setting.device)
    given = sum(x.numel() * x.element_size() for x in first.values() if isinstance(x, Tensor))
    more = range(1, sets_beyond_cache(given, setting.device))
    sets = [first, *(draw_inputs(setting.op, case, setting.dtype, setting.device, seed) for seed in more)]
    entries: list[Entry] = []
    ours, missing = _ours(setting, first, grad)
    for name, backend in ours:
        verdict = judge(setting, case, first, backend)
        ready = [own(setting.mixer, inputs, backend, grad) for inputs in sets] if verdict == OK else []
        entries += _lines(setting, name, ready, verdict, grad)
    for peer in peers_of(setting.op):
        if setting.wants(peer.name):
            found = _peer_lines(setting, case, peer, sets, grad)
            missing += [] if isinstance(found, list) else [(peer.name, found)]
            entries += found if isinstance(found, list) else []
    return entries, missing


def own(mixer: Mixer, inputs: dict[str, Any], backend: str | None, grad: bool) -> Ready:
    """Ours as a call: with the final State where no gradient is asked for, as a training layer without it."""
    leaves = {n: leaf(x, grad) for n, x in inputs.items() if _moving(mixer, n, x)}
    options: dict[str, Any] = {"backend": backend, "return_state": not grad}
    return Ready(lambda: mixer.forward({**inputs, **leaves}, **options)[0], tuple(leaves.values()))


def no_grad(run: Callable[[], Tensor]) -> Tensor:
    """The call as inference makes it."""
    with torch.no_grad():
        return run()


def backward_call(ready: Ready) -> Callable[[], Any]:
    """Forward and backward from one random gradient of y, drawn at the first call."""
    kept: list[Tensor] = []

    def call() -> Any:
        y = ready.run()
        if not kept:
            kept.append(torch.randn_like(y))
        return torch.autograd.grad(y, ready.leaves, kept[0])

    return call


def judge(setting: Setting, case: BenchCase, inputs: dict[str, Any], backend: str | None) -> str:
    """The gate's verdict on a backend, or on the one that would be chosen; each question is asked once a run."""
    mixer = setting.mixer
    only = mixer.backends[0] if len(mixer.backends) == 1 else None
    asked = {"dtype": setting.dtype, "device": setting.device, "laws": setting.laws, "say": setting.say}
    key = ("laws", small(case).name, str(backend))
    if key not in setting.verdicts:
        setting.verdicts[key] = gate(mixer, case, backend=backend or only, **asked)
    if setting.verdicts[key] != OK or not setting.cuda:
        return setting.verdicts[key]
    key = ("size", case.name, str(backend))
    if key not in setting.verdicts:
        setting.verdicts[key] = _at_size(mixer, inputs, backend)
    return setting.verdicts[key]


def _at_size(mixer: Mixer, inputs: dict[str, Any], backend: str | None) -> str:
    try:
        return parity_at_size(mixer, inputs, backend=backend)
    except Exception as error:  # noqa: BLE001  what cannot be checked is not timed, and says why
        return f"{in_words(error)} (at size)"


def _ours(setting: Setting, inputs: dict[str, Any], grad: bool) -> tuple[list[tuple[str, str | None]], Any]:
    """Names of ours to measure with the backend that each asks for, and backends that refuse, with their reasons."""
    able: list[tuple[str, str | None]] = []
    refusing: list[tuple[str, str]] = []
    for backend in setting.mixer.backends:
        name = f"linattn:{backend}"
        if setting.wants(name):
            reason = _refusal(setting.mixer, inputs, grad, backend)
            able += [] if reason else [(name, backend)]
            refusing += [(name, reason)] if reason else []
    if setting.absent and setting.cuda and setting.wants("linattn"):
        refusing += _passed_over(setting.mixer, inputs, grad)
    if setting.impls is None and len(able) == 1:
        able = []  # it is what would be chosen, and need not be measured under both names
    return ([("linattn", None)] if setting.wants("linattn") else []) + able, refusing


def _passed_over(mixer: Mixer, inputs: dict[str, Any], grad: bool) -> list[tuple[str, str]]:
    """The backends that refuse before the one that will be chosen: a table must not call torch's figure a kernel's."""
    over = []
    for backend in mixer.backends[:-1]:
        reason = _refusal(mixer, inputs, grad, backend)
        if not reason:
            break
        over.append((f"linattn:{backend}", reason))
    return over


def _refusal(mixer: Mixer, inputs: dict[str, Any], grad: bool, backend: str) -> str:
    """Why a backend would not run the op on the first tokens of these inputs; empty where it would."""
    few = {n: x[:1, :64] if isinstance(x, Tensor) and "T" in mixer.axes.get(n, "") else x for n, x in inputs.items()}
    few = {n: x[:1] if isinstance(x, Tensor) and mixer.axes.get(n, "")[:1] == "B" else x for n, x in few.items()}
    try:
        ready = own(mixer, few, backend, grad)
        ready.run() if grad else no_grad(ready.run)
    except BackendError as error:
        return str(error).splitlines()[-1].strip().removeprefix(f"{backend}: ")
    return ""


def _moving(mixer: Mixer, name: str, x: Any) -> bool:
    """Whether a gradient is asked for: of what has rows, and of filters; not of a decay, which models keep constant."""
    return isinstance(x, Tensor) and x.is_floating_point() and mixer.axes.get(name, "") not in ("", "H")


def _lines(setting: Setting, impl: str, ready: list[Ready], verdict: str, grad: bool) -> list[Entry]:
    """The line of one implementation, and those of the other ways to time it where they are asked for."""
    if not ready:
        return [Entry(impl, None, verdict)]
    calls = [backward_call(r) if grad else partial(no_grad, r.run) for r in ready]
    given = sum(x.numel() * x.element_size() for x in ready[0].leaves)
    if setting.graph and setting.cuda:
        return [Entry(impl, graph_replay(calls), verdict, given, len(calls))]
    plain = Entry(impl, rotate(calls), verdict, given)
    if not setting.host:
        return [plain]
    lines = [plain, Entry(impl + HOST, plain.call, verdict, given, host=True)]
    if setting.cuda and impl.startswith("linattn"):
        lines.append(_in_a_graph(impl + IN_GRAPH, calls, verdict))
    return lines


def _in_a_graph(impl: str, calls: list[Callable[[], Any]], verdict: str) -> Entry:
    try:
        return Entry(impl, graph_replay(calls), verdict, parts=len(calls))
    except Exception as error:  # noqa: BLE001  what cannot be captured is a line of the record
        return Entry(impl, None, in_words(error))


def _peer_lines(
    setting: Setting, case: BenchCase, peer: Peer, sets: list[dict[str, Any]], grad: bool
) -> list[Entry] | str:
    """A peer's lines, or why it cannot be had here."""
    if peer.quadratic:
        seconds = attention_flops(sets[0]) * (3.5 if grad else 1) / FLOPS_PER_S
        if setting.cuda and seconds > setting.slow_s:
            return f"not run: at least {seconds:.1f} s a call, more than {setting.slow_s:g}"
    try:
        ready = [peer.build(setting.op, inputs, grad) for inputs in sets]
    except Exception as error:  # noqa: BLE001  such as a copy that does not fit; ours go on
        return in_words(error)
    reasons = [r for r in ready if isinstance(r, str)]
    if reasons:
        return reasons[0]
    name = f"{peer.name} {peer.version()}".strip()
    try:
        verdict = _judge_peer(setting, peer, case)
        return _lines(setting, name, [r for r in ready if isinstance(r, Ready)], verdict, grad)
    except Exception as error:  # noqa: BLE001  what a graph cannot capture; ours go on
        return [Entry(name, None, in_words(error))]


def _judge_peer(setting: Setting, peer: Peer, case: BenchCase) -> str:
    """ok, parity, or another op: a peer's output on up to 512 tokens of the case, against the float64 definition."""
    op = setting.op
    if not peer.computes(op):
        return ANOTHER_OP
    key = (peer.name, small(case).name, "")
    if key not in setting.verdicts:
        inputs = draw_inputs(op, at_length(case, min(length_of(case), 512)), setting.dtype, setting.device)
        axes = MIXERS[op].axes
        inputs = {n: x[:2] if isinstance(x, Tensor) and axes.get(n, "")[:1] == "B" else x for n, x in inputs.items()}
        ready = peer.build(op, inputs, False)
        if isinstance(ready, str):
            return OK
        wide = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in inputs.items()}
        want, _ = MIXERS[op].reference(wide)
        close = relative_error(no_grad(ready.run), want, (0, 2)) <= 2 * TORCH_TOLERANCE[setting.dtype]
        setting.verdicts[key] = OK if close else "parity"
    return setting.verdicts[key]


def _step_entries(setting: Setting, case: BenchCase) -> Entries:
    """One token a row out of pools of States that have read something; on CUDA replays over pools beyond the L2."""
    mixer = setting.mixer
    read = length_of(case) if setting.op == "softmax" else 256
    inputs = draw_inputs(setting.op, at_length(case, read), setting.dtype, setting.device)
    state = mixer.summarize(inputs)
    ours, missing = _ours(setting, inputs, False)
    entries = []
    for name, backend in ours:
        verdict = judge(setting, case, inputs, backend)
        entries.append(_step_line(setting, mixer, name, inputs, state, verdict, backend))
    for name, variant in (variants_of(setting.op, setting.dtype) if setting.absent else {}).items():
        options = {"dtype": setting.dtype, "device": setting.device, "laws": (STEP_LAW,), "say": setting.say}
        verdict = gate(variant.mixer, case, backend=None, **options)
        entries.append(_step_line(setting, variant.mixer, name, inputs, state, verdict, None, variant.period))
    return entries, missing


def _step_line(
    setting: Setting,
    mixer: Mixer,
    name: str,
    inputs: dict[str, Any],
    state: Any,
    verdict: str,
    backend: str | None,
    period: int = 1,
) -> Entry:
    """Steps over enough pools, ``period`` times over: what a pool does only every so often is in the mean."""
    if verdict != OK:
        return Entry(name, None, verdict)
    read, batch = next(x.shape[1] for x in inputs.values() if isinstance(x, Tensor)), state[0].shape[0]
    slots = torch.arange(batch, dtype=torch.int32, device=setting.device)
    token = {
        n: x[:, 0].clone() if "T" in mixer.axes.get(n, "") else x for n, x in inputs.items() if n not in mixer.once
    }
    pools = []
    for _ in range(sets_beyond_cache(state_bytes(state), setting.device, MAX_POOLS)):
        pool = mixer.new_pool(state, batch, read + STEPS)
        mixer.put_(pool, slots, state)
        pools.append(pool)
    calls = [partial(mixer.step_, token, pool, slots, backend=backend) for pool in pools] * period
    if setting.cuda:
        return _in_a_graph(name, calls, verdict)
    return Entry(name, rotate(calls), verdict)
