"""`linattn eval --tasks`: recall tasks on a model of linattn's or of transformers', the rest through lm-eval."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from linattn.cli.common import DTYPES, Dtype, load
from linattn.generate.cutting import Codec, Cut
from linattn.generate.prompting import Order
from linattn.models.published import is_published
from linattn.tasks.completers import codec_of, hf_completer, linattn_completer
from linattn.tasks.recall import Completer, evaluate_recall
from linattn.tasks.sources import SOURCES, load_documents


def run_tasks(
    model: Path,
    tasks: Sequence[str],
    *,
    order: Order,
    limit: int | None,
    context_tokens: int | None,
    cut: Cut,
    data: Path | None,
    batch: int,
    device: str,
    dtype: Dtype,
) -> list[dict[str, Any]]:
    """One dict a task: task, order, documents, metric, value, stderr.

    Raises:
        ValueError: no tasks, a file for several, or what the model, the task or lm-eval refuses.
    """
    if not tasks:
        raise ValueError(f"--tasks names none; recall tasks are {', '.join(SOURCES)}")
    if data is not None and len(tasks) != 1:
        raise ValueError(f"--task-data is one task's file, and there are {len(tasks)} tasks")
    ours, theirs = [t for t in tasks if t in SOURCES], [t for t in tasks if t not in SOURCES]
    if theirs and (data is not None or context_tokens is not None):
        raise ValueError(f"--task-data and --context-tokens are for recall tasks, and {', '.join(theirs)} is lm-eval's")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    documents = {task: load_documents(task, data) for task in ours}  # before the model: what is missing is said at once
    found = []
    if ours:
        complete, codec = _completer(model, device, dtype)
        for task in ours:
            options = {"limit": limit, "context_tokens": context_tokens, "cut": cut, "codec": codec}
            score = evaluate_recall(task, complete, order=order, documents=documents[task], **options)
            found.append(
                {
                    "task": task,
                    "order": order,
                    "documents": score.documents,
                    "metric": "contains",
                    "value": score.accuracy,
                    "stderr": score.stderr,
                }
            )
    return found + (_lm_eval(model, theirs, order, limit, batch, device, dtype) if theirs else [])


def print_scores(found: Sequence[dict[str, Any]]) -> None:
    """A line a task."""
    for row in found:
        stderr = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
        value = f"{row['metric']} {row['value']:.4f}{stderr}"
        print(f"{row['task']:24s} {row['order']:5s} {value}, {row['documents']:,} documents")


def _completer(model: Path, device: str, dtype: Dtype) -> tuple[Completer, Codec]:
    def progress(done: int, of: int) -> None:
        print(f"\r{done:,} of {of:,} documents", end="\n" if done == of else "", file=sys.stderr, flush=True)

    if not _is_transformers(model):
        decoder, _, tokenizer = load(model, device, dtype)
        return linattn_completer(decoder, tokenizer, on_batch=progress), codec_of(tokenizer)
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ValueError(f"{model} is a model of transformers': pip install 'linattn[hf]'") from error
    gguf: dict[str, Any] = {"gguf_file": model.name} if model.suffix == ".gguf" else {}
    folder = model.parent if gguf else model
    tokenizer = AutoTokenizer.from_pretrained(folder, **gguf)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype] or "auto", **gguf)
    return hf_completer(loaded.to(device).eval(), tokenizer, on_batch=progress), codec_of(tokenizer)


def _is_transformers(model: Path) -> bool:
    """A .gguf file, or a folder whose config.json is neither linattn's nor a checkpoint that linattn reads itself."""
    if model.suffix == ".gguf":
        return True
    config = model / "config.json"
    if not config.is_file() or is_published(model):
        return False
    kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    return kind is not None and kind != "linattn"


def _lm_eval(
    model: Path, tasks: list[str], order: Order, limit: int | None, batch: int, device: str, dtype: Dtype
) -> list[dict[str, Any]]:
    try:
        from linattn.tasks.lm_eval import evaluate_harness
    except ImportError as error:
        raise ValueError(
            f"{', '.join(tasks)} is no recall task ({', '.join(SOURCES)}), so it is lm-eval's: {error}"
        ) from error
    kind = {"fp32": "float32", "bf16": "bfloat16", "stored": "auto"}[dtype]
    return evaluate_harness(
        model, tasks, order=order, limit=limit, batch_size=batch, device=device, dtype=kind, hf=_is_transformers(model)
    )
