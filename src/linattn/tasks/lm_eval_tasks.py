"""The recall tasks as lm-eval's: YAML files whose functions are here. lm_eval.py runs them; this file needs no lm-eval.

    python -c "from linattn.tasks.lm_eval_tasks import write_tasks; write_tasks('tasks')"
    lm-eval run --include_path tasks --model hf --model_args pretrained=gpt2 --tasks linattn_cloze

Contexts are cut with --metadata '{"context_tokens": 950}'; a local file is its "data".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from linattn.generate.prompting import Order
from linattn.generate.templates import published_prompt
from linattn.tasks.completers import codec_of
from linattn.tasks.recall import STOP, contains, shorten
from linattn.tasks.sources import SOURCES, answers_of, load_documents

TASKS: dict[str, tuple[str, Order]] = {
    **{f"linattn_{name}": (name, "CQ") for name in SOURCES},
    **{f"linattn_{name}_twice": (name, "QCCQ") for name in SOURCES},
    "linattn_squad_completion": ("squad", "CQ"),
}
"""lm-eval's name of each task, what it reads, and its order. linattn_squad_completion is lm-eval's squad_completion
with the stop and length it means to have (a newline, 48 tokens); lm-eval 0.4.13 runs its own to a blank line or 256."""

YAML = """task: {name}
custom_dataset: !function linattn.tasks.lm_eval_tasks.documents
dataset_kwargs: {{recall_task: {task}, order: {order}}}
output_type: generate_until
test_split: validation
doc_to_text: !function linattn.tasks.lm_eval_tasks.prompt_of
doc_to_target: !function linattn.tasks.lm_eval_tasks.target_of
process_results: !function linattn.tasks.lm_eval_tasks.process_results
generation_kwargs: {{until: ["\\n"], max_gen_toks: 48, do_sample: false}}
metric_list:
  - {{metric: contains, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


def documents(
    *, recall_task: str, order: Order, data: str | None = None, context_tokens: int | None = None, **metadata: Any
) -> dict[str, Any]:
    """A task's documents as lm-eval takes them: {"validation": rows of prompt and answers}.

    ``data`` and ``context_tokens`` come from lm-eval's --metadata; contexts are cut by the tokenizer of
    ``tokenizer`` or ``pretrained``, which lm-eval adds from --model_args.
    """
    from datasets import Dataset

    found: Sequence[Mapping[str, Any]] = load_documents(recall_task, data)
    if context_tokens is not None:
        codec = codec_of(_tokenizer(metadata.get("tokenizer") or metadata.get("pretrained")))
        found = [shorten(recall_task, d, int(context_tokens), codec) for d in found]
    template = SOURCES[recall_task].template
    rows = [
        {"prompt": published_prompt(template, d, order), "answers": list(answers_of(recall_task, dict(d)))}
        for d in found
    ]
    return {"validation": Dataset.from_list(rows)}


def prompt_of(row: Mapping[str, Any]) -> str:
    """The prompt, to the letter."""
    return row["prompt"]


def target_of(row: Mapping[str, Any]) -> str:
    """The first answer, for few-shot examples and logs."""
    return f" {row['answers'][0] if row['answers'] else 'unanswerable'}"


def process_results(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether what was said, up to its first newline, holds an answer."""
    return {"contains": float(contains(results[0].split(STOP)[0], row["answers"]))}


def write_tasks(folder: str | Path) -> Path:
    """Write every task of `TASKS` as YAML into ``folder``, for lm-eval's --include_path; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (task, order) in TASKS.items():
        (folder / f"{name}.yaml").write_text(YAML.format(name=name, task=task, order=order), encoding="utf-8")
    return folder


def _tokenizer(name: Any) -> Any:
    if not isinstance(name, (str, Path)):
        raise ValueError("context_tokens counts the model's own tokens: add tokenizer to --metadata")
    from transformers import AutoTokenizer

    from linattn.train import load_model_tokenizer

    try:
        return load_model_tokenizer(Path(name))
    except (ValueError, OSError):
        return cast(Any, AutoTokenizer).from_pretrained(name)
