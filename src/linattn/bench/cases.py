"""Shapes to measure: the published ones of each mixer's cases.py, and any other by its name, such as b4-h32-t8192-d128.

pytest tests/test_bench_floor.py -k case
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from linattn.core.mixer import Mixer
from linattn.mixers import lightning, prefix, shortconv, softmax, taylor, window
from linattn.mixers.lightning import cases as lightning_cases
from linattn.mixers.lightning.cases import LightningCase
from linattn.mixers.prefix import cases as prefix_cases
from linattn.mixers.prefix.cases import PrefixCase
from linattn.mixers.shortconv import cases as shortconv_cases
from linattn.mixers.shortconv.cases import ShortConvCase
from linattn.mixers.softmax import cases as softmax_cases
from linattn.mixers.softmax.cases import SoftmaxCase
from linattn.mixers.taylor import cases as taylor_cases
from linattn.mixers.taylor.cases import TaylorCase
from linattn.mixers.window import cases as window_cases
from linattn.mixers.window.cases import WindowCase

Pass = Literal["fwd", "fwdbwd", "step"]
BenchCase = TaylorCase | PrefixCase | LightningCase | WindowCase | ShortConvCase | SoftmaxCase

MIXERS: dict[str, Mixer] = {m.MIXER.name: m.MIXER for m in (taylor, prefix, lightning, window, shortconv, softmax)}
"""Every op that can be measured, by name."""

_REAL: dict[str, tuple[BenchCase, ...]] = {
    "taylor": taylor_cases.REAL,
    "prefix": prefix_cases.REAL,
    "lightning": lightning_cases.REAL,
    "window": window_cases.REAL,
    "shortconv": shortconv_cases.REAL,
    "softmax": softmax_cases.REAL,
}
_AD_HOC = "ad hoc"


def _taylor(n: Mapping[str, float], flags: set[str]) -> TaylorCase:
    b, t, h, f, v = (int(n[letter]) for letter in "bthfv")
    return TaylorCase(b, t, h, f, v, _AD_HOC, normalize="sum" not in flags)


def _lightning(n: Mapping[str, float], flags: set[str]) -> LightningCase:
    b, t, h, d = (int(n[letter]) for letter in "bthd")
    return LightningCase(b, t, h, d, int(n.get("v", d)), _AD_HOC, decay=n.get("decay", "alibi"), factor=n.get("x", 1.0))


def _window(n: Mapping[str, float], flags: set[str]) -> WindowCase:
    b, t, h, d, w = (int(n[letter]) for letter in "bthdw")
    return WindowCase(b, t, h, d, w, _AD_HOC, value_dim=_whole(n, "v"), kv_heads=_whole(n, "kv"))


def _softmax(n: Mapping[str, float], flags: set[str]) -> SoftmaxCase:
    b, t, h, d = (int(n[letter]) for letter in "bthd")
    return SoftmaxCase(b, t, h, d, _AD_HOC, value_dim=_whole(n, "v"), kv_heads=_whole(n, "kv"))


def _shortconv(n: Mapping[str, float], flags: set[str]) -> ShortConvCase:
    b, t, d, w = (int(n[letter]) for letter in "btdw")
    activation = "silu" if "silu" in flags else None
    return ShortConvCase(b, t, d, w, _AD_HOC, bias="bias" in flags, gate="gate" in flags, activation=activation)


def _whole(n: Mapping[str, float], letter: str) -> int | None:
    return int(n[letter]) if letter in n else None


_SPELLINGS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...], Callable[..., BenchCase]]] = {
    "taylor": ("b16-h16-t2048-f16-v64", ("b", "h", "f", "v"), (), ("sum",), _taylor),
    "prefix": (
        "b16-h16-t2048-f16-v64-m1024",
        ("b", "h", "f", "v", "m"),
        (),
        ("sum",),
        lambda n, flags: PrefixCase(_taylor(n, flags), int(n["m"]), _AD_HOC),
    ),
    "lightning": ("b4-h32-t8192-d128", ("b", "h", "d"), ("v", "decay", "x"), (), _lightning),
    "window": ("b16-h16-t2048-d64-w129", ("b", "h", "d", "w"), ("v", "kv"), (), _window),
    "shortconv": ("b16-t2048-d2048-w3-silu-gate", ("b", "d", "w"), (), ("bias", "silu", "gate"), _shortconv),
    "softmax": ("b16-h16-t2048-d64", ("b", "h", "d"), ("v", "kv"), (), _softmax),
}
"""Per op: an example, letters that must stand there, letters that may, words that may, and what they make. t: 1."""


def check_op(op: str) -> None:
    """Refuse an op that is not in `MIXERS`, naming those that are."""
    if op not in MIXERS:
        raise ValueError(f"unknown op {op!r}; choose from {sorted(MIXERS)}")


def parse_case(op: str, name: str) -> BenchCase:
    """The case that ``name`` spells, of this op. Without a t it has one token, as decoding steps do.

    Raises:
        ValueError: an unknown op; a part that this op does not know, one missing, one twice or a number below 1.
    """
    check_op(op)
    example, needed, optional, words, make = _SPELLINGS[op]
    numbers: dict[str, float] = {}
    flags: set[str] = set()
    for part in name.split("-"):
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)?", part)
        letter, number = match.groups() if match else (part, None)
        if number is None and letter in words:
            flags.add(letter)
            continue
        if number is None or letter not in (*needed, *optional, "t") or letter in numbers:
            raise ValueError(f"{op}: cannot read {part!r} in the case {name!r}; spell it like {example}")
        if float(number) < 1 and letter not in ("decay", "x"):
            raise ValueError(f"{op}: {part!r} in the case {name!r} must be at least 1")
        numbers[letter] = float(number) if letter in ("decay", "x") else int(number)
    missing = [letter for letter in needed if letter not in numbers]
    if missing:
        raise ValueError(f"{op}: the case {name!r} lacks {missing}; spell it like {example}")
    return make({"t": 1, **numbers}, flags)


def real_cases(op: str) -> tuple[BenchCase, ...]:
    """The published shapes of this op: REAL in its cases.py."""
    check_op(op)
    return _REAL[op]


def case_name(case: BenchCase, pass_: Pass) -> str:
    """How records spell the case. A step has no length, but for softmax, where it is how much was read before."""
    if pass_ == "step" and not isinstance(case, SoftmaxCase):
        return re.sub(r"-t\d+", "", case.name)
    return case.name


def batch_of(case: BenchCase) -> int:
    """B."""
    return case.tokens.batch if isinstance(case, PrefixCase) else case.batch


def length_of(case: BenchCase) -> int:
    """T."""
    return case.tokens.length if isinstance(case, PrefixCase) else case.length


def at_length(case: BenchCase, length: int) -> BenchCase:
    """The same shape over ``length`` tokens; a prefix keeps its share of them."""
    if isinstance(case, PrefixCase):
        share = max(1, case.prefix * length // case.tokens.length)
        return replace(case, tokens=replace(case.tokens, length=length), prefix=share)
    return replace(case, length=length)


def draw_inputs(op: str, case: BenchCase, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Any]:
    """The op's keyword arguments at the case's full size, N(0, 1), drawn where they are used.

    The case itself draws in float64 on the CPU, exact across devices and right for laws; at 4 x 32 x 32,768 x 128 that
    would be 13 GB. So it gives shapes and parameters, and everything with rows and tokens is drawn anew.
    """
    axes = MIXERS[op].axes
    batch, length = batch_of(case), length_of(case)
    drawn = case.draw(length=1, batch=1, dtype=dtype, device=device, seed=seed)
    generator = torch.Generator(device).manual_seed(seed)
    inputs: dict[str, Any] = {}
    for name, x in drawn.items():
        letters = axes.get(name, "")
        if not isinstance(x, Tensor) or "B" not in letters:
            inputs[name] = x
            continue
        sizes = {"B": batch, "T": length}
        shape = [sizes.get(letter, size) for letter, size in zip(letters, x.shape, strict=True)]
        if x.is_floating_point():
            inputs[name] = torch.randn(shape, generator=generator, dtype=dtype, device=device)
        else:
            inputs[name] = x.expand(shape).contiguous()
    return inputs
