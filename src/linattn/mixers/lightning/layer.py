"""TransNormerLLM's attention layer: projections, SiLU, LRPE in some layers, lightning attention, norm and gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linattn.core.config import require_positive
from linattn.core.numerics import sum_dtype
from linattn.core.shapes import Segment
from linattn.mixers.lightning import (
    MIXER,
    LightningState,
    chunked,
    lightning_attention,
    lightning_step_,
    minimax_log_decay,
    paper_log_decay,
    tnl_log_decay,
)
from linattn.nn import LRPE, Linear, SimpleRMSNorm, gated_rms_norm

LOG_DECAYS = {"tnl": tnl_log_decay, "paper": paper_log_decay, "minimax": minimax_log_decay}


@dataclass(frozen=True)
class LightningConfig:
    """TransNormerLLM's attention (arXiv 2307.14995) in its first form, or as the 15B model has it (2405.17381)."""

    n_heads: int = 8
    """Heads; n_heads * head_dim is the layer's inner width, which need not be d_model."""
    head_dim: int = 128
    """Dim of q, k and v a head; 128 in every published model."""
    lrpe: bool = False
    """Encode positions in q and k, which doubles their dim. Published models do so in layer 0 alone."""
    form: Literal["tnl", "tnl3"] = "tnl"
    """"tnl": the gate is a fourth projection, without activation. "tnl3": SiLU on v too, a low-rank sigmoid gate."""
    gate_dim: int = 128
    """Rank of the tnl3 gate: 128 at 410M, 16 at 15B. The tnl form has no use for it."""
    slopes: Literal["tnl", "paper", "minimax"] = "tnl"
    """Which formula of mixers/lightning/slopes.py gives the decays; published TransNormerLLM weights need "tnl"."""
    learn_decay: bool = False
    """Train the decays, from those first values. No published model does."""

    def __post_init__(self) -> None:
        require_positive(self)

    def build(self, d_model: int, layer: int, n_layers: int) -> LightningLayer:
        """The layer; its depth decides how slowly it forgets."""
        return LightningLayer(self, d_model, layer, n_layers)


class LightningLayer(nn.Module):
    """x -> out_proj(gate * norm(attention)), the norm over all heads together. Parameters are named as published.

    The decays are no weights of a published checkpoint: they are a buffer outside the state_dict, float32 whatever
    the weights are (float64 for float64), rebuilt rather than cast when the module moves, also from the meta device.
    With ``learn_decay`` the parameter is ``log_slope``, and log_decay = -exp(log_slope) cannot become positive.
    """

    mixer = MIXER
    _log_decay: Tensor

    def __init__(self, config: LightningConfig, d_model: int, layer: int, n_layers: int):
        super().__init__()
        if config.form not in ("tnl", "tnl3") or config.slopes not in LOG_DECAYS:
            raise ValueError(
                f"form {config.form!r} must be 'tnl' or 'tnl3', slopes {config.slopes!r} one of {list(LOG_DECAYS)}"
            )
        self.config, self.layer, self.n_layers = config, layer, n_layers
        hidden = config.n_heads * config.head_dim
        if config.form == "tnl":
            self.qkvu_proj = Linear(d_model, 4 * hidden, bias=False)
        else:
            self.qkv_proj = Linear(d_model, 3 * hidden, bias=False)
            self.output_gate = nn.Sequential(
                Linear(d_model, config.gate_dim, bias=False), Linear(config.gate_dim, hidden, bias=False)
            )
        self.lrpe = LRPE(config.n_heads, config.head_dim) if config.lrpe else None
        self.norm = SimpleRMSNorm(hidden)
        self.out_proj = Linear(hidden, d_model, bias=False)
        if config.learn_decay:
            self.log_slope = nn.Parameter(torch.empty(config.n_heads))
            self.reset_parameters()
        else:
            self.register_buffer("_log_decay", None, persistent=False)
            self.reset_buffers()

    @property
    def log_decay(self) -> Tensor:
        """[H], <= 0: what the op takes."""
        if self.config.learn_decay:
            return -self.log_slope.to(sum_dtype(self.log_slope.dtype)).exp()
        return self._log_decay

    def reset_parameters(self) -> None:
        """Set a learned decay to its first value; a slope of 0 (``slopes="paper"``) starts at 1e-9, which has a log."""
        if self.config.learn_decay:
            with torch.no_grad():
                self.log_slope.copy_((-self._first_log_decay()).clamp(min=1e-9).log())

    def reset_buffers(self) -> None:
        """Rebuild a fixed decay on the weights' device. Needed by hand only after load_state_dict(assign=True)."""
        if not self.config.learn_decay:
            weight = self.out_proj.weight
            self._log_decay = self._first_log_decay().to(weight.device, sum_dtype(weight.dtype))

    def _first_log_decay(self) -> Tensor:
        return LOG_DECAYS[self.config.slopes](self.config.n_heads, self.layer, self.n_layers)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LightningLayer:
        # Every .to(), .cuda(), .bfloat16() and .to_empty() comes through here: a cast would round the decays, and
        # to_empty would lose them.
        super()._apply(fn, recurse)
        self.reset_buffers()
        return self

    def heads(self, x: Tensor, positions: Tensor) -> tuple[dict[str, Any], Tensor]:
        """The op's inputs, q, k [..., H, D] and v [..., H, V], and the gate before its activation [..., hidden]."""
        if self.config.form == "tnl":
            q, k, v, gate = self.qkvu_proj(x).chunk(4, -1)
            q, k = F.silu(q), F.silu(k)
        else:
            q, k, v = F.silu(self.qkv_proj(x)).chunk(3, -1)
            gate = self.output_gate(x)
        q, k, v = (h.unflatten(-1, (self.config.n_heads, -1)) for h in (q, k, v))
        if self.lrpe is not None:
            q, k = self.lrpe(q, k, positions)
        return {"q": q, "k": k, "v": v, "log_decay": self.log_decay}, gate

    def gated_norm(self, o: Tensor, gate: Tensor) -> Tensor:
        """o [..., H, V], normalised over all heads together, times the gate [..., hidden], activated here."""
        activation = "sigmoid" if self.config.form == "tnl3" else None
        return gated_rms_norm(o.flatten(-2), gate, self.norm.eps, activation=activation)

    def forward(
        self, x: Tensor, state: LightningState | None, segment: Segment, return_state: bool = True
    ) -> tuple[Tensor, LightningState | None]:
        """x [B, T, d_model] -> y [B, T, d_model] and the State."""
        inputs, gate = self.heads(x, segment.positions)
        state = segment.before(MIXER, inputs, state)
        o, state = lightning_attention(
            **inputs, initial_state=state, cu_seqlens=segment.cu_seqlens, return_state=return_state
        )
        return self.out_proj(self.gated_norm(o, gate)), state

    def identity(self, documents: int) -> LightningState:
        """The State that has read nothing."""
        dim = self.config.head_dim
        key_dim = dim if self.lrpe is None else 2 * dim
        return chunked.identity(documents, self.config.n_heads, key_dim, dim, self.out_proj.weight)

    @torch.no_grad()
    def step_(self, x: Tensor, pool: LightningState, slots: Tensor, positions: Tensor) -> Tensor:
        """One token a row: x [B, d_model], positions int64 [B] -> y [B, d_model]; the pool in place."""
        inputs, gate = self.heads(x, positions)
        o = lightning_step_(**inputs, pool=pool, slots=slots)
        return self.out_proj(self.gated_norm(o, gate))
