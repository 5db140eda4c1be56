"""Read twice: prompts in other orders (JRT-Prompt, for any model), and what a prefix model does with a short prompt.

The orders are text in, text out; C is the context, Q the question::

    CQ      C Q             the default prompt
    QCQ     Q C Q           the question first
    CCQ     C \\n C Q        the context twice
    CQCQ    C Q \\n C Q      the whole prompt twice
    QCCQ    Q C \\n C Q      JRT-Prompt as published (arXiv 2407.05483, appendix F): both

A prefix model was trained on prefixes of ``prefix_length`` tokens; a shorter prompt leaves four ways (Table 4 there has
the last three, each better than "pad" on recall from 512 tokens of 1,024):

    exact       the prefix is as long as the prompt, and nothing is padded: the default
    pad         spaces, as real tokens, to the left until the prefix is full (there: left-pad)
    read-twice  the prompt as QCCQ, then pad (there: Read-2x)
    iterate     each new token joins the prefix and all is read again, until the prefix is full (there: Iterate)

Not here: shortening a context to fit (the paper cuts it to 950 tokens around the answer).

    pytest tests/test_generate.py -k "order or prefix"
"""

from __future__ import annotations

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

_READINGS: dict[Order, tuple[str, ...]] = {
    "CQ": ("CQ",),
    "QCQ": ("QCQ",),
    "CCQ": ("C", "CQ"),
    "CQCQ": ("CQ", "CQ"),
    "QCCQ": ("QC", "CQ"),
}


def read_twice(context: str, question: str, *, order: Order = "QCCQ", opening: str | None = None) -> str:
    """The prompt in an order: one newline between the readings, one space between context and question.

    Args:
        context: published prompts end it with a period.
        question: what the answer follows, say "Applicant:" or a statement without its end.
        opening: the question as it is put first in QCQ and QCCQ, where that differs ("Information about Applicant.").

    Raises:
        ValueError: an order that is not one of the five, or nothing to read.
    """
    if order not in _READINGS:
        raise ValueError(f"order {order!r} is not one of {list(_READINGS)}")
    if not context or not question:
        raise ValueError(f"context and question must hold text, got {context[:40]!r} and {question[:40]!r}")

    def text(reading: str) -> str:
        parts = [context if letter == "C" else question for letter in reading]
        if reading[0] == "Q" and opening is not None:
            parts[0] = opening
        return " ".join(parts)

    return "\n".join(text(reading) for reading in _READINGS[order])


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
