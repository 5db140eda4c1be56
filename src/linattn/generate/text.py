"""Text in, text out: generation with a tokenizer, stop strings and streaming.

pytest tests/generate -k "text or stop"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from linattn.data.tokenizer import StreamDecoder, Tokenizer
from linattn.generate.engine import CHUNK, FinishReason
from linattn.generate.prompting import STRATEGIES, Order, PrefixStrategy, ShortPrompt, generate_short, read_twice
from linattn.generate.sampling import DEFAULT, GREEDY, SamplingConfig
from linattn.models import Decoder, ModelState

OnText = Callable[[int, str], None]


@dataclass(frozen=True)
class TextResult:
    """What one row wrote, as text."""

    text: str
    """Up to, and without, the stop string that ended it."""
    tokens: list[int]
    """The tokens written, those of a stop string among them, without the end-of-document token."""
    finish_reason: FinishReason
    """eos: the document ended. stop: a stop string came. length: max_new_tokens were written."""
    seed: int
    """What the row drew from; alone with this seed it writes the same."""
    state: ModelState | None = None
    """One row, which has read prompt and ``tokens``; None unless asked for."""


class StopFilter:
    """Text that comes in pieces, cut before the first stop string to be complete, wherever the pieces' ends fall.

    What `push` gives never holds a part of a stop string that might still be completed: that is held back.
    """

    def __init__(self, stop: Sequence[str] = ()):
        if isinstance(stop, str):
            raise ValueError(f"stop must be a list of strings, got the string {stop!r}; write ({stop!r},)")
        if "" in stop:
            raise ValueError("a stop string is empty, which would stop everything; leave it out")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False
        """Whether a stop string has come; from then on no text does."""

    def push(self, piece: str) -> str:
        """The text that is certain once ``piece`` has come."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(start + len(s), start) for s in self._stop if (start := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        held = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back and is text after all."""
        held, self._held = self._held, ""
        return held


def generate_text(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    sampling: SamplingConfig = DEFAULT,
    seeds: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    stop_at_eos: bool = True,
    short: ShortPrompt = "exact",
    state: ModelState | None = None,
    chunk: int = CHUNK,
    on_text: OnText | None = None,
    return_state: bool = False,
) -> list[TextResult]:
    """Write on after each prompt, as text.

    Args:
        prompts: not empty. To begin from nothing, generate from [[tokenizer.eos]]; models trained on packed documents
            with resets have never read that token first.
        max_new_tokens, sampling, seeds, state, chunk, return_state: as in `generate`.
        stop: strings that end a row; they may begin and end inside tokens, and are no part of the text.
        stop_at_eos: whether the end-of-document token ends a row; it has no text of its own.
        short: what a prefix model does with short prompts (`generate_short`).
        on_text: called with (row, piece) as text is certain: whole characters, and no part of a stop string. The
            pieces of a row joined are its text.

    Raises:
        ValueError: as in `generate`; an id of the tokenizer beyond the model's vocabulary is one case.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a list of strings, got the string {prompts[:40]!r}; put it in a list")
    rows = [_Row(tokenizer, stop) for _ in prompts]

    def emit(row: int, piece: str) -> None:
        if piece:
            rows[row].pieces.append(piece)
            if on_text is not None:
                on_text(row, piece)

    def on_token(row: int, token: int) -> bool:
        emit(row, rows[row].stop.push(rows[row].decoder.push(token)))
        return rows[row].stop.stopped

    results = generate_short(
        model,
        [tokenizer.encode(prompt) for prompt in prompts],
        short=short,
        pad_id=tokenizer.encode(" ")[-1] if short == "pad" else None,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seeds=seeds,
        eos_id=tokenizer.eos if stop_at_eos else None,
        state=state,
        chunk=chunk,
        on_token=on_token,
        return_state=return_state,
    )
    for index, row in enumerate(rows):
        emit(index, row.stop.push(row.decoder.flush()))
        emit(index, row.stop.flush())
    return [
        TextResult(
            "".join(row.pieces), r.tokens, "stop" if row.stop.stopped else r.finish_reason, r.seed, state=r.state
        )
        for row, r in zip(rows, results, strict=True)
    ]


def ask(
    model: Decoder,
    tokenizer: Tokenizer,
    items: Sequence[tuple[str, str]],
    *,
    strategy: PrefixStrategy = "exact",
    order: Order | None = None,
    opening: str | Sequence[str | None] | None = None,
    max_new_tokens: int = 48,
    sampling: SamplingConfig = GREEDY,
    stop: Sequence[str] = ("\n",),
) -> list[TextResult]:
    """Answer questions about contexts; the defaults are the published protocol: greedy, 48 tokens, one line.

    Args:
        items: (context, question) pairs.
        strategy: one of prompting.py's four; all but "exact" are for prefix models.
        order: any of the five orders instead of the strategy's own. ``strategy="exact", order="QCCQ"`` is JRT-Prompt
            for any model.
        opening: as in `read_twice`; one for all items, or one an item.

    Raises:
        ValueError: a strategy or order that does not exist, or does not fit the model.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r} is not one of {list(STRATEGIES)}")
    own_order, short = STRATEGIES[strategy]
    openings = [opening] * len(items) if opening is None or isinstance(opening, str) else opening
    prompts = [
        read_twice(c, q, order=order or own_order, opening=first) for (c, q), first in zip(items, openings, strict=True)
    ]
    return generate_text(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, short=short
    )


class _Row:
    """One row's way from tokens to text."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self.decoder = StreamDecoder(tokenizer)
        self.stop = StopFilter(stop)
        self.pieces: list[str] = []


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that ``stop`` begins with, short of all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
