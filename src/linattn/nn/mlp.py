"""The gated MLPs: SwiGLU (Based, JRT-RNN, the attention baseline) and SGLU (TransNormerLLM).

pytest tests/test_nn.py -k glu
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from linattn.nn.linear import Linear


class SwiGLU(nn.Module):
    """``fc2(silu(gate) * value)``, where fc1 gives value and gate as its two halves; x [..., D] to [..., D].

    ``order`` says which half of fc1's rows is which: "value_gate" in Based's checkpoints, "gate_value" in LLaMA's.
    The same weights under the other order load without a complaint and give another function.

    fc1.weight is [2 d_hidden, d_model], fc2.weight [d_model, d_hidden]. Another order is a ValueError.
    Source: Shazeer 2020 (arXiv 2002.05202), equation 6.
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        order: Literal["value_gate", "gate_value"] = "value_gate",
        bias: bool = False,
    ) -> None:
        super().__init__()
        if order not in ("value_gate", "gate_value"):
            raise ValueError(f"order {order!r} is not one of ['value_gate', 'gate_value']")
        self.order = order
        self.fc1 = Linear(d_model, 2 * d_hidden, bias=bias)
        self.fc2 = Linear(d_hidden, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., D] to [..., D]."""
        first, second = self.fc1(x).chunk(2, dim=-1)
        value, gate = (first, second) if self.order == "value_gate" else (second, first)
        return self.fc2(F.silu(gate) * value)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"order={self.order!r}"


class SGLU(nn.Module):
    """``l3(l1(x) * l2(x))``: a gated MLP with neither activation nor bias; x [..., D] to [..., D].

    l1.weight and l2.weight are [d_hidden, d_model], l3.weight [d_model, d_hidden].
    Source: TransNormerLLM (arXiv 2307.14995), section 3.1.
    """

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.l1 = Linear(d_model, d_hidden, bias=False)
        self.l2 = Linear(d_model, d_hidden, bias=False)
        self.l3 = Linear(d_hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., D] to [..., D]."""
        return self.l3(self.l1(x) * self.l2(x))
