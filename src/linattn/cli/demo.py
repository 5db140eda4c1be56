"""`linattn demo`: the main job on a CPU, in minutes. Prepare, train, evaluate, generate, and read a whole novel.

The training text is Jane Austen's six novels, whose end is held out; the novel read as one stream is Moby Dick, which
the model has never seen.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

import linattn
from linattn.bench.plot import MemoryRow, plot_memory
from linattn.cli.common import load
from linattn.cli.info import size
from linattn.cli.read import TextStream, read_with_progress
from linattn.cli.train import load_config
from linattn.data import TokenShards, bundled_text, prepare
from linattn.generate import SamplingConfig, generate_text
from linattn.models import model_state_bytes
from linattn.models.costs import model_costs
from linattn.tasks.baselines import bits_per_byte, trigram_bits, unigram_bits, xz_bits, xz_whole_bits
from linattn.train import TrainConfig, train

PROMPT = "It was a truth universally acknowledged, that "


@dataclass(frozen=True)
class DemoArgs:
    """Do the whole path on this machine: about five minutes on two cores."""

    out: Path = Path("demo-out")
    """Folder for the data, the run, results.json and memory.png. A demo that was stopped goes on in it."""
    seconds: float = 150.0
    """How long to train."""


def recipe() -> Path:
    """recipes/debug_cpu.py: in the wheel it lies beside this file."""
    packaged = Path(__file__).with_name("demo_recipe.py")
    return packaged if packaged.exists() else Path(linattn.__file__).parents[2] / "recipes" / "debug_cpu.py"


def run(argv: list[str]) -> int:
    """The demo, start to end."""
    args = tyro.cli(DemoArgs, args=argv, prog="linattn demo")
    console, begun = Console(), time.perf_counter()
    data, runs, figures = args.out / "data", args.out / "run", args.out / "results.json"
    args.out.mkdir(parents=True, exist_ok=True)
    if figures.exists():  # an earlier demo came to its end: begin anew; one that was stopped goes on
        shutil.rmtree(runs, ignore_errors=True)
        figures.unlink()

    console.rule("1  prepare: Jane Austen's six novels, the last twentieth held out")
    meta = prepare(["bundled:austen"], data, validation_fraction=0.05, overwrite=True)
    assert meta.validation is not None
    console.print(f"{meta.train.tokens:,} bytes to train on, {meta.validation.tokens:,} held out")

    console.rule(f"2  train for {args.seconds:.0f} seconds")
    config: TrainConfig = load_config(recipe())
    config = replace(config, data=str(data), out=str(runs), max_seconds=args.seconds)
    found = train(config, resume="auto")

    console.rule("3  held-out text, beside what needs no training")
    results = _compare(TokenShards(data, "train"), TokenShards(data, "validation"), found)
    _print_scores(console, results)
    model, _, tokenizer = load(runs, "cpu", "stored")
    sampling = SamplingConfig(temperature=0.8, top_p=0.95, seed=1)
    text = generate_text(model, tokenizer, [PROMPT], max_new_tokens=300, sampling=sampling)[0].text
    console.print(f"\n[bold]{PROMPT}[/bold]{text}\n", highlight=False)

    console.rule("4  read Moby Dick as one stream")
    novel = TextStream("bundled:mobydick", tokenizer)
    novel.total = len(bundled_text("mobydick").encode())
    reading, curve = read_with_progress(model, novel, chunk=2048)
    costs = model_costs(config.model.decoder())
    state, cache = model_state_bytes(reading.state), costs.kv_cache_bytes * reading.tokens
    speeds = (reading.start_speed, reading.end_speed)
    chart = args.out / "memory.png"
    rows = [MemoryRow(tokens, state, costs.kv_cache_bytes * tokens, speed) for tokens, speed in curve]
    plot_memory(rows, chart, title="Bytes a 1M-parameter Based keeps while it reads Moby Dick")
    assert reading.nll is not None
    console.print(
        f"{reading.tokens:,} tokens, {speeds[0]:,.0f} a second at the start, {speeds[1]:,.0f} at the end; "
        f"{bits_per_byte(reading.nll, novel.bytes):.2f} bits per byte of a book it has never seen"
    )
    console.print(
        f"state {size(state)} from the first token to the last; a key-value cache of the same model: {size(cache)} "
        f"({cache / state:,.0f} times as much)\nchart in {chart}"
    )
    results |= {"state_bytes": state, "kv_cache_bytes": cache, "start_speed": speeds[0], "end_speed": speeds[1]}
    results |= {"novel_tokens": reading.tokens, "seconds": time.perf_counter() - begun}
    figures.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"done in {results['seconds']:.0f} s; figures in {figures}")
    return 0


def _compare(train_split: TokenShards, held_out: TokenShards, found: dict[str, float]) -> dict[str, float]:
    """Bits per byte of the held-out text by each model; all are given the same training text."""
    known, unknown = _text(train_split), _text(held_out)
    return {
        "based": found["val_bits_per_byte"],
        "perplexity": found["val_perplexity"],
        "unigram": unigram_bits(known, unknown),
        "trigram": trigram_bits(known, unknown),
        "xz": xz_whole_bits(known + unknown),
        "xz_after_training_text": xz_bits(known, unknown),
    }


def _print_scores(console: Console, results: dict[str, float]) -> None:
    table = Table()
    for head in ("model of the held-out text", "bits per byte", "perplexity a byte"):
        table.add_column(head, justify="left" if head.startswith("model") else "right")
    names = {
        "unigram": "unigram counts",
        "trigram": "trigram counts",
        "xz": "xz -9e, the whole text",
        "xz_after_training_text": "xz -9e, after the training text",
        "based": "Based, trained here",
    }
    for key, name in names.items():
        table.add_row(name, f"{results[key]:.3f}", f"{2 ** results[key]:.2f}")
    console.print(table)


def _text(shards: TokenShards) -> bytes:
    tokens = shards.read(0, shards.tokens).numpy()
    return bytes(tokens[tokens < 256].astype("uint8"))
