"""In-context recall: does the model say a string that its context holds? The published protocol, for any model.

Zero-shot, greedy, at most 48 tokens, cut at the first newline; an answer counts if it occurs anywhere in what was said,
in any case ("contains"). Contexts may be cut to a number of tokens, around the answer as published.

What the model is does not matter here: a `Completer` is a function from prompts to texts (completers.py has one for
linattn's models and one for transformers'). Not here: exact match and F1.

    linattn eval MODEL --tasks attributes,cloze --read-twice
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from linattn.generate.cutting import Codec, Cut, cut_context
from linattn.generate.prompting import Order
from linattn.generate.templates import published_prompt
from linattn.tasks.sources import SOURCES, answers_of, centres_of, load_documents

MAX_NEW_TOKENS = 48
STOP = "\n"

Completer = Callable[[Sequence[str]], Sequence[str]]
"""Prompts to what follows each, before the first newline."""


@dataclass(frozen=True)
class Score:
    """The share of documents answered, with its standard error, and what was said to each."""

    task: str
    order: Order
    documents: int
    accuracy: float
    stderr: float
    said: tuple[tuple[str, bool], ...]
    """(text, whether it held an answer), one a document."""


def contains(said: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers occurs in ``said``, in any case."""
    return any(answer.lower() in said.lower() for answer in answers)


def share(right: Sequence[bool]) -> tuple[float, float]:
    """The mean of yes and no, and its standard error, sqrt(p (1 - p) / (n - 1)); nan for a single one."""
    mean = sum(right) / len(right)
    return mean, math.sqrt(mean * (1 - mean) / (len(right) - 1)) if len(right) > 1 else math.nan


def evaluate_recall(
    task: str,
    complete: Completer,
    *,
    order: Order = "CQ",
    documents: Sequence[Mapping[str, Any]] | None = None,
    limit: int | None = None,
    context_tokens: int | None = None,
    cut: Cut = "centred",
    codec: Codec | None = None,
) -> Score:
    """Score a model on a recall task.

    Args:
        task: one of `linattn.tasks.sources.SOURCES`.
        complete: the model.
        order: "CQ" is the default prompt, "QCCQ" JRT-Prompt.
        documents: `load_documents(task)` unless given.
        limit: the first so many documents; None: all.
        context_tokens: contexts are cut to this many tokens before they are put in order, so that every order sees
            the same text; None: whole. The paper's 1,000 less 50 for the answer is 950.
        cut: as in `cut_context`; "centred" is the published one.
        codec: of the model's tokenizer, to cut by.

    Raises:
        ValueError: as `load_documents` and `published_prompt`; context_tokens without codec; nothing left to score.
    """
    documents = list(load_documents(task) if documents is None else documents)
    if context_tokens is not None:
        if codec is None:
            raise ValueError("context_tokens counts the model's own tokens: give codec, the model's tokenizer")
        documents = [d for d in documents if all(len(text) > 1 for text in centres_of(task, dict(d)))]
        documents = [shorten(task, d, context_tokens, codec, cut) for d in documents[:limit]]
    documents = documents[:limit]
    if not documents:
        raise ValueError(
            f"task {task}: no documents are left to score (limit={limit}, context_tokens={context_tokens})"
        )
    said = complete([published_prompt(SOURCES[task].template, d, order) for d in documents])
    right = [contains(text, answers_of(task, dict(d))) for text, d in zip(said, documents, strict=True)]
    return Score(task, order, len(right), *share(right), tuple(zip(said, right, strict=True)))


def shorten(task: str, document: Mapping[str, Any], tokens: int, codec: Codec, cut: Cut = "centred") -> dict[str, Any]:
    """The document with its text (squad's too: its ``context`` stays whole, as published) or context cut.

    Tasks that the published protocol gives no answers to centre on (triviaqa, drop) keep the head.
    """
    column = "text" if SOURCES[task].template in ("fda", "swde", "squad") else "context"
    text, centres = document[column].strip(), centres_of(task, dict(document))
    if not any(centre.lower() in text.lower() for centre in centres):
        centres = (*centres, *(document.get("alt_answers") or ()))
    how = "head" if cut == "centred" and not centres else cut
    return {
        **document,
        column: cut_context(text, tokens, codec, how=how, answers=centres, position=document.get("tok_pos")).text,
    }
