"""Read twice: prompts in other orders (JRT-Prompt, for any model), and what a prefix model does with a short prompt.

The orders are text in, text out; C is the context, Q the question, q the question said without asking for its answer
yet ("Information about Applicant." for "Applicant:")::

    CQ      C Q             the default prompt
    QCQ     q C Q           the question first
    CCQ     C \\n C Q        the context twice
    CQCQ    C q \\n C Q      the whole prompt twice
    QCCQ    q C \\n C Q      JRT-Prompt as published (arXiv 2407.05483, appendix F): both

A question that stands unanswered before the last one is a trap: after "Applicant:" the model copies what followed
the first "Applicant:", which was no answer. docs/read-twice.md has what that costs. So q is never an open line.

A prefix model was trained on prefixes of ``prefix_length`` tokens; a shorter prompt leaves four ways (Table 4 there has
the last three, each better than "pad" on recall from 512 tokens of 1,024):

    exact       the prefix is as long as the prompt, and nothing is padded: the default
    pad         spaces, as real tokens, to the left until the prefix is full (there: left-pad)
    read-twice  the prompt as QCCQ, then pad (there: Read-2x)
    iterate     each new token joins the prefix and all is read again, until the prefix is full (there: Iterate)

The published prompts, data set by data set, are in templates.py; shortening a context to fit is in cutting.py.

    pytest tests/test_read_twice.py; pytest tests/generate -k prefix
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from linattn.generate.engine import (
    CHUNK,
    GenerationResult,
    OnToken,
    Prompts,
    decode,
    generate,
    pool_capacity,
    pool_step,
    prefill,
    prompt_rows,
    with_states,
)
from linattn.generate.sampling import DEFAULT, SamplingConfig
from linattn.models.decoder import Decoder

Order = Literal["CQ", "QCQ", "CCQ", "CQCQ", "QCCQ"]
"""What is read, in turn."""

ShortPrompt = Literal["exact", "pad", "iterate"]
"""What is done with the tokens of a prompt that does not fill the prefix."""

PrefixStrategy = Literal["exact", "pad", "read-twice", "iterate"]
"""`ShortPrompt`, and the one that begins with the text."""

STRATEGIES: dict[PrefixStrategy, tuple[Order, ShortPrompt]] = {
    "exact": ("CQ", "exact"),
    "pad": ("CQ", "pad"),
    "read-twice": ("QCCQ", "pad"),
    "iterate": ("CQ", "iterate"),
}
"""Each strategy's order of the text, and what is done with its tokens."""

_READINGS: dict[Order, tuple[str, str, str]] = {
    "CQ": ("", "", "CQ"),
    "QCQ": ("", "", "qCQ"),
    "CCQ": ("C", "C", "CQ"),
    "CQCQ": ("Cq", "Cq", "CQ"),
    "QCCQ": ("qC", "C", "CQ"),
}
"""The first reading, those between, and the last; q is the question where no answer is asked for yet."""

_ENDS = re.compile(r"[.?!][\"')\]]*$")


def read_twice(
    context: str,
    question: str,
    *,
    order: Order = "QCCQ",
    passes: int | None = None,
    opening: str | None = None,
    separator: str = " ",
) -> str:
    """The prompt in an order, with one newline between the readings.

    Args:
        context: published prompts end it with a period.
        question: what the answer follows, say "Applicant:" or a statement without its end.
        passes: how often the context is read. None: twice in CCQ, CQCQ and QCCQ, which also take more; CQ and QCQ
            read it once.
        opening: the question where its answer is not asked for yet: first in QCQ and QCCQ, after every reading but
            the last in CQCQ. None: `opening_of(question)`.
        separator: between context and question; a space as published. Chat models know "\\n" before "Question:".

    Raises:
        ValueError: an order that is not one of the five, passes that the order cannot have, nothing to read, or an
            opening that leaves an unanswered line in the middle of the prompt (or none can be made).
    """
    if order not in _READINGS:
        raise ValueError(f"order {order!r} is not one of {list(_READINGS)}")
    if not context or not question:
        raise ValueError(f"context and question must hold text, got {context[:40]!r} and {question[:40]!r}")
    first, between, last = _READINGS[order]
    passes = passes if passes is not None else 2 if first else 1
    if (passes < 2) if first else (passes != 1):
        raise ValueError(f"order {order} reads the context {'2 or more times' if first else 'once'}, got {passes=}")
    letters = {"C": context, "Q": question}
    if "q" in first + last:
        letters["q"] = opening_of(question) if opening is None else _closed(opening, question)
    readings = [last] if not first else [first, *[between] * (passes - 2), last]
    return "\n".join(separator.join(letters[letter] for letter in reading) for reading in readings)


def opening_of(question: str) -> str:
    """The question as it may stand before its answer is asked for.

    "Applicant:" gives "Information about Applicant.", as published; a whole sentence, say "Who sued?", is its own.

    Raises:
        ValueError: neither: repeated as it is, it would be an unanswered line for the model to copy.
    """
    text = question.strip()
    if _ENDS.search(text):
        return text
    key = text.removesuffix(":").rstrip()
    if key and key != text and not re.search(r"[.?!:]\s|\n", key):
        return f"Information about {key}."
    raise ValueError(
        f"{question[-60:]!r} leaves its answer open, and a second open line before the last makes a model copy what "
        f"followed the first. Give opening=, the question as a whole sentence, or use order CQ or CCQ. A question "
        'may also end with "?", a key with ":"'
    )


def _closed(opening: str, question: str) -> str:
    text = opening.strip()
    if not text or text.endswith(":") or (text == question.strip() and not _ENDS.search(text)):
        raise ValueError(
            f"opening {opening[-60:]!r} leaves an answer open before the last line, and a model copies what follows it "
            f'there; make it a whole sentence, say "Information about {text.rstrip(":") or "Applicant"}."'
        )
    return opening


def pad_left(ids: Sequence[int], length: int, pad_id: int) -> list[int]:
    """The ids behind as many pad_id as make them ``length`` long; longer ones as they are. The pads are read."""
    return [pad_id] * (length - len(ids)) + [int(i) for i in ids]


def generate_short(
    model: Decoder, prompts: Prompts, *, short: ShortPrompt = "exact", pad_id: int | None = None, **options: Any
) -> list[GenerationResult]:
    """`generate`, with a choice of what a prefix model does with prompts shorter than its prefix.

    Args:
        short: "exact" is `generate` itself, for every model; the others are for prefix models.
        pad_id: the token of "pad", a space in the paper (220 for GPT-2, 32 for bytes).
        options: of `generate`; a state and prefix_lengths go with "exact" only.

    Raises:
        ValueError: another strategy for a model without a prefix, or from a state; "pad" without pad_id.
    """
    if short not in get_args(ShortPrompt):
        raise ValueError(f"short {short!r} is not one of {list(get_args(ShortPrompt))}")
    if short == "exact":
        return generate(model, prompts, **options)
    if not model.config.prefix_length:
        raise ValueError(f'short={short!r} is for prefix models, and this one has no prefix; use "exact"')
    for name in ("state", "prefix_lengths"):
        if options.pop(name, None) is not None:
            raise ValueError(f'short={short!r} decides the prefix at the start of a text; use "exact" with {name}')
    rows = prompt_rows(model, prompts, options.pop("mask", None))
    if short == "iterate":
        return _iterate(model, rows, **options)
    if pad_id is None:
        raise ValueError('short="pad" needs pad_id, the token to pad with: tokenizer.encode(" ")[0]')
    padded = [pad_left(row.tolist(), model.config.prefix_length, pad_id) for row in rows]
    return generate(model, padded, **options)


def _iterate(
    model: Decoder,
    rows: list[Tensor],
    *,
    max_new_tokens: int = 256,
    sampling: SamplingConfig = DEFAULT,
    seeds: Sequence[int] | None = None,
    eos_id: int | None = None,
    stop_ids: Sequence[int] = (),
    chunk: int = CHUNK,
    on_token: OnToken | None = None,
    return_state: bool = False,
) -> list[GenerationResult]:
    """The whole text is read again for each token while it fits the prefix, and stepped from there on."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    texts: list[list[int]] = [row.tolist() for row in rows]
    pool = model.new_pool(len(rows), pool_capacity([len(t) for t in texts], max_new_tokens))
    step_on = pool_step(model, pool)

    def read_again(some: list[int]) -> Tensor:
        logits, state = prefill(model, [texts[row] for row in some], chunk=chunk)
        model.put_(pool, torch.tensor(some, dtype=torch.int32, device=logits.device), state)
        return logits

    def step(unread: Sequence[int | None]) -> Tensor:
        for text, token in zip(texts, unread, strict=True):
            text += [] if token is None else [token]
        longest = model.config.prefix_length
        again = [row for row, t in enumerate(unread) if t is not None and len(texts[row]) <= longest]
        on = [None if row in again else t for row, t in enumerate(unread)]
        logits = first.new_zeros(first.shape) if on.count(None) == len(on) else step_on(on)
        if again:
            logits[again] = read_again(again)
        return logits

    first = read_again(list(range(len(rows))))
    results = decode(
        first,
        step,
        rows,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seeds=seeds,
        eos_id=eos_id,
        stop_ids=stop_ids,
        on_token=on_token,
        read_last=return_state,
    )
    return with_states(model, pool, results) if return_state else results
