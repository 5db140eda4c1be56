"""`linattn convert SOURCE OUT`: a published checkpoint, of a folder or of the hub, into a folder that every verb reads.

linattn convert hazyresearch/based-360m checkpoints/based-360m
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from linattn.cli.common import DTYPES, Dtype
from linattn.cli.published import Published, read_published
from linattn.data.meta import TokenizerMeta
from linattn.train.folder import write_folder
from linattn.train.weights import ModelCard, write_model


@dataclass(frozen=True)
class ConvertArgs:
    """Convert a published checkpoint: hazyresearch's based, JRT and attn, OpenNLPLab's TransNormerLLM."""

    source: Annotated[str, tyro.conf.Positional]
    """Its folder (config.json and safetensors or .bin files), or its name on the hub (hazyresearch/based-360m)."""
    out: Annotated[Path, tyro.conf.Positional]
    """The new folder: model.safetensors, config.json and tokenizer.json."""
    dtype: Dtype = "stored"
    """Dtype of the weights; stored keeps the file's."""
    tokenizer: Path | None = None
    """A tokenizer.json, where the source has none."""


def run(argv: list[str]) -> int:
    """Convert, and say what it was."""
    args = tyro.cli(ConvertArgs, args=argv, prog="linattn convert")
    model = convert(args.source, args.out, DTYPES[args.dtype], args.tokenizer)
    total = sum(x.numel() for x in model.state.values())
    print(
        f"{args.out}: {type(model.config).__name__}, {total:,} parameters in {str(model.dtype).removeprefix('torch.')}"
    )
    if model.tokenizer is None:
        print(f"{args.source}: no tokenizer.json; name one with --tokenizer, here or in linattn generate")
    return 0


def convert(
    source: str | Path, out: str | Path, dtype: torch.dtype | None = None, tokenizer: str | Path | None = None
) -> Published:
    """Write the published model ``source`` (see `read_published`) to the new folder ``out``; returns it.

    Raises:
        ValueError: as `read_published`, or ``out`` exists.
        OSError: it could not be written; then there is no folder ``out``.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out}: exists; give another folder")
    model = read_published(source, dtype, tokenizer)

    def write(folder: Path) -> None:
        t, about = model.tokenizer, None
        if t is not None:
            about = TokenizerMeta(t.save(folder), t.name, t.hash, t.vocab_size, t.eos, getattr(t, "eos_token", None))
        write_model(model.decoder("cpu"), ModelCard(model.config, about), folder, t)

    write_folder(out, write)
    return model
