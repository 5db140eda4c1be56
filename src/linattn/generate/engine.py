"""Prefill and decode: prompts are read in chunks of bounded memory, then each token is one step of the State.

A batch of unequal prompts is a packed batch, so that no row meets a pad or another row. Text and stop strings are one
file further (text.py), and so are prefix models' strategies for short prompts (prompting.py).

    pytest tests/generate -k "greedy or prefill"
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from linattn.generate.sampling import DEFAULT, SamplingConfig, row_generators, row_seeds, sample, seen_tokens
from linattn.models import Decoder, ModelState, Output, map_model_state

CHUNK = 2048
"""Tokens of each row that are read at a time. Activations grow with it; the State does not."""

Prompts = Sequence[Sequence[int] | Tensor] | Tensor
FinishReason = Literal["eos", "stop", "length"]
OnToken = Callable[[int, int], bool | None]
Step = Callable[[Sequence[int | None]], Tensor]
"""The token that each row has just written, None where a row rests -> logits [B, vocab_size]; a resting row's mean
nothing."""


class Prefill(NamedTuple):
    """What reading the prompts gives: logits [B, vocab_size] after each row's last token, and the state of B rows."""

    logits: Tensor
    state: ModelState


@dataclass(frozen=True)
class GenerationResult:
    """What one row wrote."""

    tokens: list[int]
    """The new tokens, without the eos or stop id that ended them."""
    finish_reason: FinishReason
    """eos: eos_id came. stop: a stop id came, or the callback asked. length: max_new_tokens were written."""
    seed: int
    """What the row drew from; alone with this seed it writes the same."""
    state: ModelState | None = None
    """One row, which has read prompt and ``tokens``, no more and no less; None unless asked for."""


@torch.no_grad()
def prefill(
    model: Decoder,
    prompts: Prompts,
    *,
    mask: Tensor | None = None,
    state: ModelState | None = None,
    prefix_lengths: Sequence[int] | Tensor | None = None,
    chunk: int = CHUNK,
) -> Prefill:
    """Read prompts, ``chunk`` tokens of each row at a time; logits are computed for last tokens only.

    A prefix model reads its prefix without causality, so all of it goes into the first call: where the longest prefix
    is longer than ``chunk``, the first chunk is as long as that prefix.

    Args:
        prompts: B rows of token ids, or int64 [B, T].
        mask: bool [B, T] with a tensor of prompts, False on pads, wherever they are.
        state: what was read before: B rows, or one row that all prompts follow.
        prefix_lengths: B numbers, for prefix models at the start of a text; None is min(len(prompt), prefix_length),
            so that a short prompt needs no pads.
        chunk: at least 1; memory grows with B * chunk, time hardly depends on it from 128 on.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, a prefix that does not fit the prompt or the state.
    """
    rows = prompt_rows(model, prompts, mask)
    check_chunk(chunk)
    state = rows_of_state(state, len(rows))
    prefixes = _prefixes(model, [len(r) for r in rows], state, prefix_lengths)
    last: Tensor | None = None
    for start, stop in spans(max(len(r) for r in rows), chunk, max(prefixes or [0])):
        ends = torch.tensor([start < len(r) <= stop for r in rows])
        first = prefixes if start == 0 else None
        out = _read_pieces(model, [r[start:stop] for r in rows], state, first, "last" if ends.any() else "none")
        state = out.state
        if out.logits is not None:
            last = out.logits if last is None else torch.where(ends.to(last.device)[:, None], out.logits, last)
    assert last is not None and state is not None
    return Prefill(last, state)


def generate(
    model: Decoder,
    prompts: Prompts,
    *,
    max_new_tokens: int = 256,
    sampling: SamplingConfig = DEFAULT,
    seeds: Sequence[int] | None = None,
    eos_id: int | None = None,
    stop_ids: Sequence[int] = (),
    mask: Tensor | None = None,
    state: ModelState | None = None,
    prefix_lengths: Sequence[int] | Tensor | None = None,
    chunk: int = CHUNK,
    on_token: OnToken | None = None,
    return_state: bool = False,
) -> list[GenerationResult]:
    """Write after each prompt, all rows in step. A row that has ended is an idle slot until the last one has.

    Args:
        prompts, mask, state, prefix_lengths, chunk: as in `prefill`.
        max_new_tokens: of each row, at least 1.
        sampling: `GREEDY`, or how to draw.
        seeds: one a row; None counts up from sampling.seed.
        eos_id, stop_ids: tokens that end a row; they are not part of what it wrote.
        on_token: called with (row, token) for every token as it is written; returning True ends the row there.
        return_state: whether each result holds the row's state.

    Raises:
        ValueError: as in `prefill`, or a number that makes no sense, with the value and the fix.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1; to read without writing, use prefill")
    rows = prompt_rows(model, prompts, mask)
    state = rows_of_state(state, len(rows))
    capacity = pool_capacity([len(r) for r in rows], max_new_tokens, state)
    logits, read = prefill(model, rows, state=state, prefix_lengths=prefix_lengths, chunk=chunk)
    pool = model.new_pool(len(rows), capacity)
    model.put_(pool, _slots(model, range(len(rows))), read)
    del read, state  # the pool holds them now
    results = decode(
        logits,
        pool_step(model, pool),
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


def decode(
    logits: Tensor,
    step: Step,
    prompts: Sequence[Sequence[int] | Tensor],
    *,
    max_new_tokens: int,
    sampling: SamplingConfig,
    seeds: Sequence[int] | None,
    eos_id: int | None,
    stop_ids: Sequence[int],
    on_token: OnToken | None,
    read_last: bool,
) -> list[GenerationResult]:
    """Sample and step until every row has ended. `generate` with the model behind ``step``.

    ``prompts`` count for the repetition penalty only. ``read_last``: whether a row's last token is stepped too.
    """
    B, vocab_size = logits.shape
    seeds = row_seeds(sampling, B, seeds)
    generators = row_generators(seeds)
    seen = seen_tokens(prompts, vocab_size) if sampling.repetition_penalty != 1 else None
    tokens: list[list[int]] = [[] for _ in range(B)]
    reasons: list[FinishReason | None] = [None] * B
    while None in reasons:
        alive = [row for row in range(B) if reasons[row] is None]
        written = sample(
            logits[alive], sampling, [generators[row] for row in alive], None if seen is None else seen[alive]
        )
        unread: list[int | None] = [None] * B
        for row, token in zip(alive, written.tolist(), strict=True):
            if token == eos_id or token in stop_ids:
                reasons[row] = "eos" if token == eos_id else "stop"
                continue
            tokens[row].append(token)
            if seen is not None:
                seen[row, token] = True
            if on_token is not None and on_token(row, token):
                reasons[row] = "stop"
            elif len(tokens[row]) == max_new_tokens:
                reasons[row] = "length"
            if reasons[row] is None or read_last:
                unread[row] = token
        if any(token is not None for token in unread):
            logits = step(unread)
    return [
        GenerationResult(written, reason, seed)
        for written, reason, seed in zip(tokens, reasons, seeds, strict=True)
        if reason is not None
    ]


def pool_step(model: Decoder, pool: ModelState) -> Step:
    """The step of rows whose states lie in a pool, row i in slot i; resting rows are idle slots (-1)."""

    def step(unread: Sequence[int | None]) -> Tensor:
        slots = _slots(model, [-1 if token is None else row for row, token in enumerate(unread)])
        tokens = torch.tensor([token or 0 for token in unread], device=slots.device)
        return model.step_(tokens, pool, slots)

    return step


def pool_capacity(lengths: Sequence[int], max_new_tokens: int, state: ModelState | None = None) -> int:
    """Tokens that a slot must hold: those read before, the prompt, and what may be written."""
    before = [0] * len(lengths) if state is None else state.tokens.tolist()
    return max(b + n for b, n in zip(before, lengths, strict=True)) + max_new_tokens


def with_states(model: Decoder, pool: ModelState, results: Sequence[GenerationResult]) -> list[GenerationResult]:
    """The results with the states in slots 0, 1, ... of a pool."""
    return [
        GenerationResult(r.tokens, r.finish_reason, r.seed, model.take(pool, _slots(model, [row])))
        for row, r in enumerate(results)
    ]


def rows_of_state(state: ModelState | None, rows: int) -> ModelState | None:
    """A state of ``rows`` rows: the one given, or its only row for each of them.

    Raises:
        ValueError: a state of another number of rows.
    """
    if state is None or state.tokens.shape[0] == rows:
        return state
    if state.tokens.shape[0] != 1:
        raise ValueError(
            f"the state has {state.tokens.shape[0]} rows and there are {rows} prompts: "
            "give a state of one row, which all prompts follow, or one row a prompt"
        )
    return map_model_state(lambda leaf: leaf.expand(rows, *leaf.shape[1:]), state)


def prompt_rows(model: Decoder, prompts: Prompts, mask: Tensor | None = None) -> list[Tensor]:
    """Prompts as B tensors int64 [T_i] without pads, every id checked.

    Raises:
        ValueError: no prompt, an empty one, or an id that the model has no embedding for; with the fix.
    """
    if isinstance(prompts, Tensor) and prompts.ndim != 2:
        raise ValueError(f"a tensor of prompts must be [B, T], got {list(prompts.shape)}; one prompt is tokens[None]")
    if mask is not None and (not isinstance(prompts, Tensor) or mask.shape != prompts.shape):
        raise ValueError("mask goes with a tensor of prompts [B, T] and has its shape; lists of ids need no pads")
    if len(prompts) == 0:
        raise ValueError("no prompts: give at least one list of token ids")
    rows = [_ids(row, index) for index, row in enumerate(prompts)]
    if mask is not None:
        rows = [row[real.bool()] for row, real in zip(rows, mask, strict=True)]
    for index, row in enumerate(rows):
        if row.numel() == 0:
            raise ValueError(
                f"prompt {index} is empty, and a model answers to at least one token; "
                "give it some text, or the tokenizer's end-of-document token (tokenizer.eos)"
            )
        check_ids(model, row, f"prompt {index}")
    return rows


def check_ids(model: Decoder, ids: Tensor, where: str) -> None:
    """Refuse ids that the model has no embedding for: on a GPU they would read beyond the table.

    Raises:
        ValueError: naming the id and the place.
    """
    wrong = (ids < 0) | (ids >= model.config.vocab_size)
    for reserved in model.config.reserved_ids:
        wrong &= ids != reserved
    if wrong.any():
        place = int(wrong.nonzero()[0])
        raise ValueError(
            f"{where} holds token id {int(ids[place])} at place {place}, but the model's ids are 0 to "
            f"{model.config.vocab_size - 1}; encode the text with the tokenizer that the model was trained with"
        )


def check_chunk(chunk: int) -> None:
    """Refuse a chunk of no tokens."""
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 token; {CHUNK} is the default")


def spans(length: int, chunk: int, first: int = 0) -> Iterator[tuple[int, int]]:
    """[start, stop) of pieces of ``chunk`` tokens, the first of them at least ``first`` long."""
    start, stop = 0, max(chunk, first)
    while start < length:
        yield start, min(stop, length)
        start, stop = stop, stop + chunk


def _ids(row: Sequence[int] | Tensor, index: int) -> Tensor:
    try:
        ids = torch.as_tensor(row)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"prompt {index} is not a list of token ids: {error}") from error
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.ndim != 1):
        raise ValueError(f"prompt {index} is not a list of token ids, but {ids.dtype} {list(ids.shape)}")
    return ids.to(torch.int64)


def _prefixes(
    model: Decoder, lengths: list[int], state: ModelState | None, given: Sequence[int] | Tensor | None
) -> list[int] | None:
    longest = model.config.prefix_length
    if given is None:
        return None if state is not None or not longest else [min(n, longest) for n in lengths]
    if not longest:
        raise ValueError("prefix_lengths given, but this model has no prefix layers; leave them out")
    if state is not None:
        raise ValueError(
            "prefix_lengths belong to the start of a text, and this one goes on from a state; leave out one"
        )
    prefixes = [int(n) for n in given]
    if len(prefixes) != len(lengths):
        raise ValueError(f"{len(prefixes)} prefix_lengths for {len(lengths)} prompts: give one a prompt")
    for index, (prefix, length) in enumerate(zip(prefixes, lengths, strict=True)):
        most = min(length, longest)
        if not 0 <= prefix <= most:
            raise ValueError(
                f"prefix_lengths[{index}] is {prefix}; it must be 0 to {most} "
                f"(the prompt has {length} tokens, the model's prefix at most {longest})"
            )
    return prefixes


def _read_pieces(
    model: Decoder,
    pieces: list[Tensor],
    state: ModelState | None,
    prefixes: list[int] | None,
    logits: Literal["last", "none"],
) -> Output:
    """One call of the model on the next piece of each row: a plain batch where they are equally long, else packed."""
    device = model.embedding.weight.device
    lengths = [len(piece) for piece in pieces]
    prefix = None if prefixes is None else torch.tensor(prefixes, device=device)
    if len(set(lengths)) == 1:
        tokens, cu_seqlens = torch.stack(pieces), None
    else:
        # A row that has ended is a document of length 0, which changes nothing.
        tokens = torch.cat(pieces)[None]
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return model(
        tokens.to(device), state=state, cu_seqlens=cu_seqlens, prefix_lengths=prefix, logits=logits, return_state=True
    )


def _slots(model: Decoder, slots: Sequence[int]) -> Tensor:
    return torch.tensor(list(slots), dtype=torch.int32, device=model.embedding.weight.device)
