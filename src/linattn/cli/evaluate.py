"""`linattn eval MODEL --data FOLDER` or `--text FILE`: perplexity and bits per byte."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from linattn.cli.common import Dtype, load, read_text
from linattn.data import TokenShards
from linattn.generate import read
from linattn.tasks.baselines import bits_per_byte
from linattn.train import evaluate


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
    """A UTF-8 text file, or bundled:NAME, read as one stream from the first token to the last."""
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
    text = read_text(args.text)
    model, _, tokenizer = load(args.model, args.device, args.dtype)
    found = read(model, tokenizer.encode_batch([text])[0], chunk=args.length, nll=True)
    assert found.nll is not None
    n_bytes = len(text.encode())
    return {
        "bits_per_byte": bits_per_byte(found.nll, n_bytes),
        "perplexity": found.perplexity,
        "tokens": found.scored,
        "bytes": n_bytes,
    }
