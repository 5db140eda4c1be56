"""`linattn read MODEL book.txt -o book.state`: a text of any length into a state of constant size, on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from linattn.cli.common import Dtype, load, read_text
from linattn.cli.info import size
from linattn.generate import Reading, load_snapshot, read, save_snapshot
from linattn.models import Decoder, ModelState, model_state_bytes


@dataclass(frozen=True)
class ReadArgs:
    """Read a text once, in constant memory, and keep what the model remembers of it."""

    model: Annotated[Path, tyro.conf.Positional]
    """A checkpoint folder, or a run's folder (its newest checkpoint)."""
    text: Annotated[str, tyro.conf.Positional]
    """A UTF-8 text file, or bundled:NAME."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Where the state goes."""
    state: Path | None = None
    """Go on from this state."""
    chunk: int = 2048
    """Tokens in memory at a time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    dtype: Dtype = "stored"
    """Dtype of the weights."""


def run(argv: list[str]) -> int:
    """Read, with a progress bar, and save the state."""
    args = tyro.cli(ReadArgs, args=argv, prog="linattn read")
    text = read_text(args.text)
    model, _, tokenizer = load(args.model, args.device, args.dtype)
    state = load_snapshot(args.state, model, tokenizer.hash).state if args.state is not None else None
    ids = tokenizer.encode_batch([text])[0]
    result, _ = read_with_progress(model, ids, args.chunk, state)
    save_snapshot(args.out, model, result.state, tokenizer.hash, {"text": args.text})
    speeds = f"{result.start_speed:,.0f} a second at the start, {result.end_speed:,.0f} at the end"
    print(f"read {result.tokens:,} tokens, {speeds}")
    if result.scored:
        print(f"perplexity {result.perplexity:.3f} a token")
    print(f"state of {size(model_state_bytes(result.state))} in {args.out}")
    return 0


def read_with_progress(
    model: Decoder, ids: Sequence[int] | np.ndarray, chunk: int, state: ModelState | None = None
) -> tuple[Reading, list[tuple[int, float]]]:
    """`generate.read` behind a progress bar; also (tokens read, tokens a second) after each chunk."""
    curve: list[tuple[int, float]] = []
    columns = (TextColumn("reading"), BarColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("reading", total=len(ids), speed="")

        def progress(done: int, speed: float) -> None:
            curve.append((done, speed))
            bar.update(task, completed=done, speed=f"{speed:,.0f} tokens/s")

        return read(model, ids, chunk=chunk, state=state, nll=True, progress=progress), curve
