"""`linattn generate MODEL "prompt"`: continue text, also from a state that `linattn read` saved.

MODEL is the first argument or follows --model: a folder, or a published model's name on the hub.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from linattn.cli.common import Dtype, load
from linattn.generate import SamplingConfig, generate_text, load_snapshot, read_twice, save_snapshot


@dataclass(frozen=True)
class GenerateArgs:
    """Continue prompts with a trained model."""

    model: Annotated[Path, tyro.conf.Positional]
    """A checkpoint folder, a run's (its newest checkpoint), a published checkpoint's, or a name on the hub such as
    hazyresearch/based-360m. Also as --model MODEL."""
    prompts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """One or more prompts, continued side by side; "-" reads one from standard input."""
    state: Path | None = None
    """Go on from this state instead of from nothing."""
    save_state: Path | None = None
    """Write the state after the text here (one prompt only)."""
    context: Path | None = None
    """A text file that each prompt asks about; it is read before the prompt, as --order says."""
    order: Literal["CQ", "QCQ", "CCQ", "CQCQ", "QCCQ"] = "QCCQ"
    """With --context: in which order context (C) and question (Q) are read. QCCQ is JRT-Prompt as published."""
    max_new_tokens: int = 256
    """Tokens to write at the most."""
    stop: tuple[str, ...] = ()
    """Strings that end the text."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = field(default_factory=SamplingConfig)
    """How tokens are chosen."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    dtype: Dtype = "stored"
    """Dtype of the weights."""
    tokenizer: Path | None = None
    """A tokenizer.json to use instead of the model's own."""
    json: bool = False
    """Print one JSON object a prompt instead of streaming text."""


def run(argv: list[str]) -> int:
    """Generate: one prompt streams to standard output, several are printed when done."""
    args = tyro.cli(GenerateArgs, args=_model_first(argv), prog="linattn generate")
    prompts = [sys.stdin.read() if p == "-" else p for p in args.prompts]
    if not prompts:
        raise ValueError('give a prompt: linattn generate MODEL "Once upon a time"')
    if args.save_state is not None and len(prompts) != 1:
        raise ValueError(f"--save-state takes one prompt, got {len(prompts)}")
    model, _, tokenizer = load(args.model, args.device, args.dtype, args.tokenizer)
    if args.context is not None:
        from linattn.cli.common import read_text

        context = read_text(str(args.context))
        prompts = [read_twice(context, question, order=args.order) for question in prompts]
    state = None
    if args.state is not None:
        state = load_snapshot(args.state, model, tokenizer.hash).state
    streamed = len(prompts) == 1 and not args.json
    if streamed:
        print(prompts[0] if args.context is None else "", end="", flush=True)
    results = generate_text(
        model,
        tokenizer,
        prompts,
        max_new_tokens=args.max_new_tokens,
        sampling=args.sampling,
        stop=args.stop,
        state=state,
        on_text=(lambda row, piece: print(piece, end="", flush=True)) if streamed else None,
        return_state=args.save_state is not None,
    )
    if streamed:
        print()
    for prompt, result in zip(prompts, results, strict=True):
        if args.json:
            row = {"prompt": prompt, "text": result.text, "tokens": len(result.tokens)}
            print(json.dumps({**row, "finish_reason": result.finish_reason, "seed": result.seed}))
        elif not streamed:
            print(f"--- {prompt}\n{result.text}")
    if args.save_state is not None:
        assert results[0].state is not None
        save_snapshot(args.save_state, model, results[0].state, tokenizer.hash)
        print(f"state of {int(results[0].state.tokens[0]):,} tokens in {args.save_state}", file=sys.stderr)
    return 0


def _model_first(argv: list[str]) -> list[str]:
    """``argv`` with ``--model MODEL``, if it is there, in the place of the first argument."""
    for i, arg in enumerate(argv):
        if arg == "--model" and i + 1 < len(argv):
            return [argv[i + 1], *argv[:i], *argv[i + 2 :]]
        if arg.startswith("--model="):
            return [arg.removeprefix("--model="), *argv[:i], *argv[i + 1 :]]
    return argv
