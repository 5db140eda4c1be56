"""Models as `recall.Completer`s: greedy continuations of many prompts, in batches of like lengths, to a newline.

pytest tests/test_tasks.py -k completer
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from linattn.data import Tokenizer
from linattn.generate import GREEDY, generate_text
from linattn.generate.cutting import Codec, warn_if_too_long
from linattn.models import Decoder
from linattn.tasks.recall import MAX_NEW_TOKENS, STOP, Completer

BATCH_TOKENS = 16_384
"""Tokens of prompts read side by side, pads included."""

OnBatch = Callable[[int, int], None]
"""Called after each batch with how many prompts are done, of how many."""


def linattn_completer(
    model: Decoder,
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    on_batch: OnBatch | None = None,
) -> Completer:
    """A model of linattn's. Its States have no longest prompt, so nothing is ever cut."""

    def complete(prompts: Sequence[str]) -> list[str]:
        said = [""] * len(prompts)
        for rows in _batches([len(tokenizer.encode(p)) for p in prompts], batch_tokens, on_batch):
            texts = generate_text(
                model,
                tokenizer,
                [prompts[r] for r in rows],
                max_new_tokens=max_new_tokens,
                sampling=GREEDY,
                stop=(STOP,),
            )
            for row, result in zip(rows, texts, strict=True):
                said[row] = result.text
        return said

    return complete


def hf_completer(
    model: Any,
    tokenizer: Any,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    max_length: int | None = None,
    on_batch: OnBatch | None = None,
) -> Completer:
    """Any causal language model of transformers, left-padded with its mask.

    Args:
        model: with `generate`, on its device.
        tokenizer: its own; without a pad token it pads with its end of text, which the mask hides.
        max_new_tokens: tokens a prompt.
        batch_tokens: tokens of prompts side by side, pads included.
        max_length: prompt and answer together; None: the model's max_position_embeddings, if it has one. Longer prompts
            lose their first tokens, with a warning that has the numbers.
        on_batch: called after each batch.
    """
    from transformers import StoppingCriteria, StoppingCriteriaList

    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    spelled = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    newline = torch.tensor([i for i, text in enumerate(spelled) if STOP in text], device=model.device)
    if max_length is None:
        max_length = getattr(model.config, "max_position_embeddings", None)
    limit = None if max_length is None else max_length - max_new_tokens

    class AtNewline(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **unused: Any) -> torch.Tensor:  # type: ignore[override]
            return torch.isin(input_ids[:, -1], newline)

    def complete(prompts: Sequence[str]) -> list[str]:
        ids = [tokenizer(p).input_ids for p in prompts]
        if limit is not None and warn_if_too_long([len(i) for i in ids], limit):
            ids = [i[-limit:] for i in ids]
        said = [""] * len(prompts)
        for rows in _batches([len(i) for i in ids], batch_tokens, on_batch):
            longest = max(len(ids[r]) for r in rows)
            tokens = torch.tensor([[pad] * (longest - len(ids[r])) + ids[r] for r in rows], device=model.device)
            mask = torch.tensor([[0] * (longest - len(ids[r])) + [1] * len(ids[r]) for r in rows], device=model.device)
            out = model.generate(
                input_ids=tokens,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=pad,
                stopping_criteria=StoppingCriteriaList([AtNewline()]),
            )
            texts = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
            for row, text in zip(rows, texts, strict=True):
                said[row] = text.split(STOP)[0]
        return said

    return complete


def codec_of(tokenizer: Any) -> Codec:
    """A tokenizer, linattn's or transformers', as `cut_context` takes it: no special tokens are added."""
    if hasattr(tokenizer, "batch_decode"):
        return Codec(
            lambda text: tokenizer(text, add_special_tokens=False).input_ids,
            lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False),
        )
    return Codec(tokenizer.encode, tokenizer.decode)


def _batches(lengths: Sequence[int], tokens: int, on_batch: OnBatch | None) -> Iterator[list[int]]:
    """Rows of like length, the longest first, whose padded size is within ``tokens`` (one row always goes)."""
    left = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    while left:
        n = max(1, tokens // max(1, lengths[left[0]]))
        rows, left = left[:n], left[n:]
        yield rows
        if on_batch is not None:
            on_batch(len(lengths) - len(left), len(lengths))
