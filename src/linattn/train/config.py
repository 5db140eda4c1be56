"""Everything that a training run is: one frozen dataclass, written as a Python file in recipes/.

python recipes/debug_cpu.py --help
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from linattn.models import JRTConfig, ModelConfig
from linattn.train.objective import JRT, NextToken
from linattn.train.optim import AdamWConfig
from linattn.train.schedule import WSD, Cosine

Logger = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True)
class TrainConfig:
    """A training run. The defaults are Based's 360M run of 10B tokens."""

    model: ModelConfig
    """The model and its sizes."""
    data: str
    """Folder of token shards, made by `linattn prepare`."""
    out: str
    """Folder of the run: metrics.jsonl, run.yaml and the checkpoints. Run again with the same one to go on."""
    objective: NextToken | JRT = field(default_factory=NextToken)
    """What the model is asked to predict."""
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    """AdamW and its weight-decay groups."""
    schedule: Cosine | WSD = field(default_factory=Cosine)
    """The learning rate over the run."""
    batch: int = 256
    """Sequences in an update."""
    micro_batch: int | None = None
    """Sequences that go through the model at a time; gradients are summed until `batch` is reached. None: all."""
    length: int = 2048
    """Tokens in a sequence."""
    steps: int = 20_000
    """Updates."""
    max_seconds: float | None = None
    """Stop after this much training time even if steps are left; evaluation and saving do not count. The schedule
    then goes by whichever of the two is further."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    seed: int = 1111
    """Of the first weights, the order of the data and JRT's masks."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 runs matrix products under autocast; weights, gradients, sums and the residual stream stay fp32."""
    compile: bool = False
    """Whether the model goes through torch.compile."""
    checkpoint_blocks: bool = False
    """Recompute each block in the backward pass instead of keeping its activations: a third more time."""
    loss_chunk: int | None = 4096
    """Tokens whose logits live at a time; None: all, which at 50,257 tokens of vocabulary is 200 KB each."""
    stateful: bool = False
    """Read the text in order and carry a detached State from one update to the next, instead of shuffled windows."""
    eval_every: int = 1000
    """Updates between evaluations; 0: only at the end."""
    eval_batches: int | None = None
    """Batches of an evaluation, of micro_batch sequences each; None: the whole validation split."""
    eval_length: int | None = None
    """Tokens in a window of an evaluation; None: `length`."""
    save_every: int = 1000
    """Updates between checkpoints; 0: only at the end."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk; 0: all."""
    log_every: int = 10
    """Updates between lines of metrics.jsonl."""
    loggers: tuple[Logger, ...] = ()
    """Where metrics go besides metrics.jsonl."""

    def __post_init__(self) -> None:
        for name in ("batch", "length", "steps", "log_every"):
            _at_least(name, getattr(self, name), 1)
        for name in ("eval_every", "save_every", "keep_checkpoints"):
            _at_least(name, getattr(self, name), 0)
        for name in ("micro_batch", "loss_chunk", "eval_batches", "eval_length"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        if self.batch % self.micro_rows:
            raise ValueError(
                f"batch={self.batch} is not a multiple of micro_batch={self.micro_batch}; "
                f"try micro_batch={math.gcd(self.batch, self.micro_rows)}"
            )
        if self.max_seconds is not None and not 0 < self.max_seconds < math.inf:
            raise ValueError(f"max_seconds={self.max_seconds} must be a number above 0; leave it None for no limit")
        if not 0 <= self.clip < math.inf:
            raise ValueError(f"clip={self.clip} must be a number of at least 0; 0 does not clip")
        if self.schedule.min_lr > self.optimizer.lr:
            raise ValueError(
                f"schedule.min_lr={self.schedule.min_lr} is above optimizer.lr={self.optimizer.lr}; lower it"
            )
        self._check_choices()
        self._check_objective()

    @property
    def micro_rows(self) -> int:
        """Sequences that go through the model at a time."""
        return self.batch if self.micro_batch is None else self.micro_batch

    def _check_choices(self) -> None:
        choices = {
            "device": ("auto", "cpu", "cuda"),
            "precision": ("fp32", "bf16"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {list(known)}")
        for logger in self.loggers:
            if logger not in ("tensorboard", "wandb", "trackio"):
                raise ValueError(f"loggers holds {logger!r}; known are ['tensorboard', 'wandb', 'trackio']")

    def _check_objective(self) -> None:
        prefix_model, prefix_objective = isinstance(self.model, JRTConfig), isinstance(self.objective, JRT)
        if prefix_model != prefix_objective:
            raise ValueError(
                f"objective={type(self.objective).__name__} does not train a {type(self.model).__name__}; "
                f"use {'JRT' if prefix_model else 'NextToken'}"
            )
        if self.stateful and prefix_objective:
            raise ValueError("stateful=True continues a text, and JRT's prefix begins one; use stateful=False")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")
