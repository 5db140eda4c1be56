"""AdamW and which parameters it decays.

pytest tests/train -k decay
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from linattn.nn import Embedding, RMSNorm

Kind = Literal["matrix", "embedding", "norm", "conv", "bias", "scalar"]


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW as published for Based, JRT-RNN and their baseline: these defaults are that run's."""

    lr: float = 8e-4
    """Peak learning rate; the schedule scales it."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running mean of gradients, and of their squares."""
    eps: float = 1e-8
    """Added to the root of the mean square."""
    weight_decay: float = 0.1
    """Of the parameters that decay: all matrices, and what the four fields below say."""
    decay_norms: bool = True
    """Whether weights of norms decay. They did in the published runs, whose list of exceptions missed RMSNorm."""
    decay_conv: bool = True
    """Whether filters of short convolutions decay. They did in the published runs."""
    decay_embeddings: bool = False
    """Whether the embedding, tied to the head or not, decays."""
    decay_biases: bool = False
    """Whether biases decay."""

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"optimizer.lr={self.lr} must be a number above 0, such as 8e-4")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"optimizer.betas={self.betas} must be two numbers in [0, 1), such as (0.9, 0.95)")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"optimizer.eps={self.eps} must be a number above 0, such as 1e-8")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"optimizer.weight_decay={self.weight_decay} must be a number of at least 0")


def kind_of(module: nn.Module, path: str, name: str, parameter: nn.Parameter) -> Kind:
    """What a parameter is, by the module that owns it, the module's path and the parameter's own name.

    "scalar" is whatever else has one number a head or feature (LRPE's angles, learned decays): these never decay,
    since their zero means nothing.
    """
    if name == "bias":
        return "bias"
    if isinstance(module, Embedding):
        return "embedding"
    if isinstance(module, RMSNorm):
        return "norm"
    if path.rpartition(".")[2] == "conv":
        return "conv"
    return "matrix" if parameter.ndim == 2 else "scalar"


def decay_groups(model: nn.Module, config: AdamWConfig) -> tuple[list[str], list[str]]:
    """The names of the parameters that decay and of those that do not, each in the model's order."""
    decays = {
        "matrix": True,
        "embedding": config.decay_embeddings,
        "norm": config.decay_norms,
        "conv": config.decay_conv,
        "bias": config.decay_biases,
        "scalar": False,
    }
    groups: tuple[list[str], list[str]] = [], []
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            kind = kind_of(module, path, name.rpartition(".")[2], parameter)
            groups[0 if decays[kind] else 1].append(name)
    return groups


def make_optimizer(model: nn.Module, config: AdamWConfig) -> torch.optim.AdamW:
    """AdamW over the two groups of `decay_groups`, fused on every device that has the fused kernel."""
    parameters = dict(model.named_parameters())
    decayed, plain = decay_groups(model, config)
    groups: list[dict[str, Any]] = [
        {"params": [parameters[n] for n in names], "weight_decay": decay}
        for names, decay in ((decayed, config.weight_decay), (plain, 0.0))
        if names
    ]
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters.values())
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the next update, for every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
