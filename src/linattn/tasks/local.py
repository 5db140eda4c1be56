"""Two recall tasks that need no network: attributes of software packages, and sentences whose last word came before.

attributes    300 stanzas of Debian 12's package index, each with its long description; the columns of fda: doc_id,
              text, key, value. The value stands once in the text. data/README.md names the origin.
cloze         passages of the bundled public-domain books whose last sentence ends in a name that the passage has
              already given; the columns of drop: doc_id, context, question (the sentence without the name),
              orig_question, answers.

    python -c "from linattn.tasks.local import cloze; print(cloze()[0])"
"""

from __future__ import annotations

import json
import lzma
import re
from importlib.resources import files
from typing import Any

from linattn.data import bundled_names, bundled_text

CLOZE_PER_BOOK = 200
CLOZE_WORDS = 150
"""Words of a passage before its last sentence: about 200 tokens of GPT-2's."""

_SENTENCE = re.compile(r'(?<=[a-z]{2}[.?!])["”]?\s+(?=["“A-Z])')
_NAME = re.compile(r"(.*[a-z,;] )([A-Z][a-z]{3,})[.?!]")


def attributes() -> list[dict[str, str]]:
    """The 300 shipped documents, in the order of the file."""
    packed = files("linattn.tasks").joinpath("data", "attributes.jsonl.xz").read_bytes()
    return [json.loads(line) for line in lzma.decompress(packed).decode("utf-8").splitlines()]


def cloze(per_book: int = CLOZE_PER_BOOK, words: int = CLOZE_WORDS) -> list[dict[str, Any]]:
    """Up to ``per_book`` passages of each bundled book, spread evenly over it; the same ones every time."""
    found = []
    for book in bundled_names():
        passages = _passages(book, words)
        step = max(1, len(passages) // per_book)
        found += passages[::step][:per_book]
    return found


def _passages(book: str, words: int) -> list[dict[str, Any]]:
    sentences = [" ".join(s.split()) for s in _SENTENCE.split(bundled_text(book))]
    passages, free_from = [], 0
    for last, sentence in enumerate(sentences):
        match = _NAME.fullmatch(sentence)
        if match is None or len(match[1].split()) < 5 or len(sentence) > 300:
            continue
        first, size = last, 0
        while first > free_from and size < words:
            first -= 1
            size += len(sentences[first].split())
        context = " ".join(sentences[first:last])
        if not words <= size <= 2 * words or context.count(match[2]) != 1 or match[2] in match[1]:
            continue
        free_from = last + 1  # no two passages share a sentence
        stem = match[1].strip()
        question = f'Which name ends the sentence "{stem} ..."?'
        passages.append(
            {
                "doc_id": f"{book}-{last}",
                "context": context,
                "question": stem,
                "orig_question": question,
                "answers": [match[2]],
            }
        )
    return passages
