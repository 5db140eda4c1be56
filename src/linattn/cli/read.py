"""`linattn read MODEL book.txt -o book.state`: a text of any length into a state of constant size, on disk."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from linattn.cli.common import Dtype, load
from linattn.cli.info import size
from linattn.data import Tokenizer, kind_of, read_pieces
from linattn.generate import Reading, load_snapshot, read, save_snapshot
from linattn.models import Decoder, ModelState, model_state_bytes
from linattn.train.stop import StopSignals

PIECE_IDS = 4096
"""Ids given out at a time: between two of them a reader can stop."""


@dataclass(frozen=True)
class ReadArgs:
    """Read a text once, in constant memory, and keep what the model remembers of it."""

    model: Annotated[Path, tyro.conf.Positional]
    """A checkpoint folder, or a run's folder (its newest checkpoint)."""
    text: Annotated[str, tyro.conf.Positional]
    """A text file (.txt, also .xz or .gz, of any size), or bundled:NAME."""
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
    """Read, with a progress bar, and save the state; after Ctrl-C the state of what was read, and exit code 1."""
    args = tyro.cli(ReadArgs, args=argv, prog="linattn read")
    kind_of(args.text)
    model, _, tokenizer = load(args.model, args.device, args.dtype)
    state = load_snapshot(args.state, model, tokenizer.hash).state if args.state is not None else None
    with StopSignals() as stop:
        text = TextStream(args.text, tokenizer, stopped=lambda: stop.name is not None)
        result, _ = read_with_progress(model, text, args.chunk, state)
    save_snapshot(args.out, model, result.state, tokenizer.hash, {"text": args.text})
    speeds = f"{result.start_speed:,.0f} a second at the start, {result.end_speed:,.0f} at the end"
    print(f"read {result.tokens:,} tokens, {speeds}")
    if result.scored:
        print(f"perplexity {result.perplexity:.3f} a token")
    print(f"state of {size(model_state_bytes(result.state))} in {args.out}")
    if stop.name is not None:
        print(f"linattn: stopped by {stop.name} before the end of {args.text}", file=sys.stderr)
        return 1
    return 0


class TextStream:
    """The ids of a text, a piece at a time, so that a text larger than memory can be read.

    ``bytes`` counts the UTF-8 bytes given out so far, ``total`` is the file's size where it is known.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, stopped: Callable[[], bool] = lambda: False):
        self.source, self.tokenizer, self.stopped = source, tokenizer, stopped
        self.bytes = 0
        path = Path(source)
        self.total = path.stat().st_size if path.is_file() and path.suffix == ".txt" else None

    def __iter__(self) -> Iterator[np.ndarray]:
        for piece, _ in read_pieces(self.source, "file", "text"):
            self.bytes += len(piece.encode())
            ids = self.tokenizer.encode_batch([piece])[0]
            for start in range(0, len(ids), PIECE_IDS):
                if self.stopped():
                    return
                yield ids[start : start + PIECE_IDS]


def read_with_progress(
    model: Decoder, text: TextStream, chunk: int, state: ModelState | None = None
) -> tuple[Reading, list[tuple[int, float]]]:
    """`generate.read` behind a progress bar; also (tokens read, tokens a second) after each chunk."""
    curve: list[tuple[int, float]] = []
    columns = (TextColumn("reading"), BarColumn(), TextColumn("{task.fields[shown]}"), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("reading", total=text.total, shown="")

        def progress(done: int, speed: float) -> None:
            curve.append((done, speed))
            bar.update(task, completed=text.bytes, shown=f"{done:,} tokens, {speed:,.0f} a second")

        return read(model, iter(text), chunk=chunk, state=state, nll=True, progress=progress), curve
