"""`linattn prepare FILES... --out FOLDER`: text to token shards that train and eval read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from linattn.data import prepare


@dataclass(frozen=True)
class PrepareArgs:
    """Turn text into token shards with document offsets and a meta.json.

    txt (also .xz, .gz), jsonl and parquet files; ``bundled:austen``, ``bundled:mobydick`` and ``bundled:sotu`` name the
    texts that come with the package.
    """

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files, or bundled:NAME."""
    out: Path
    """Folder to make."""
    tokenizer: str = "bytes"
    """bytes, or the path of a tokenizer.json."""
    documents: Literal["file", "line", "paragraph-gap"] = "file"
    """What one document of a txt file is."""
    text_field: str = "text"
    """The field or column of jsonl and parquet that holds the text."""
    validation_fraction: float = 0.01
    """How much is held out: whole documents where there are many, else the end of the text."""
    shard_tokens: int = 100_000_000
    """Tokens a shard at the most."""
    overwrite: bool = False
    """Replace an earlier result in the same folder."""


def run(argv: list[str]) -> int:
    """Prepare, with a progress bar, and print what was made."""
    args = tyro.cli(PrepareArgs, args=argv, prog="linattn prepare")
    columns = (TextColumn("{task.description}"), BarColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("preparing")
        meta = prepare(
            list(args.inputs),
            args.out,
            tokenizer=args.tokenizer,
            documents=args.documents,
            text_field=args.text_field,
            validation_fraction=args.validation_fraction,
            shard_tokens=args.shard_tokens,
            overwrite=args.overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for name, split in (("train", meta.train), ("validation", meta.validation)):
        if split is not None:
            print(f"{name:10s} {split.tokens:,} tokens, {split.documents:,} documents, {split.bytes:,} bytes of text")
    print(f"in {args.out}")
    return 0
