"""A training run on disk, so that it goes on exactly where it was: weights, optimizer, data position, RNG, progress.

    step-00000100/   model.safetensors  config.json  [tokenizer.json]     what `load_model` reads
                     optimizer.safetensors  [state.safetensors]  train.json  run.yaml

A checkpoint is written beside its place and renamed into it when it is whole, on the disk and not only in its cache:
a full disk or a lost machine leaves the one before.

    pytest tests/train -k checkpoint
"""

from __future__ import annotations

import base64
import math
import platform
import shutil
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from linattn.core.config import config_hash, from_data, to_data
from linattn.core.files import read_json, write_tensors, write_text
from linattn.data import Tokenizer, TokenShards
from linattn.models import Decoder, ModelState, map_model_state
from linattn.train.config import TrainConfig
from linattn.train.folder import write_folder
from linattn.train.weights import (
    WEIGHTS,
    ModelCard,
    check_tensors,
    checkpoints,
    read_into,
    write_json,
    write_model,
)

RECORD, OPTIMIZER, STATE, RESOLVED = "train.json", "optimizer.safetensors", "state.safetensors", "run.yaml"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")

FIXED = ("model", "objective", "length", "seed", "stateful")
"""Fields that decide what the data position and the weights mean: a run cannot go on with others."""


_DAMAGED = "the file is damaged: copy the checkpoint again, or move it away to go on from an earlier one"


@dataclass
class RunProgress:
    """How far a run is. ``window`` holds the sums since the last line of metrics.jsonl."""

    step: int = 0
    position: int = 0
    tokens: int = 0
    seconds: float = 0.0
    window: dict = field(default_factory=dict)
    evaluation: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """train.json."""

    progress: RunProgress
    config: TrainConfig
    data_hash: str
    rng: dict
    versions: dict


@dataclass
class Run:
    """Everything of a run that changes, and what it was made from."""

    config: TrainConfig
    shards: TokenShards
    tokenizer: Tokenizer
    model: Decoder
    optimizer: torch.optim.AdamW
    progress: RunProgress
    carried: ModelState | None = None
    resume: str = "auto"
    """What `find_checkpoint` was given."""


def find_checkpoint(out: str | Path, resume: str) -> Path | None:
    """The checkpoint to go on from.

    Args:
        out: the run's folder.
        resume: "auto": the newest, if there is one. "never": none. Else a checkpoint's path.

    Raises:
        ValueError: a path without a checkpoint; an ``out`` that holds later ones, which would be mixed with this run's.
    """
    found = checkpoints(Path(out))
    if resume == "auto":
        return found[-1] if found else None
    if resume == "never":
        if found:
            raise ValueError(f"{out}: already holds {found[-1].name}; give another out, or --resume auto "
                             "(resume='auto') to go on")  # fmt: skip
        return None
    path = Path(resume)
    if not (path / RECORD).is_file():
        raise ValueError(f"{path}: holds no {RECORD}, so it is no training checkpoint; give a folder step-*")
    if found and found[-1].resolve() != path.resolve():
        raise ValueError(f"{out}: already holds {found[-1].name}; leave out --resume (resume='auto') to go on from it, "
                         f"or give another out to go on from {path}")  # fmt: skip
    return path


def command_to_go_on(run: Run) -> str:
    """What goes on with a run that stopped: its own command, or that without the --resume it would be refused for."""
    try:
        find_checkpoint(run.config.out, run.resume)
    except ValueError:
        return "the same command with --resume auto"
    return "the same command"


def checkpoint_path(run: Run) -> Path:
    """Where the run as it is belongs: ``out/step-N``."""
    return Path(run.config.out) / f"step-{run.progress.step:08d}"


def save_checkpoint(run: Run) -> Path:
    """Write the run as it is to `checkpoint_path`, which is returned.

    Raises:
        OSError: it could not be written. Nothing is left of it, and earlier checkpoints are as they were.
    """
    path = checkpoint_path(run)

    def write(folder: Path) -> None:
        write_model(run.model, ModelCard(run.config.model, run.shards.meta.tokenizer), folder, run.tokenizer)
        write_tensors(folder / OPTIMIZER, _moments(run))
        if run.carried is not None:
            write_tensors(folder / STATE, state_tensors(run.carried))
        write_resolved(run.config, folder / RESOLVED)
        record = Record(run.progress, run.config, config_hash(run.shards.meta), _rng(), versions())
        write_json(folder / RECORD, to_data(record))

    write_folder(path, write)
    if run.config.keep_checkpoints:
        for old in checkpoints(path.parent)[: -run.config.keep_checkpoints]:
            shutil.rmtree(old)
    return path


def load_checkpoint(path: Path, run: Run) -> None:
    """Set a new run to where the checkpoint was.

    Raises:
        ValueError: a damaged checkpoint, another model's, or a configuration or text that it cannot go on with.
    """
    where = path / RECORD
    record = _read_record(where)
    rng = {name: _from_text(record.rng, name, where) for name in _rng()}
    _check_same(record, run, path)
    weights, moments = run.model.state_dict(), _moments(run)
    check_tensors(path / WEIGHTS, weights, exact=True)
    check_tensors(path / OPTIMIZER, moments, exact=True)
    read_into(path / WEIGHTS, weights)
    read_into(path / OPTIMIZER, moments)
    if run.carried is not None:
        leaves = state_tensors(run.carried)
        check_tensors(path / STATE, leaves, exact=True)
        read_into(path / STATE, leaves)
    run.progress = record.progress
    try:
        for name, state in rng.items():
            if state is not None:
                (torch.cuda if name == "cuda" else torch).set_rng_state(state)
    except RuntimeError as error:
        raise ValueError(f"{where}: rng holds no generator's state ({error}); {_DAMAGED}") from error


def write_resolved(config: TrainConfig, path: Path) -> None:
    """Write every field of the configuration as YAML, for `linattn train --config`."""
    write_text(path, yaml.safe_dump(to_data(config), sort_keys=False))


def state_tensors(state: ModelState) -> dict[str, Tensor]:
    """A model's state as named tensors: ``tokens`` and ``layers.{i}.{leaf}``, views of its own."""
    tensors = {"tokens": state.tokens}
    for i, layer in enumerate(state.layers):
        tensors |= {f"layers.{i}.{name}": leaf for name, leaf in layer._asdict().items()}
    return tensors


def empty_carried(model: Decoder, rows: int) -> ModelState:
    """The state of ``rows`` streams that have read nothing, in memory of its own.

    Raises:
        ValueError: a state that grows with the text cannot be carried through one.
    """
    state = model.identity(rows)
    for name, leaf in state_tensors(state).items():
        if leaf.numel() == 0:
            raise ValueError(f"stateful=True needs a State of constant size, and {name} grows with the text: use a "
                             "model without full attention, or stateful=False")  # fmt: skip
    return map_model_state(torch.clone, state)


def versions() -> dict[str, str]:
    """What the run was made with."""
    try:
        own = version("linattn")
    except PackageNotFoundError:
        own = "unknown"
    return {"linattn": own, "torch": str(torch.__version__), "python": platform.python_version()}


def _moments(run: Run) -> dict[str, Tensor]:
    """The optimizer's tensors as ``parameter.moment``. Before the first update they are made, as zeros."""
    tensors = {}
    for name, parameter in run.model.named_parameters():
        state = run.optimizer.state[parameter]
        if not state:
            like = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            device = parameter.device if run.optimizer.defaults["fused"] else "cpu"
            state.update({"step": torch.zeros((), dtype=torch.float32, device=device), **like})
        tensors |= {f"{name}.{moment}": state[moment] for moment in MOMENTS}
    return tensors


def _read_record(path: Path) -> Record:
    """train.json, checked: every number of the progress is one that a run can have."""
    data = read_json(path)
    try:
        record = from_data(Record, data, where=str(path))
    except ValueError as error:  # a configuration's own checks do not know the path
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}; {_DAMAGED}") from error
    progress = record.progress
    for name in ("step", "position", "tokens", "seconds"):
        value = getattr(progress, name)
        if not 0 <= value < math.inf:
            raise ValueError(f"{path}: progress.{name}={value} must be a number of at least 0; {_DAMAGED}")
    for name in ("window", "evaluation"):
        for key, value in getattr(progress, name).items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{path}: progress.{name}.{key}={value!r} is no number; {_DAMAGED}")
    return record


def _check_same(record: Record, run: Run, path: Path) -> None:
    for name in (f.name for f in fields(TrainConfig) if f.name in FIXED):
        was, now = getattr(record.config, name), getattr(run.config, name)
        if was != now:
            raise ValueError(f"{path}: was trained with {name}={_short(was, now)}, not {name}={_short(now, was)}; "
                             "give the same value, or another out for a new run")  # fmt: skip
    if run.config.stateful and record.config.batch != run.config.batch:
        raise ValueError(f"{path}: carries the state of batch={record.config.batch} streams, not {run.config.batch}; "
                         "give the same value")  # fmt: skip
    if record.data_hash != config_hash(run.shards.meta):
        raise ValueError(f"{path}: was trained on other text than {run.config.data} holds now; its position there "
                         "means nothing: give the same data, or another out for a new run")  # fmt: skip


def _short(value: Any, other: Any) -> str:
    """A value, or of a dataclass the fields that differ from the other's."""
    if type(value) is not type(other) or not hasattr(value, "__dataclass_fields__"):
        return repr(value)
    mine, others = asdict(value), asdict(other)
    differ = ", ".join(f"{k}={v!r}" for k, v in mine.items() if v != others[k])
    return f"{type(value).__name__}({differ})"


def _rng() -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def _from_text(rng: dict[str, Any], name: str, path: Path) -> Tensor | None:
    """A generator's state; None for a GPU's that the run, made without one, did not have."""
    if name != "cpu" and name not in rng:
        return None
    try:
        state = base64.b64decode(rng[name], validate=True)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: rng.{name} is missing or no base64 ({error}); {_DAMAGED}") from error
    size = (torch.cuda if name == "cuda" else torch).get_rng_state().numel()
    if len(state) != size:
        raise ValueError(f"{path}: rng.{name} has {len(state)} bytes, a generator's state has {size}; {_DAMAGED}")
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
