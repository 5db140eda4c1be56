"""The two ends of a language model: token ids to vectors, and vectors to logits.

Tables are padded to a round number of rows, because a matrix product whose width is 50,257 misses the fast kernels.
Padded rows are in the weights and in no answer: `Head` cuts them off, `cross_entropy` leaves them out.

    pytest tests/test_nn.py -k "embedding or head or vocab"
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linattn.nn.linear import linear

INIT_STD = 0.02
"""Standard deviation of the first weights, in the published configurations of Based and of TransNormerLLM."""


def padded_vocab(vocab_size: int, multiple: int = 8) -> int:
    """The smallest multiple of ``multiple`` that is at least ``vocab_size``; either below 1 is a ValueError."""
    if vocab_size < 1 or multiple < 1:
        raise ValueError(f"vocab_size is {vocab_size} and multiple {multiple}; both must be at least 1")
    return -(-vocab_size // multiple) * multiple


def cut_logits(logits: Tensor, vocab_size: int) -> Tensor:
    """The logits of real tokens: [..., V padded] to [..., vocab_size], a view.

    Raises:
        ValueError: there are fewer than vocab_size logits.
    """
    if logits.shape[-1] < vocab_size:
        raise ValueError(f"logits have shape {list(logits.shape)}; the last axis must be at least {vocab_size}")
    return logits[..., :vocab_size]


class Embedding(nn.Module):
    """Token ids [B, T] to vectors [B, T, D]; the table is [padded_vocab(vocab_size, multiple_of), D].

    Args:
        vocab_size: how many ids the tokenizer has.
        d_model: D.
        multiple_of: what the rows are padded to a multiple of.
        scale: the vectors are multiplied by it; TransNormerLLM 1B uses sqrt(d_model).
        reserved_ids: padded rows that are legal as inputs all the same. JRT-RNN's mask token is such a row, 50,263.

    Raises:
        ValueError: a reserved id is outside the padding.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        multiple_of: int = 8,
        scale: float | None = None,
        reserved_ids: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        rows = padded_vocab(vocab_size, multiple_of)
        for i in reserved_ids:
            if not vocab_size <= i < rows:
                raise ValueError(f"reserved id {i} is not a padded row; those are {vocab_size} to {rows - 1}")
        self.vocab_size = vocab_size
        self.scale = scale
        self.reserved_ids = tuple(reserved_ids)
        self.weight = nn.Parameter(torch.empty(rows, d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table from a normal of standard deviation `INIT_STD`."""
        nn.init.normal_(self.weight, std=INIT_STD)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ids int64 [...]; returns [..., D] in the table's dtype.

        Raises:
            ValueError: on the CPU and outside torch.compile, an id that is negative, or at least vocab_size and not
                reserved. On a GPU the look would wait for the device.
        """
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check(ids)
        x = F.embedding(ids, self.weight)
        return x if self.scale is None else x * self.scale

    def _check(self, ids: Tensor) -> None:
        wrong = (ids < 0) | (ids >= self.vocab_size)
        for i in self.reserved_ids:
            wrong &= ids != i
        if wrong.any():
            raise ValueError(
                f"token id {int(ids[wrong][0])} is outside 0 to {self.vocab_size - 1}; "
                f"use the tokenizer of this model, or build it with a larger vocab_size"
            )

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"{self.vocab_size} (padded {self.weight.shape[0]}), {self.weight.shape[1]}, scale={self.scale}"


class Head(nn.Module):
    """Hidden states [..., D] to logits [..., vocab_size], with a weight of its own or the embedding's.

    A tied head holds no parameter and is given the embedding's weight in each call, so that the one tensor has one
    name in the state dict. An own weight is [padded_vocab(vocab_size, multiple_of), D]. There is no bias.
    """

    weight: nn.Parameter | None

    def __init__(self, vocab_size: int, d_model: int, multiple_of: int = 8, tied: bool = False) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        rows = padded_vocab(vocab_size, multiple_of)
        self.register_parameter("weight", None if tied else nn.Parameter(torch.empty(rows, d_model)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw an own weight from a normal of standard deviation `INIT_STD`."""
        if self.weight is not None:
            nn.init.normal_(self.weight, std=INIT_STD)

    def forward(self, hidden: Tensor, tied_weight: Tensor | None = None) -> Tensor:
        """Logits [..., vocab_size] of hidden [..., D], in hidden's dtype.

        Raises:
            ValueError: a tied head without tied_weight, or an untied one with it.
        """
        if self.weight is not None and tied_weight is not None:
            raise ValueError("this head has its own weight: do not pass tied_weight")
        weight = tied_weight if self.weight is None else self.weight
        if weight is None:
            raise ValueError("this head is tied: pass the embedding's weight as tied_weight")
        return cut_logits(linear(hidden, weight), self.vocab_size)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"{self.vocab_size}, tied={self.weight is None}"
