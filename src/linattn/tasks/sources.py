"""The documents of the recall tasks: six published data sets from the hub or from local files, and two local sets.

    python -c "from linattn.tasks.sources import load_documents; print(load_documents('attributes')[0])"

The published data sets carry no licence on the hub, so none of them ships: with a network they come through
`datasets`, without one from parquet or JSON lines files with the same columns. ``attributes`` ships, ``cloze`` is made
from the bundled texts (local.py).
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from linattn.generate.templates import Template
from linattn.tasks.local import attributes, cloze


class Source(NamedTuple):
    """Where a task's documents come from, and how they are read.

    ``answers`` names the columns that the published protocol centres its window on; with none it keeps the head.
    ``labels`` names the column of the answers, one string or a list.
    """

    template: Template
    labels: str
    answers: tuple[str, ...]
    columns: tuple[str, ...]
    hub: str | None = None
    config: str | None = None
    make: Callable[[], list[dict[str, Any]]] | None = None


_TEXT = ("text", "key", "value")
_QUESTION = ("context", "question", "orig_question", "answers")
_SQUAD = ("text", "context", "question", "value")

SOURCES: dict[str, Source] = {
    "fda": Source("fda", "value", ("key", "value"), _TEXT, "hazyresearch/based-fda", "default"),
    "swde": Source("swde", "value", ("key", "value"), _TEXT, "hazyresearch/based-swde-v2", "default"),
    "squad": Source("squad", "value", ("value",), _SQUAD, "hazyresearch/based-squad", "default"),
    "triviaqa": Source("triviaqa", "answers", (), _QUESTION, "hazyresearch/based_triviaqa"),
    "nq_512": Source("nq", "answers", ("answers",), _QUESTION, "hazyresearch/based_nq_512"),
    "nq_1024": Source("nq", "answers", ("answers",), _QUESTION, "hazyresearch/based_nq_1024"),
    "nq_2048": Source("nq", "answers", ("answers",), _QUESTION, "hazyresearch/based_nq_2048"),
    "drop": Source("drop", "answers", (), _QUESTION, "hazyresearch/based_drop"),
    "attributes": Source("fda", "value", ("value",), _TEXT, make=attributes),
    "cloze": Source("drop", "answers", ("answers",), _QUESTION, make=cloze),
}
"""Every recall task. nq's number is how many tokens of the page its authors kept around the answer."""


def load_documents(task: str, data: str | Path | None = None) -> list[dict[str, Any]]:
    """The documents of a task, in their file's order.

    Args:
        task: of `SOURCES`.
        data: a .parquet or .jsonl file with the task's columns, or a folder that holds exactly one whose name begins
            with "validation". None: the hub, or for a local task the package.

    Raises:
        ValueError: no such task, nothing to read, or columns that are missing, all of them named.
    """
    if task not in SOURCES:
        raise ValueError(f"no recall task {task!r}; there are {', '.join(SOURCES)}")
    source = SOURCES[task]
    if data is not None:
        documents = _read(_file(Path(data)))
    elif source.make is not None:
        documents = source.make()
    else:
        documents = _fetch(task, source)
    if not documents:
        raise ValueError(f"{data or source.hub}: holds no documents")
    missing = sorted(set(source.columns) - documents[0].keys())
    if missing:
        raise ValueError(
            f"{data or source.hub}: task {task} needs the columns {', '.join(source.columns)}; "
            f"{', '.join(missing)} not among {', '.join(documents[0])}"
        )
    return documents


def answers_of(task: str, document: dict[str, Any]) -> tuple[str, ...]:
    """What counts as an answer: one of these, in any case, somewhere in what the model says."""
    labels = document[SOURCES[task].labels]
    return (labels,) if isinstance(labels, str) else tuple(labels)


def centres_of(task: str, document: dict[str, Any]) -> tuple[str, ...]:
    """What the published window is centred on: the first string of each of the task's columns."""
    found = [document[column] for column in SOURCES[task].answers]
    return tuple(text if isinstance(text, str) else text[0] for text in found if text)


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted(p for p in path.rglob("validation*") if p.suffix in (".parquet", ".jsonl"))
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise ValueError(f"{path}: needs exactly one validation*.parquet or validation*.jsonl; found {names}")
    return found[0]


def _read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        lines: Sequence[str] = path.read_text(encoding="utf-8").splitlines()
        try:
            return [json.loads(line) for line in lines if line.strip()]
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON lines ({error})") from error
    if path.suffix != ".parquet":
        raise ValueError(f"{path}: give a .parquet or .jsonl file")
    return _optional("pyarrow.parquet", "parquet files", "data").read_table(path).to_pylist()


def _fetch(task: str, source: Source) -> list[dict[str, Any]]:
    assert source.hub is not None
    datasets = _optional("datasets", f"{source.hub} from the hub", "eval")
    try:
        return list(datasets.load_dataset(source.hub, source.config, split="validation"))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{source.hub} could not be fetched ({reason}); give its file with --data, or take a task that needs no "
            "network: attributes, cloze"
        ) from error


def _optional(module: str, what: str, extra: str) -> Any:
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{what}: this needs the package {package}: pip install 'linattn[{extra}]'") from error
