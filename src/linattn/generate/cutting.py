"""A context made shorter, in tokens: centred on the answer, as the papers do, or honestly from one end; and the check
that nothing is cut silently.

    centred    a window around the answer: the published protocol. It knows the answer, so it belongs to measurements
    head       the first tokens
    tail       the last tokens

    pytest tests/test_read_twice.py -k "cut or warns"
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

Cut = Literal["centred", "head", "tail"]
"""Which tokens of a context that is too long stay."""


class Codec(NamedTuple):
    """A tokenizer as two functions: text to ids, ids to text."""

    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]


class Shortened(NamedTuple):
    """A context after cutting: its text, how many tokens it had, which [start, stop) stayed, and for "centred"
    whether the answer was found in it."""

    text: str
    tokens: int
    kept: tuple[int, int]
    found: bool


def cut_context(
    text: str, tokens: int, codec: Codec, *, how: Cut = "head", answers: Sequence[str] = (), position: int | None = None
) -> Shortened:
    """``text`` cut to at most ``tokens`` tokens; one that fits stays to the letter.

    Args:
        text: without the question.
        tokens: at the most. Decoding and encoding again may differ by a few at a cut.
        codec: of the model that will read it, without special tokens.
        how: "centred" needs answers.
        answers: strings to look for, in any case; the window is around the earliest place where one of them begins,
            half of the tokens before it (fewer at the head; at the tail the window is shorter, as published).
        position: for "centred", the token to centre on where no answer is found (NQ's column tok_pos). None: the head
            stays. (The published code keeps the last half window there.)

    Raises:
        ValueError: another way of cutting, no room, or "centred" without answers and position.
    """
    if how not in get_args(Cut):
        raise ValueError(f"how={how!r} is not one of {list(get_args(Cut))}")
    if tokens < 1:
        raise ValueError(f"tokens={tokens} must be at least 1")
    if how == "centred" and position is None and not any(answers):
        raise ValueError('how="centred" needs answers to centre on; "head" and "tail" need none')
    ids = codec.encode(text)
    places = [text.lower().find(answer.lower()) for answer in answers if answer]
    begin = min((place for place in places if place >= 0), default=None)
    if len(ids) <= tokens:
        return Shortened(text, len(ids), (0, len(ids)), begin is not None)
    start = 0
    if how == "tail":
        start = len(ids) - tokens
    elif how == "centred":
        centre = len(codec.encode(text[:begin])) if begin is not None else position or 0
        start = max(0, centre - tokens // 2)
    stop = min(len(ids), start + tokens)
    return Shortened(codec.decode(ids[start:stop]), len(ids), (start, stop), begin is not None)


def warn_if_too_long(lengths: Sequence[int], limit: int, *, reader: str = "the model") -> int:
    """How many prompts are longer than ``limit`` tokens, said aloud with numbers if there are any.

    What follows cuts such prompts at the left: the head of the context goes, and of a prompt that reads it twice the
    head of the first copy, so that part of it is read once.

    Args:
        lengths: tokens of each prompt.
        limit: tokens that can be read before the answer.
        reader: who cuts, for the warning.
    """
    over = [length - limit for length in lengths if length > limit]
    if over:
        warnings.warn(
            f"{len(over)} of {len(lengths)} prompts are longer than the {limit:,} tokens that {reader} reads, by up to "
            f"{max(over):,}: their first tokens are cut, and of a context read twice the head of the first copy. "
            "Shorten the contexts (cut_context) or raise the limit",
            stacklevel=2,
        )
    return len(over)
