"""The published prompts of the six recall data sets, default and twice, to the letter (arXiv 2407.05483, appendix F).

    fda, swde             C. Key:         Information about Key. C.\\nC. Key:
    squad                 text            question context\\ntext
    triviaqa, nq, drop    C. stem         question C.\\nC. stem

A document is a mapping with the columns of the hub's data set (tasks/published.py names them): ``key``, ``value`` and
``text`` for fda and swde; ``text``, ``context``, ``question``, ``value`` for squad; ``context``, ``question`` (the
statement without its end: the stem) and ``orig_question`` for the others.

Not kept from the published code: it rewrites the document it is given, so that a second call sees another text.

    pytest tests/test_read_twice.py -k published
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from linattn.generate.prompting import Order, read_twice

Template = Literal["fda", "swde", "squad", "triviaqa", "nq", "drop"]

_SUMMARY = "Summary of information above..."
"""What SWDE's texts end in, with the question behind it."""


class Parts(NamedTuple):
    """What `read_twice` puts in order: C, Q and q."""

    context: str
    question: str
    opening: str


def published_prompt(template: Template, document: Mapping[str, Any], order: Order = "CQ") -> str:
    """The prompt of one document.

    Args:
        template: whose; the three NQ data sets share one.
        document: with the columns above; others are not looked at.
        order: "CQ" is the published default prompt, "QCCQ" the published twice prompt. The others are not published:
            they put the parts of the twice prompt in that order, each opening at its place.

    Raises:
        ValueError: no such template, a missing column, or an order that squad's texts do not come apart for.
    """
    if template not in get_args(Template):
        raise ValueError(f"no published template {template!r}; there are {', '.join(get_args(Template))}")
    try:
        if template == "squad":
            return _squad(document, order)
        context, question, opening = published_parts(template, document, twice=order != "CQ")
    except KeyError as missing:
        raise ValueError(f"a document of {template} has no column {missing}; it has {sorted(document)}") from missing
    if order == "QCCQ":  # to the letter, whatever the data set's question ends in
        return f"{opening} {context}\n{context} {question}"
    return read_twice(context, question, order=order, opening=opening or None)


def published_parts(template: Template, document: Mapping[str, Any], *, twice: bool) -> Parts:
    """Context with its period, question, and opening, for every template but squad.

    ``twice`` matters: the published default and twice prompts strip the context in different ways.
    """
    if template in ("fda", "swde"):
        key = document["key"]
        name = key[0].upper() + key[1:]
        text = document["text"]
        context = _fda(text, key) if template == "fda" else _swde(text, key, twice)
        return Parts(context, f"{name}:", f"Information about {name.strip(':')}.")
    context, stem = document["context"].strip(), document["question"].strip()
    opening = document["orig_question"] if twice else ""
    if template == "triviaqa":
        context = re.sub(r"\[(PAR|DOC|TLE)\]", "", context)
    else:
        opening = opening.strip(":")
    if template == "nq" and not twice:
        context = context.removesuffix(stem)
    else:
        context = _without_end(context, stem)
    context = context.strip().strip(".")
    return Parts((context.strip() if twice else context) + ".", stem, opening)


def _fda(text: str, key: str) -> str:
    context = _without_end(text, f"{key}:").strip("\n").strip(".")
    return context if context.endswith(".") else f"{context}."


def _swde(text: str, key: str, twice: bool) -> str:
    text = _without_end(text.split(_SUMMARY)[0], f"{key}:")
    if not twice:
        return text.strip("\n").strip().strip(".") + "."
    context = text.strip("\n").strip(".").strip()
    return context if context.endswith(".") else f"{context}."


def _squad(document: Mapping[str, Any], order: Order) -> str:
    text = document["text"].strip()
    if order == "CQ":
        return text
    if order == "QCCQ":
        return f"{document['question']} {document['context'].split('Question:')[0]}\n{text}"
    raise ValueError(f"squad's published prompts are CQ and QCCQ, got {order}; its texts hold context and stem in one")


def _without_end(text: str, end: str) -> str:
    """``text`` without ``end``, in any case, as often as it ends in it."""
    while end and text.lower().endswith(end.lower()):
        text = text[: -len(end)]
    return text
