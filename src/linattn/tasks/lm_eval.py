"""lm-eval: linattn's models as a model type, and JRT-Prompt around any of its models.

    python -m linattn.tasks run --model linattn --model_args pretrained=runs/debug-cpu --tasks linattn_attributes_twice
    python -m linattn.tasks run --model read-twice --model_args inner=hf,pretrained=gpt2 --tasks squad_completion

The first is the data set's own twice prompt (lm_eval_tasks.py); the second rewrites the prompts of tasks that know
nothing of it.

Not here: lm-eval's own fda, swde and squad_completion, whose prompts are other ones (no window, no key put last).
"""

from __future__ import annotations

import copy
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import lm_eval  # noqa: F401
except ImportError as error:
    raise ImportError("linattn.tasks.lm_eval needs lm-eval: pip install 'linattn[eval]'") from error

import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import get_model, register_model
from lm_eval.models.huggingface import HFLM

from linattn.generate.cutting import warn_if_too_long
from linattn.generate.prompting import Order, read_twice
from linattn.generate.templates import Parts
from linattn.tasks.lm_eval_tasks import TASKS, write_tasks

MAX_LENGTH = 32_768
"""Tokens of prompt and answer. A State has no longest text; lm-eval would take 2,048 and cut at the left."""


@register_model("linattn")
class LinattnLM(HFLM):
    """A model that linattn trained or exported, as lm-eval's ``linattn``.

    Args:
        pretrained: a run, a checkpoint, or an export's folder (``linattn convert`` makes one of a published model).
        device: "cuda", "cpu" or a torch device; None: a GPU if there is one.
        dtype: of the weights, "float32" or "bfloat16"; None or "auto": as stored.
        max_length: tokens of prompt and answer.
        options: of lm-eval's HFLM: batch_size and the rest. A prefix model generates with the prompt as its prefix and
            scores causally, so that no continuation sees itself.
    """

    def __init__(
        self,
        pretrained: str | Path,
        *,
        device: str | None = None,
        dtype: str | None = None,
        max_length: int = MAX_LENGTH,
        **options: Any,
    ):
        model, tokenizer = _load(Path(pretrained), dtype)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        options |= {"pretrained": model.to(device), "tokenizer": tokenizer, "backend": "causal"}
        super().__init__(**options, max_length=int(max_length))  # pyright: ignore[reportCallIssue]


@register_model("read-twice")
class ReadTwice(LM):
    """Any model of lm-eval's, with each prompt's context read twice: lm-eval's ``read-twice``.

    Args:
        lm: the model; None: made of ``inner`` and options.
        inner: the model's type, "hf" or "linattn" say.
        order, passes: as in `read_twice`. QCCQ and the like need questions that are whole sentences or "Key:"; CCQ
            takes any.
        options: of the model's type.

    Raises:
        ValueError: on a prompt that `split_prompt` finds no context in, or `read_twice` refuses; for rolling
            likelihoods, which have no question.
    """

    def __init__(
        self, lm: Any = None, *, inner: str = "hf", order: Order = "QCCQ", passes: int | None = None, **options: Any
    ):
        super().__init__()
        self.lm: Any = get_model(inner)(**options) if lm is None else lm
        self.order: Order = order
        self.passes = passes
        self._rank, self._world_size, self._device = self.lm.rank, self.lm.world_size, self.lm.device

    def __getattr__(self, name: str) -> Any:
        if name == "lm":  # not there yet, or a copy in the making
            raise AttributeError(name)
        return getattr(self.lm, name)

    @property
    def tokenizer_name(self) -> str:
        """The model's."""
        return self.lm.tokenizer_name

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        """The model's. A chat's markup is no part of question and context: `split_prompt` sees it as text."""
        return self.lm.apply_chat_template(chat_history, add_generation_prompt)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The model's answers to the prompts read twice."""
        room = max((int(r.args[1].get("max_gen_toks", 256)) for r in requests), default=0)
        return self.lm.generate_until(self._twice(requests, room), disable_tqdm=disable_tqdm)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The model's scores of continuations after the prompts read twice."""
        room = max((len(self._ids(r.args[1])) for r in requests), default=0)
        return self.lm.loglikelihood(self._twice(requests, room), disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Refused."""
        raise ValueError(
            "rolling likelihoods have no question, so there is nothing to read twice; use the model itself"
        )

    def _twice(self, requests: Sequence[Any], room: int) -> list[Any]:
        again = []
        for request in requests:
            parts = split_prompt(request.args[0])
            prompt = read_twice(
                parts.context, parts.question, order=self.order, passes=self.passes, opening=parts.opening or None
            )
            again.append(copy.copy(request))
            again[-1].arguments = (prompt, *request.args[1:])
        longest = getattr(self.lm, "max_length", None)
        if longest is not None:
            warn_if_too_long([len(self._ids(r.args[0])) for r in again], longest - room, reader=type(self.lm).__name__)
        return again

    def _ids(self, text: str) -> Sequence[Any]:
        return self.lm.tok_encode(text) if hasattr(self.lm, "tok_encode") else text.split()


def split_prompt(prompt: str) -> Parts:
    """Context, question and opening of a prompt that somebody else wrote.

    The question is what follows the last "Question:" or "Q:", if one stands in the last two lines and an open
    "Answer:" or "A:" after it; otherwise the last sentence of the last line ("Key:", a stem, a question). The opening
    is the question without its labels, or "" to let `read_twice` find one.

    Raises:
        ValueError: nothing stands before the question.
    """
    text = prompt.rstrip()
    asked = re.search(r"(?:^|\s)((?:Question|Q): ?((?:(?!\b(?:Question|Q):).)*?)\s(?:Answer|A):)$", text, re.S)
    if asked and asked[1].count("\n") < 2:
        question, opening, start = asked[1], asked[2].strip(), asked.start(1)
    else:
        line = text.rfind("\n") + 1
        ends = [m.end() for m in re.finditer(r"[.?!][\"')\]]*\s+(?=\S)", text[line:])]
        start = line + (ends[-1] if ends else 0)
        question, opening = text[start:], ""
    context = text[:start].rstrip()
    if not context:
        raise ValueError(f"no context before the question in {prompt[-80:]!r}: there is nothing to read twice")
    return Parts(context, question, opening)


def evaluate_harness(
    model: str | Path,
    tasks: Sequence[str],
    *,
    order: Order = "CQ",
    limit: int | None = None,
    hf: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """lm-eval's `simple_evaluate` as rows of task, order, documents, metric, value and stderr.

    Args:
        model: a folder, of linattn's or with ``hf`` of transformers' (or a .gguf file).
        tasks: lm-eval's names, those of `TASKS` among them.
        order: "CQ" leaves prompts alone, any other goes through `ReadTwice`.
        limit: documents of each task.
        hf: whose model it is.
        options: of the model: batch_size, device, dtype.

    Raises:
        ValueError: a task that lm-eval does not know.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        others = not set(tasks) <= TASKS.keys()  # reading all of lm-eval's own takes seconds
        manager = TaskManager(include_path=str(write_tasks(folder)), include_defaults=others)
        unknown = sorted(set(tasks) - set(manager.all_tasks))
        if unknown:
            raise ValueError(
                f"neither linattn nor lm-eval knows the task {', '.join(unknown)}; lm-eval ls tasks lists its own"
            )
        path = Path(model)
        gguf = {"pretrained": str(path.parent), "gguf_file": path.name} if path.suffix == ".gguf" else {}
        made: Any = get_model("hf" if hf else "linattn")(**{"pretrained": str(model), **gguf, **options})
        if order != "CQ":
            made = ReadTwice(made, order=order)  # pyright: ignore[reportCallIssue]
        results: Any = simple_evaluate(
            made,
            tasks=list(tasks),
            limit=limit,
            task_manager=manager,
            bootstrap_iters=1000,
            log_samples=False,
        )
    return [
        row
        for task, found in results["results"].items()
        for row in _rows(task, order, found, results["n-samples"][task]["effective"])
    ]


def _rows(task: str, order: Order, found: Mapping[str, Any], documents: int) -> list[dict[str, Any]]:
    rows = []
    for key, value in found.items():
        metric, _, kind = key.partition(",")
        if kind and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            stderr = found.get(f"{metric}_stderr,{kind}")
            stderr = stderr if isinstance(stderr, float) else None
            rows.append(
                {
                    "task": task,
                    "order": order,
                    "documents": documents,
                    "metric": metric,
                    "value": value,
                    "stderr": stderr,
                }
            )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """lm-eval's command, with the model types above registered and the tasks included."""
    from lm_eval.__main__ import cli_evaluate

    args = list(sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory() as folder:
        if args and args[0] in ("run", "ls", "validate"):
            args += ["--include_path", str(write_tasks(folder))]
        sys.argv = ["lm-eval", *args]
        cli_evaluate()


def _load(folder: Path, dtype: str | None) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    from linattn.hf import LinattnConfig, LinattnForCausalLM
    from linattn.hf.tokenizer import hf_tokenizer
    from linattn.train import load_model, load_model_tokenizer

    kind = None if dtype in (None, "auto") else getattr(torch, dtype)
    config = folder / "config.json"
    if config.is_file() and f'"{LinattnConfig.model_type}"' in config.read_text(encoding="utf-8"):
        model = LinattnForCausalLM.from_pretrained(folder, dtype=kind or "auto")
        return model, AutoTokenizer.from_pretrained(folder)
    decoder, model_config = load_model(folder, "cpu", kind)
    return LinattnForCausalLM.from_decoder(decoder, model_config), hf_tokenizer(load_model_tokenizer(folder))
