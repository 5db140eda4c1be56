"""`linattn eval MODEL --data FOLDER` or `--text FILE`: bits per byte. `--tasks NAMES`: recall, and lm-eval's tasks."""

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
from linattn.cli.evaluate_tasks import print_scores, run_tasks
from linattn.cli.read import TextStream
from linattn.data import TokenShards, kind_of
from linattn.generate import read
from linattn.tasks.baselines import bits_per_byte
from linattn.train import evaluate
from linattn.train.evaluate import spelled_bytes


@dataclass(frozen=True)
class EvalArgs:
    """Score held-out text (shards in windows, or one file as one stream), or recall and other tasks."""

    model: Annotated[Path, tyro.conf.Positional]
    """A checkpoint folder, or a run's folder (its newest checkpoint). With --tasks also a folder of transformers, or a
    .gguf file."""
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
    """Batches at the most, with --tasks documents; None: the whole split, all documents."""
    tasks: str | None = None
    """Tasks, with commas between: attributes and cloze need no network; fda, swde, squad, triviaqa, nq_512, nq_1024,
    nq_2048 and drop come from the hub or --task-data; any other name is lm-eval's."""
    read_twice: bool = False
    """Read each context twice (JRT-Prompt); short for --order QCCQ."""
    order: Literal["CQ", "QCQ", "CCQ", "CQCQ", "QCCQ"] = "CQ"
    """In which order a task's context (C) and question (Q) are read."""
    context_tokens: int | None = None
    """Cut contexts to so many tokens first (published: 950). None: whole."""
    cut: Literal["centred", "head", "tail"] = "centred"
    """Which tokens stay: around the answer, as published, or one end of the context."""
    task_data: Path | None = None
    """With one task: its .parquet or .jsonl file."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    dtype: Dtype = "stored"
    """Dtype of the weights."""
    json: bool = False
    """Print JSON."""


def run(argv: list[str]) -> int:
    """Evaluate and print."""
    args = tyro.cli(EvalArgs, args=argv, prog="linattn eval")
    for name in ("length", "batch", "limit", "context_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if args.tasks is not None:
        return _tasks(args)
    if (args.data is None) == (args.text is None):
        raise ValueError("give one of --data FOLDER, --text FILE and --tasks NAMES")
    result = _shards(args) if args.data is not None else _text(args)
    if args.json:
        print(json.dumps(result))
    else:
        print(
            f"{result['bits_per_byte']:.4f} bits per byte, perplexity {result['perplexity']:.3f} a token, "
            f"{result['tokens']:,} tokens of {result['bytes']:,} bytes"
        )
    return 0


def _tasks(args: EvalArgs) -> int:
    if args.data is not None or args.text is not None:
        raise ValueError("--tasks takes neither --data nor --text; a task's own file is --task-data")
    if args.read_twice and args.order not in ("CQ", "QCCQ"):
        raise ValueError(f"--read-twice is --order QCCQ; leave one of it and --order {args.order} out")
    found = run_tasks(
        args.model,
        [name.strip() for name in (args.tasks or "").split(",") if name.strip()],
        order="QCCQ" if args.read_twice else args.order,
        limit=args.limit,
        context_tokens=args.context_tokens,
        cut=args.cut,
        data=args.task_data,
        batch=args.batch,
        device=args.device,
        dtype=args.dtype,
    )
    print(json.dumps(found)) if args.json else print_scores(found)
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
