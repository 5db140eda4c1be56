"""Speed of whole models on one GPU: training and prefill, in tokens per second, with random tokens.

Training is the loop's own step (bf16 autocast, fp32 weights, cross-entropy in chunks, fused AdamW) without its data;
prefill is bf16 weights reading a prompt into a state. Each row is a subject at a length; a row that does not fit says
so. Not a test of what a model learns.

    linattn bench train --cases transnormer_385m attention_like_transnormer_385m --record
    linattn bench prefill --record
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from linattn.bench.floor import Ceilings, measure_ceilings
from linattn.bench.gate import OK
from linattn.bench.ops import new_record
from linattn.bench.record import RESULTS, Record, append_records, machine, results_path
from linattn.bench.setting import in_words
from linattn.bench.subjects import (
    PREFILL_SUBJECTS,
    TRAIN_SUBJECTS,
    Kind,
    implementation,
    kernels_of,
    model_flops,
    read_case,
    subject_config,
    tokens_per_s,
)
from linattn.bench.table import print_rows
from linattn.bench.timing import NOT_TIMED, Timing, summary
from linattn.models import JRTConfig, ModelConfig, build_model
from linattn.models.decoder import Decoder
from linattn.train.optim import AdamWConfig, make_optimizer

TRAIN_TOKENS = 65536
"""Tokens of an update at every length: the batch is this over the length, one row where a text is longer."""
TRAIN_LENGTHS = (1024, 4096, 16384, 65536, 131072, 262144)
BASED_LENGTHS = (2048, 16384)
PREFILL_TOKENS = 131072
PREFILL_LENGTHS = (2048, 8192, 32768, 131072)
LOSS_CHUNK = 8192
"""Rows of logits that live at a time: 2 GB of 64,000 columns."""


@dataclass(frozen=True)
class Effort:
    """How often a row is timed.

    warmup: batches that do not count. steps: those that do. slow_s: one slower than this is timed twice after one to
    warm up. longest_s: once. expected_s: a row that takes longer at half the speed of a large product is not run.
    """

    warmup: int = 2
    steps: int = 4
    slow_s: float = 2.0
    longest_s: float = 6.0
    expected_s: float = 10.0


def train_lengths(subject: str, lengths: Sequence[int] = ()) -> Sequence[int]:
    """The lengths asked for, or those of a subject's table."""
    if lengths:
        return lengths
    return BASED_LENGTHS if "360m" in subject else TRAIN_LENGTHS


def bench_models(
    kind: Kind,
    subjects: Sequence[str | tuple[str, ModelConfig]] = (),
    *,
    lengths: Sequence[int] = (),
    tokens: int = 0,
    device: str = "cuda",
    recompute: bool = True,
    compiled: bool = False,
    effort: Effort = Effort(),
    record: bool = False,
    out: Path = RESULTS,
    commit: str = "",
    ceilings: Ceilings | None = None,
    console: Console | None = None,
) -> list[Record]:
    """Tokens per second of models at constant tokens per batch, a record each, appended as soon as it is measured.

    Args:
        kind: "train" (whole updates) or "prefill" (a prompt read into a state).
        subjects: names, or (name, configuration); none: the published table.
        lengths: tokens of a text; none: the table's.
        tokens: of a batch; 0: the table's. A longer text is a batch of one.
        recompute: training keeps blocks' inputs only. compiled: blocks under torch.compile.
        effort: how often a row is timed.

    Returns:
        Records whose time is a batch's, whose floor is its model FLOPs at the machine's measured product.

    Raises:
        ValueError: an unknown model.
    """
    console = Console() if console is None else console
    table = TRAIN_SUBJECTS if kind == "train" else PREFILL_SUBJECTS
    pairs = [(s, subject_config(s)) if isinstance(s, str) else s for s in subjects or table]
    batch_tokens = tokens or (TRAIN_TOKENS if kind == "train" else PREFILL_TOKENS)
    here, limits = machine(device, commit), measure_ceilings(device) if ceilings is None else ceilings
    records: list[Record] = []
    for name, config in pairs:
        wanted = train_lengths(name, lengths) if kind == "train" else lengths or PREFILL_LENGTHS
        step = _builder(kind, config, device, recompute, compiled)
        for length in wanted:
            batch = max(1, batch_tokens // length)
            flops = batch * length * model_flops(config, length, kind)
            timing, peak, verdict = NOT_TIMED, 0, _too_long(flops, limits, effort)
            if verdict == OK:
                with kernels_of(name, config, device):
                    timing, peak, verdict = _time_row(partial(step, batch, length), device, effort)
            least = flops / limits.rate(torch.bfloat16) * 1e3
            case = f"{name}-b{batch}-t{length}"
            case += "" if recompute or kind == "prefill" else "-kept"
            case += "-compiled" if compiled else ""
            options = {"floor": least, "verdict": verdict, "dtype": torch.bfloat16, "peak": peak}
            records.append(new_record(here, kind, case, kind, implementation(name, config), timing, **options))
            _say(console, records[-1])
            if record:
                append_records(results_path(kind, device, out), records[-1:])
            _free(device)
        del step
        _free(device)
    print_models(console, kind, records)
    return records


def print_models(console: Console, kind: Kind, records: Sequence[Record]) -> None:
    """All rows as one table."""
    rows = []
    for r in records:
        name, batch, length = read_case(r.case)
        speed = "-" if math.isnan(r.p50_ms) else f"{tokens_per_s(r):,.0f}"
        share = "-" if math.isnan(r.p50_ms) else f"{r.floor_ms / r.p50_ms:.1%}"
        memory = f"{r.peak_bytes / 2**30:,.1f}" if r.peak_bytes else "-"
        rows.append([name, r.impl, f"{batch} x {length:,}", speed, share, memory, r.gate])
    columns = ["model", "kernels", "batch", "tokens/s", "of the product's speed", "GiB", "outcome"]
    print_rows(console, f"{kind}, bfloat16, random tokens", columns, rows)


def _builder(kind: Kind, config: ModelConfig, device: str, recompute: bool, compiled: bool) -> Any:
    """The step of a model that is built at the first call, so that one that does not fit is a row and no crash."""
    made: list[Callable[[int, int], Any]] = []

    def step(batch: int, length: int) -> Any:
        if not made:
            build = training_step if kind == "train" else prefill_step
            made.append(build(config, device, recompute, compiled))
        return made[0](batch, length)

    return step


def training_step(config: ModelConfig, device: str, recompute: bool, compiled: bool) -> Callable[[int, int], Tensor]:
    """(batch, length) -> the loss of one whole update on random tokens, as `train.loop` makes it."""
    model = _fresh(config, device).train()
    model.checkpoint_blocks = recompute
    optimizer = make_optimizer(model, AdamWConfig(lr=1e-4))
    prepare = _compiler(model, compiled)

    def step(batch: int, length: int) -> Tensor:
        prepare(batch, length)
        tokens = torch.randint(config.vocab_size, (batch, length + 1), device=device)
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            hidden = model(tokens[:, :-1], logits="none").hidden
            loss = model.loss(hidden, tokens[:, 1:], LOSS_CHUNK)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def prefill_step(config: ModelConfig, device: str, recompute: bool, compiled: bool) -> Callable[[int, int], Tensor]:
    """(batch, length) -> the last token's logits of random prompts, read into a state; a JRT prefix is half of them."""
    longest = max(PREFILL_LENGTHS)
    if isinstance(config, JRTConfig):
        config = replace(config, prefix_length=longest)
    model = _fresh(config, device).to(torch.bfloat16).eval().requires_grad_(False)
    prepare = _compiler(model, compiled)

    def step(batch: int, length: int) -> Tensor:
        prepare(batch, length)
        tokens = torch.randint(config.vocab_size, (batch, length), device=device)
        prefix = None
        if isinstance(config, JRTConfig):
            # The layer projects this many tokens as prefix, all that the lengths below ask for and none beyond.
            for block in model.blocks:
                if hasattr(block.mixer, "prefix_length"):
                    block.mixer.prefix_length = max(1, length // 2)
            prefix = torch.full((batch,), max(1, length // 2), device=device)
        with torch.inference_mode():
            out = model(tokens, prefix_lengths=prefix, logits="last", return_state=True)
        assert out.logits is not None
        return out.logits

    return step


def _fresh(config: ModelConfig, device: str) -> Decoder:
    with torch.device("meta"):
        model = build_model(config)
    model.to_empty(device=device)
    torch.manual_seed(0)
    model.reset_parameters()
    return model


def _compiler(model: Decoder, compiled: bool) -> Callable[[int, int], None]:
    """What to call before each step: with ``compiled`` blocks are compiled one by one, anew for each batch and length.

    All blocks of one kind share what was compiled, and no length counts against another's recompilations.
    """
    last: list[tuple[int, int]] = []
    if compiled:
        for block in model.blocks:
            block.compile(dynamic=False)

    def prepare(batch: int, length: int) -> None:
        if compiled and last != [(batch, length)]:
            torch.compiler.reset()
            last[:] = [(batch, length)]

    return prepare


def _time_row(step: Callable[[], Any], device: str, effort: Effort) -> tuple[Timing, int, str]:
    """Timing of a step, peak bytes, and "ok" or why there is none."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        step()  # compiles, and makes the optimizer's sums
        second = _seconds(step, cuda)
        if second > effort.slow_s:
            samples = [second] if second > effort.longest_s else [second, _seconds(step, cuda)]
        else:
            for _ in range(effort.warmup - 2):
                step()
            samples = [_seconds(step, cuda) for _ in range(effort.steps)]
    except Exception as error:  # noqa: BLE001  a length that does not fit is a row
        return NOT_TIMED, 0, in_words(error)
    return summary([s * 1e3 for s in samples]), torch.cuda.max_memory_allocated(device) if cuda else 0, OK


def _too_long(flops: float, limits: Ceilings, effort: Effort) -> str:
    """ "ok", or why a row is not run: at half the speed of a large product it would take too long."""
    seconds = 2 * flops / limits.rate(torch.bfloat16)
    return OK if seconds <= effort.expected_s else f"not run: about {seconds:.0f} s a batch"


def _seconds(step: Callable[[], Any], cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _free(device: str) -> None:
    gc.collect()  # modules and their hooks hold one another
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def _say(console: Console, r: Record) -> None:
    speed = r.gate if math.isnan(r.p50_ms) else f"{tokens_per_s(r):,.0f} tokens/s, {r.peak_bytes / 2**30:.1f} GiB"
    console.print(f"{r.op} {r.case} {r.impl}: {speed}", highlight=False)
