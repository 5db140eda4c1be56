"""What a run tells: running sums, metrics.jsonl, and TensorBoard, Weights & Biases or trackio if asked.

metrics.jsonl is one JSON object a line, each with "step". The file of a run that was killed and resumed has the lines
of a run that never was.

    pytest tests/train -k metrics
"""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from linattn.core.files import write_text

METRICS = "metrics.jsonl"

_PACKAGES = {
    "tensorboard": ("torch.utils.tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "trackio": ("trackio", "trackio"),
}


class Log(Protocol):
    """Where metrics go."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a step."""
        ...

    def close(self) -> None:
        """Write out what is held back."""
        ...


class JsonLog:
    """metrics.jsonl of a run, unbuffered. Lines after ``step``, where the run goes on, are dropped."""

    def __init__(self, out: Path, step: int):
        self._path = out / METRICS
        if self._path.exists():
            keep_until(self._path, step)
        self._file = self._path.open("ab", buffering=0)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One line.

        Raises:
            OSError: it could not be written, with the path. Part of it may be there; `keep_until` drops it.
        """
        rest = (json.dumps({"step": step, **metrics}) + "\n").encode()
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), str(self._path)) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after ``step``, and a last one that was cut short; the file is replaced whole."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
        if found <= step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))


class _TensorBoard:
    def __init__(self, module: Any, out: Path, config: dict, step: int):
        self._writer = module.SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Tracker:
    """W&B and trackio, which share W&B's functions."""

    def __init__(self, module: Any, out: Path, config: dict, step: int):
        self._module = module
        module.init(project="linattn", name=out.name, config=config)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._module.log(metrics, step=step)

    def close(self) -> None:
        self._module.finish()


def open_logs(names: Sequence[str], out: Path, config: dict, step: int) -> list[Log]:
    """metrics.jsonl, and every logger of ``names``, from ``step`` on.

    Raises:
        ValueError: a logger's package is not installed.
    """
    modules = {name: _import(name) for name in names}
    logs: list[Log] = [JsonLog(out, step)]
    for name, module in modules.items():
        logs.append((_TensorBoard if name == "tensorboard" else _Tracker)(module, out, config, step))
    return logs


def summarise(window: dict, bytes_per_target: float) -> dict[str, float]:
    """The sums of `add_sums` as means: loss in nats a token, bits per byte, masked_loss for JRT, tokens a second.

    ``bytes_per_target`` is the training split's mean.
    """
    metrics = {"loss": window["next_token"] / max(1, window["next_token_count"])}
    metrics["bits_per_byte"] = metrics["loss"] / math.log(2) / bytes_per_target
    if "masked_token" in window:
        metrics["masked_loss"] = window["masked_token"] / max(1, window["masked_token_count"])
    metrics["tokens_per_second"] = window["tokens"] / window["seconds"]
    return metrics


def add_sums(window: dict, sums: dict[str, float], counts: dict[str, int], tokens: int, seconds: float) -> None:
    """Add an update's sums of losses, targets, tokens and seconds to ``window``."""
    values = {**sums, **{f"{name}_count": n for name, n in counts.items()}, "tokens": tokens, "seconds": seconds}
    for name, value in values.items():
        window[name] = window.get(name, 0) + value


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: of the GPU's allocator, or of this process's resident memory; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _import(name: str) -> Any:
    module, package = _PACKAGES[name]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"loggers has {name!r}, which is not installed: `pip install {package}`") from error
