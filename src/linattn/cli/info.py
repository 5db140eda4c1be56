"""`linattn info MODEL`: parameters, bytes of state, FLOPs a token, of a published size or a checkpoint."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from linattn.models import PUBLISHED
from linattn.models.costs import model_costs
from linattn.models.decoder import DecoderConfig


@dataclass(frozen=True)
class InfoArgs:
    """Sizes of a model, counted without building it."""

    model: Annotated[str, tyro.conf.Positional] = ""
    """A published size (based_360m), a checkpoint folder, or nothing for a table of all published sizes."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Dtype of weights and caches; sums in States are fp32 either way."""
    tokens: int = 8192
    """Length at which the key-value cache is compared."""
    json: bool = False
    """Print JSON instead of a table."""


def run(argv: list[str]) -> int:
    """Print the sizes."""
    args = tyro.cli(InfoArgs, args=argv, prog="linattn info")
    if args.tokens < 0:
        raise ValueError(f"--tokens {args.tokens} must be at least 0")
    names = [args.model] if args.model else list(PUBLISHED)
    rows = {name: _row(decoder_config(name), args) for name in names}
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    table = Table(title=f"one sequence, {args.dtype} weights and caches", title_justify="left")
    table.add_column("model", no_wrap=True)
    for head in ("parameters", "state", f"KV cache, {args.tokens:,} tokens", "GFLOPs a token", "of it state"):
        table.add_column(head, justify="right")
    for name, row in rows.items():
        state = f"{size(row['growing_bytes'])} a token" if row["growing_bytes"] else size(row["state_bytes"])
        flops = row["weight_flops"] + row["state_flops"]
        table.add_row(
            name,
            f"{row['parameters'] / 1e6:,.1f}M",
            state,
            size(row["kv_cache_bytes"] * args.tokens),
            f"{flops / 1e9:.2f}",
            f"{row['state_flops'] / flops:.1%}",
        )
    Console().print(table)
    return 0


def decoder_config(name: str) -> DecoderConfig:
    """The skeleton's configuration of a published size or of a checkpoint folder.

    Raises:
        ValueError: neither; the closest published name is given.
    """
    if name in PUBLISHED:
        return PUBLISHED[name]().decoder()
    if Path(name).exists():
        from linattn.train.weights import model_folder, read_card

        return read_card(model_folder(name)).model.decoder()
    close = difflib.get_close_matches(name, PUBLISHED, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; published sizes are {', '.join(PUBLISHED)}"
    raise ValueError(f"{name!r} is neither a published size nor a checkpoint folder{hint}")


def size(n: float) -> str:
    """Bytes as kB, MB or GB, decimal."""
    for unit, one in (("GB", 1e9), ("MB", 1e6)):
        if n >= one:
            return f"{n / one:.2f} {unit}"
    return f"{n / 1e3:.1f} kB"


def _row(config: DecoderConfig, args: InfoArgs) -> dict[str, int]:
    dtype = torch.float32 if args.dtype == "fp32" else torch.bfloat16
    return model_costs(config, dtype, args.tokens)._asdict()
