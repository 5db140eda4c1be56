"""`linattn eval MODEL --data FOLDER` or `--text FILE`: perplexity and bits per byte."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

from linattn.cli.common import Dtype, load
from linattn.cli.read import TextStream
from linattn.data import TokenShards, kind_of
from linattn.generate import read
from linattn.tasks.baselines import bits_per_byte
from linattn.train import evaluate
from linattn.train.evaluate import spelled_bytes


@dataclass(frozen=True)
class EvalArgs:
    """Score held-out text: shards in windows, or one file as one stream."""

    model: Annotated[Path, tyro.conf.Positional]
    """A checkpoint folder, or a run's folder (its newest checkpoint)."""
    data: Path | None = None
    """Folder of token shards."""
    split: Literal["validation", "train"] = "validation"
    """Which of its splits."""
    text: str | None = None
    """A text file (.txt, also .xz or .gz), or bundled:NAME, read as one stream from the first token to the last."""
    length: int = 2048
    """Tokens in a window (shards) or in memory at a time (text)."""
    batch: int = 8
    """Windows at a time."""
    limit: int | None = None
    """Batches at the most; None: the whole split."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    dtype: Dtype = "stored"
    """Dtype of the weights."""
    json: bool = False
    """Print JSON."""


def run(argv: list[str]) -> int:
    """Evaluate and print."""
    args = tyro.cli(EvalArgs, args=argv, prog="linattn eval")
    for name in ("length", "batch", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    if (args.data is None) == (args.text is None):
        raise ValueError("give one of --data FOLDER and --text FILE")
    result = _shards(args) if args.data is not None else _text(args)
    if args.json:
        print(json.dumps(result))
    else:
        print(
            f"{result['bits_per_byte']:.4f} bits per byte, perplexity {result['perplexity']:.3f} a token, "
            f"{result['tokens']:,} tokens of {result['bytes']:,} bytes"
        )
    return 0


def _shards(args: EvalArgs) -> dict[str, float]:
    assert args.data is not None
    model, config, tokenizer = load(args.model, args.device, args.dtype)
    shards = TokenShards(args.data, args.split)
    shards.check_tokenizer(tokenizer)
    found = evaluate(model, config, shards, tokenizer, length=args.length, batch=args.batch, limit=args.limit)
    assert found is not None
    return {
        "bits_per_byte": found.bits_per_byte,
        "perplexity": found.perplexity,
        "tokens": found.tokens,
        "bytes": found.bytes,
    }


def _text(args: EvalArgs) -> dict[str, float]:
    assert args.text is not None
    kind_of(args.text)
    model, _, tokenizer = load(args.model, args.device, args.dtype)
    text, unscored = TextStream(args.text, tokenizer), []

    def ids() -> Iterator[np.ndarray]:
        room = max(1, model.config.prefix_length)
        for piece in text:
            unscored.extend(piece[: max(0, room - len(unscored))].tolist())
            yield piece

    found = read(model, ids(), chunk=args.length, nll=True)
    if not found.scored:
        raise ValueError(
            f"{args.text}: its {found.tokens} tokens are all in the model's prefix of {model.config.prefix_length} "
            "(or there is one alone), which is not scored; give a longer text"
        )
    assert found.nll is not None
    # Bytes of the scored tokens alone: the first has nothing before it, and a prefix sees itself.
    skipped = torch.tensor(unscored[: found.tokens - found.scored], dtype=torch.int64)
    n_bytes = text.bytes - spelled_bytes(tokenizer, skipped)
    return {
        "bits_per_byte": bits_per_byte(found.nll, n_bytes),
        "perplexity": found.perplexity,
        "tokens": found.scored,
        "bytes": n_bytes,
    }
