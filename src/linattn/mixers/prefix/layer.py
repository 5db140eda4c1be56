"""JRT-RNN's layer: Based's linear attention with keys and values of its own for the prefix."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from linattn.core.shapes import Segment
from linattn.mixers.prefix import MIXER
from linattn.mixers.taylor import TaylorState
from linattn.mixers.taylor.layer import TaylorConfig, TaylorLayer
from linattn.nn import Linear


@dataclass(frozen=True)
class PrefixConfig(TaylorConfig):
    """JRT's prefix linear attention (arXiv 2407.05483): encoder projections over the first tokens of the first call."""

    prefix_length: int = 1024
    """The longest prefix, in tokens; how much of it a call has is `Segment.prefix_lengths`."""

    def build(self, d_model: int, layer: int, n_layers: int) -> PrefixLayer:
        """The layer; its place in the model does not matter."""
        return PrefixLayer(self, d_model)


class PrefixLayer(TaylorLayer):
    """Taylor's projections and two more, proj_k_enc and proj_v_enc, for the same input's first tokens."""

    mixer = MIXER

    def __init__(self, config: PrefixConfig, d_model: int):
        super().__init__(config, d_model)
        self.prefix_length = config.prefix_length
        self.proj_k_enc = Linear(d_model, config.n_heads * config.feature_dim, bias=False)
        self.proj_v_enc = Linear(d_model, d_model, bias=False)

    def forward(
        self, x: Tensor, state: TaylorState | None, segment: Segment, return_state: bool = True
    ) -> tuple[Tensor, TaylorState | None]:
        """x [B, T, d_model] -> y [B, T, d_model] and the State. A prefix is read only where nothing was before."""
        inputs = {**self.heads(x), "normalize": self.config.normalize}
        if segment.prefix_lengths is not None:
            if state is not None:
                raise ValueError("prefix_lengths belong to the first call; this one continues from a State")
            inputs |= self._prefix(x, segment)
        state = segment.before(MIXER, inputs, state)
        y, state = MIXER.forward(inputs, initial_state=state, cu_seqlens=segment.cu_seqlens, return_state=return_state)
        return self.out_proj(y.flatten(-2)), state

    def _prefix(self, x: Tensor, segment: Segment) -> dict[str, Tensor]:
        n = self.config.n_heads
        lengths = segment.prefix_lengths
        assert lengths is not None
        # Packed prefixes lie anywhere in the row: project all of it and let the lengths choose, at static shapes.
        head = x if segment.cu_seqlens is not None else x[:, : self.prefix_length]
        k, v = (proj(head).unflatten(-1, (n, -1)) for proj in (self.proj_k_enc, self.proj_v_enc))
        if segment.cu_seqlens is None:
            return {"k_prefix": k, "v_prefix": v, "prefix_lengths": lengths.clamp(max=head.shape[1])}
        longest = segment.cu_seqlens.diff().clamp(max=self.prefix_length)
        return {
            "k_prefix": k,
            "v_prefix": v,
            "prefix_lengths": lengths.minimum(longest),
            "cu_prefix": segment.cu_seqlens,
        }
