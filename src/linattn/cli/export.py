"""`linattn export MODEL OUT`: a trained model for Hugging Face transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from linattn.cli.common import Dtype
from linattn.train import load_model, load_model_tokenizer
from linattn.train.folder import write_folder
from linattn.train.weights import model_folder, read_card

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class ExportArgs:
    """Write a model as safetensors and config.json that AutoModelForCausalLM.from_pretrained reads."""

    model: Annotated[Path, tyro.conf.Positional]
    """A checkpoint folder, or a run's folder (its newest checkpoint)."""
    out: Annotated[Path, tyro.conf.Positional]
    """The folder to make."""
    dtype: Dtype = "stored"
    """Dtype of the weights."""
    max_shard_size: str = "5GB"
    """Where one file of weights ends and the next begins."""


def run(argv: list[str]) -> int:
    """Export: whole or not at all."""
    args = tyro.cli(ExportArgs, args=argv, prog="linattn export")
    if args.out.exists():
        raise ValueError(f"{args.out}: exists; give another folder")
    try:
        from linattn.hf.export import export_pretrained
    except ImportError as error:
        raise ValueError(str(error)) from error
    import torch

    kind = None if args.dtype == "stored" else getattr(torch, DTYPES[args.dtype])
    model, config = load_model(args.model, "cpu", kind)
    known = read_card(model_folder(args.model)).tokenizer is not None
    tokenizer = load_model_tokenizer(args.model) if known else None
    write_folder(args.out, lambda to: export_pretrained(model, config, to, tokenizer, args.max_shard_size))
    words = "without a tokenizer (the checkpoint names none)" if tokenizer is None else f"tokenizer {tokenizer.name}"
    print(f"{args.out}: {type(config).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters, {words}")
    return 0
