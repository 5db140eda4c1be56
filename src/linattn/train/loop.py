"""The training loop, read top to bottom: one update after the other until the steps or the seconds are used up.

A run is its folder. Starting it again goes on from the newest checkpoint, to the bit as if it had never stopped.
One process on one device.

    python recipes/debug_cpu.py
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linattn.core.config import to_data
from linattn.data import Tokenizer, TokenShards
from linattn.models import Decoder, ModelState, build_model
from linattn.train.checkpoint import (
    RECORD,
    RESOLVED,
    Run,
    RunProgress,
    checkpoint_path,
    command_to_go_on,
    empty_carried,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    write_resolved,
)
from linattn.train.config import TrainConfig
from linattn.train.display import Display, line, remaining
from linattn.train.evaluate import Evaluation, evaluate
from linattn.train.feed import Feed, MicroBatch, carry_in, carry_out
from linattn.train.metrics import Log, add_sums, open_logs, peak_memory, summarise
from linattn.train.objective import count_targets, term_sums
from linattn.train.optim import make_optimizer, set_learning_rate
from linattn.train.schedule import learning_rate, run_fraction
from linattn.train.stop import StopSignals, TrainingStopped
from linattn.train.weights import checkpoints


def train(config: TrainConfig, resume: str = "auto", display: Display | None = None) -> dict[str, float]:
    """Train a model and leave it in ``config.out``.

    Args:
        config: the run.
        resume: "auto" goes on from the newest checkpoint in ``out`` if there is one; "never" refuses to; a
            checkpoint's path goes on from that one.
        display: what shows the progress; by default the terminal.

    Returns:
        step, tokens, seconds of training, and of the last evaluation val_loss (nats a token), val_perplexity and
        val_bits_per_byte, unless the data has no validation split.

    Raises:
        ValueError: a configuration, text or checkpoint that does not fit.
        TrainingStopped: a signal, a loss that is no number, or a full disk. What is saved is in the message.
    """
    run, path = _open_run(config, resume)
    validation = _open_validation(run.shards)
    feed = Feed(config, run.shards)
    if path is not None:
        load_checkpoint(path, run)
    forward = torch.compile(run.model) if config.compile else run.model
    progress = run.progress
    saved = progress.step if path is not None else -1

    with StopSignals() as stop, _opened_logs(run) as logs, display or Display() as shown:
        shown.say(_introduce(run, path))
        if _due(config.eval_every, progress.step) and not _evaluated(run):  # a signal came in between
            _evaluate(run, validation, logs, shown, stop)
        while not stop and (fraction := _fraction(run)) < 1:
            started = time.perf_counter()
            lr = learning_rate(config.schedule, config.optimizer.lr, progress.step, config.steps, fraction)
            set_learning_rate(run.optimizer, lr)
            result = _gradients(run, forward, feed.at(progress.position))
            if not math.isfinite(result.norm) or not all(map(math.isfinite, result.micro_losses)):
                raise _not_finite(run, feed, result)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            run.carried = result.carried
            progress.position += feed.advance
            _count(run, result, lr, time.perf_counter() - started, logs, shown)
            if _due(config.eval_every, progress.step):
                _evaluate(run, validation, logs, shown, stop)
            if _due(config.save_every, progress.step) and _fraction(run) < 1:
                _save(run)
                saved = progress.step
        if not stop and not _evaluated(run):
            _evaluate(run, validation, logs, shown, stop)
        if saved != progress.step:
            _save(run)
        if stop and _fraction(run) < 1:
            raise TrainingStopped(
                f"Stopped by {stop.name} after step {progress.step} of {config.steps}; everything is saved in "
                f"{config.out}, and {command_to_go_on(run)} goes on from there."
            )
    done = {"step": progress.step, "tokens": progress.tokens, "seconds": progress.seconds}
    return {**done, **{k: v for k, v in progress.evaluation.items() if k != "step"}}


@dataclass(frozen=True)
class Gradients:
    """What `_gradients` found: sums of losses and targets by term, the gradient's norm before clipping, the loss of
    each micro-batch, and the carried state of stateful training.
    """

    sums: dict[str, float]
    counts: dict[str, int]
    norm: float
    micro_losses: list[float]
    carried: ModelState | None


def _gradients(run: Run, forward: Any, micros: list[MicroBatch]) -> Gradients:
    """Leave the clipped gradient of one update in the parameters.

    Each term's sum is divided by its targets in all micro-batches, so that their number changes nothing.
    """
    config, device = run.config, run.model.embedding.weight.device
    counts = count_targets([micro.problem for micro in micros])
    carried, found = run.carried, []
    for problem, links in micros:
        state = None
        if carried is not None and links is not None and problem.cu_seqlens is not None:
            state = carry_in(carried, run.model.identity(1), links, len(problem.cu_seqlens) - 1)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
            sums, after = term_sums(run.model, problem.to(device), config.loss_chunk, state, forward)
        weights = {term.name: term.weight / max(1, counts[term.name]) for term in problem.terms}
        loss = torch.stack([weights[name] * value for name, value in sums.items()]).sum()
        loss.backward()
        if carried is not None and links is not None and after is not None:
            carried = carry_out(carried, after, links)
        found.append(({name: value.detach() for name, value in sums.items()}, loss.detach()))
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.clip or math.inf)
    totals = {name: sum(float(sums[name]) for sums, _ in found) for name in counts}
    return Gradients(totals, counts, float(norm), [float(loss) for _, loss in found], carried)


def _count(run: Run, result: Gradients, lr: float, seconds: float, logs: list[Log], shown: Display) -> None:
    """Add an update that is done to the run's progress; show it, and log it where a line is due."""
    config, progress = run.config, run.progress
    tokens = config.batch * config.length
    progress.step += 1
    progress.tokens += tokens
    progress.seconds += seconds
    add_sums(progress.window, result.sums, result.counts, tokens, seconds)
    metrics = summarise(progress.window, run.shards.bytes / max(1, run.shards.tokens - run.shards.documents))
    memory, fraction = peak_memory(run.model.embedding.weight.device), _fraction(run)
    rate = metrics["tokens_per_second"]
    shown.update(progress.step, config.steps, fraction, progress.seconds, metrics["loss"], rate, memory)
    if progress.step % config.log_every == 0 or fraction >= 1:
        metrics |= {"lr": lr, "grad_norm": result.norm, "tokens": progress.tokens}
        metrics |= {"seconds": progress.seconds, "peak_memory": memory}
        _log(run, logs, metrics)
        shown.say(line(progress.step, config.steps, metrics, remaining(fraction, progress.seconds)))
        progress.window = {}


def _open_run(config: TrainConfig, resume: str) -> tuple[Run, Path | None]:
    """The run before its first update, and the checkpoint to go on from."""
    path = find_checkpoint(config.out, resume)
    device = _device(config)
    shards = TokenShards(config.data, "train")
    tokenizer: Tokenizer = shards.load_tokenizer()
    if config.model.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} is too small for {config.data}, whose tokenizer "
            f"{tokenizer.name!r} has {tokenizer.vocab_size} ids; give at least that"
        )
    model = new_model(config, device)
    carried = empty_carried(model, config.batch) if config.stateful else None
    optimizer = make_optimizer(model, config.optimizer)
    return Run(config, shards, tokenizer, model, optimizer, RunProgress(), carried, resume), path


def new_model(config: TrainConfig, device: torch.device) -> Decoder:
    """The model with its first weights, which the seed decides; they are drawn in place, never twice in memory."""
    with torch.device("meta"):
        model = build_model(config.model)
    model.to_empty(device=device)
    torch.manual_seed(config.seed)
    model.reset_parameters()
    model.checkpoint_blocks = config.checkpoint_blocks
    return model.train()


def _device(config: TrainConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but torch sees no GPU here; use device='auto' or 'cpu'")
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def _open_validation(shards: TokenShards) -> TokenShards | None:
    return None if shards.meta.validation is None else TokenShards(shards.path, "validation")


def _fraction(run: Run) -> float:
    config, progress = run.config, run.progress
    return run_fraction(progress.step, config.steps, progress.seconds, config.max_seconds)


def _due(every: int, step: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def _evaluated(run: Run) -> bool:
    return run.progress.evaluation.get("step") == run.progress.step


def _evaluate(run: Run, validation: TokenShards | None, logs: list[Log], shown: Display, stop: StopSignals) -> None:
    """Evaluate and log, unless there is nothing to evaluate on or a signal comes."""
    config, progress = run.config, run.progress
    if validation is None:
        return
    found: Evaluation | None = evaluate(
        run.model,
        config.model,
        validation,
        run.tokenizer,
        length=config.eval_length or config.length,
        batch=config.micro_rows,
        objective=config.objective,
        limit=config.eval_batches,
        chunk=config.loss_chunk,
        bf16=config.precision == "bf16",
        stop=lambda: bool(stop),
    )
    if found is None:
        return
    metrics = found.as_metrics()
    progress.evaluation = {"step": progress.step, **metrics}
    _log(run, logs, metrics)
    shown.say(
        f"step {progress.step}/{config.steps}  validation loss {found.loss:.4f}  perplexity {found.perplexity:.3f}  "
        f"{found.bits_per_byte:.4f} bits per byte"
    )


@contextmanager
def _opened_logs(run: Run) -> Iterator[list[Log]]:
    """The run's folder, with run.yaml, and its logs, which are closed at the end."""
    config, out = run.config, Path(run.config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_resolved(config, out / RESOLVED)
        logs = open_logs(config.loggers, out, to_data(config), run.progress.step)
    except OSError as error:
        raise _unwritten(run, f"The run's folder {out}", error) from error
    try:
        yield logs
    except BaseException:
        for log in logs:
            with suppress(OSError):  # what ended the run is what is told
                log.close()
        raise
    try:
        for log in logs:
            log.close()
    except OSError as error:
        raise _unwritten(run, "The last metrics", error) from error


def _log(run: Run, logs: list[Log], metrics: dict[str, float]) -> None:
    step = run.progress.step
    try:
        for log in logs:
            log.write(step, metrics)
    except OSError as error:
        raise _unwritten(run, f"The metrics of step {step}", error) from error


def _save(run: Run) -> Path:
    """A checkpoint, or one clear sentence about why there is none."""
    try:
        return save_checkpoint(run)
    except OSError as error:
        raise _unwritten(run, f"The checkpoint of step {run.progress.step}", error) from error


def _unwritten(run: Run, what: str, error: OSError) -> TrainingStopped:
    whole = checkpoints(Path(run.config.out))
    kept = f"the checkpoint {whole[-1]} is whole" if whole else "there is no checkpoint yet"
    return TrainingStopped(
        f"{what} could not be written ({error}); {kept}. Free some space and run {command_to_go_on(run)} again."
    )


def _not_finite(run: Run, feed: Feed, result: Gradients) -> TrainingStopped:
    """Save the run as it was before the update that would have spoiled it, unless it is there already."""
    bad = next((i for i, loss in enumerate(result.micro_losses) if not math.isfinite(loss)), None)
    what = f"gradient norm is {result.norm}" if bad is None else f"loss is {result.micro_losses[bad]}"
    where = feed.describe(run.progress.position, bad)
    found = f"The {what} at step {run.progress.step + 1}, on {where}."
    fix = "Lower optimizer.lr, or look at that text"
    path = checkpoint_path(run)
    if not (path / RECORD).is_file():
        try:
            _save(run)
        except TrainingStopped as unsaved:
            return TrainingStopped(f"{found} {unsaved} Before that: {fix[0].lower()}{fix[1:]}.")
    again = command_to_go_on(run)
    return TrainingStopped(f"{found} {fix}; then {again} goes on from {path}, the run before this update.")


def _introduce(run: Run, path: Path | None) -> str:
    config, parameters = run.config, sum(p.numel() for p in run.model.parameters())
    begin = f"going on from {path}" if path is not None else f"a new run in {config.out}"
    return (
        f"{type(config.model).__name__} with {parameters:,} parameters on {run.shards.tokens:,} tokens of "
        f"{config.data}, {config.batch} x {config.length} tokens an update: {begin}"
    )
