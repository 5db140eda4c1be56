"""The one skeleton: embedding, blocks of (norm, mixer, norm, MLP), norm, head. Every model here is a choice of mixers.

A model's state is how many tokens it has read and one State a layer. Padding never reaches a mixer: a padded batch is
packed here, once, into one row whose last document is all the pads, and the outputs are scattered back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from linattn.core.config import require_positive
from linattn.core.pool import pool_rows
from linattn.core.shapes import (
    Segment,
    check_cu_seqlens,
    document_count,
    document_of_token,
    values_are_checked,
)
from linattn.mixers.lightning.layer import LightningConfig
from linattn.mixers.prefix.layer import PrefixConfig
from linattn.mixers.shortconv.layer import ShortConvConfig
from linattn.mixers.softmax.layer import SoftmaxConfig
from linattn.mixers.taylor.layer import TaylorConfig
from linattn.mixers.window.layer import WindowConfig
from linattn.models.packing import pack, with_pads, without_pads
from linattn.models.state import ModelState
from linattn.nn import SGLU, Embedding, Head, SwiGLU, cross_entropy, make_norm

MixerConfig = TaylorConfig | PrefixConfig | LightningConfig | WindowConfig | ShortConvConfig | SoftmaxConfig


@dataclass(frozen=True)
class DecoderConfig:
    """What `Decoder` is built from. Model files (based.py and its kin) make one from their own few dials."""

    d_model: int
    mixers: tuple[MixerConfig, ...]
    d_hidden: int
    vocab_size: int
    mlp: Literal["swiglu", "swiglu_gate_first", "sglu"] = "swiglu"
    norm: Literal["rms", "simple"] = "rms"
    norm_eps: float = 1e-5
    vocab_multiple: int = 8
    reserved_ids: tuple[int, ...] = ()
    tie_embeddings: bool = True
    scale_embedding: bool = False
    init_std: float = 0.02
    init_depth_scaled: bool = True
    """out_proj and fc2 begin at init_std / sqrt(2 n_layers), as published for Based."""
    prefix_length: int = 0
    """The longest prefix of a prefix model; 0 for all others."""

    def __post_init__(self) -> None:
        require_positive(self, "prefix_length")
        if not self.mixers:
            raise ValueError("DecoderConfig.mixers is empty; a model has at least one layer")


class Output(NamedTuple):
    """What a forward pass returns: hidden [B, T, d_model], logits as asked for, and what else was asked for.

    hidden_states: n_layers + 1 tensors of hidden's shape: the residual stream before each block, and hidden itself.
    """

    hidden: Tensor
    logits: Tensor | None
    state: ModelState | None
    hidden_states: tuple[Tensor, ...] | None = None


class Block(nn.Module):
    """x += mixer(norm(x)); x += mlp(norm(x)). The residual stream stays in fp32 where the weights are 16-bit."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        d = config.d_model
        self.mixer_norm = make_norm(config.norm, d, config.norm_eps)
        self.mixer: Any = config.mixers[layer].build(d, layer, len(config.mixers))
        self.mlp_norm = make_norm(config.norm, d, config.norm_eps)
        if config.mlp == "sglu":
            self.mlp = SGLU(d, config.d_hidden)
        else:
            order = "value_gate" if config.mlp == "swiglu" else "gate_value"
            self.mlp = SwiGLU(d, config.d_hidden, order=order)

    def forward(
        self, x: Tensor, state: Any, segment: Segment, return_state: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Any]:
        """x [B, T, d_model] -> the same, and the mixer's State."""
        y, state = self.mixer(self.mixer_norm(x).to(dtype), state, segment, return_state)
        x = x + y
        return x + self.mlp(self.mlp_norm(x).to(dtype)), state

    def step_(self, x: Tensor, pool: Any, slots: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """One token a row: x [B, d_model] -> the same; the pool in place."""
        x = x + self.mixer.step_(self.mixer_norm(x).to(dtype), pool, slots, positions)
        return x + self.mlp(self.mlp_norm(x).to(dtype))


class Decoder(nn.Module):
    """A language model of any of the mixers. See `forward`, `step_` and `loss`."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embedding = Embedding(
            config.vocab_size,
            config.d_model,
            config.vocab_multiple,
            scale=math.sqrt(config.d_model) if config.scale_embedding else None,
            reserved_ids=config.reserved_ids,
        )
        self.blocks: Any = nn.ModuleList(Block(config, i) for i in range(len(config.mixers)))
        self.norm = make_norm(config.norm, config.d_model, config.norm_eps)
        self.head = Head(config.vocab_size, config.d_model, config.vocab_multiple, tied=config.tie_embeddings)
        self.checkpoint_blocks = False
        """Whether training recomputes each block in the backward pass instead of keeping its activations."""
        if not self.embedding.weight.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew: N(0, init_std), biases 0; modules with a rule of their own follow it.

        After building on the meta device: ``model.to_empty(device=...)``, then this.
        """
        std = self.config.init_std
        deep = std / math.sqrt(2 * len(self.blocks)) if self.config.init_depth_scaled else std
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=deep if name.endswith(("out_proj", "fc2")) else std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Embedding | Head):
                if module.weight is not None:
                    nn.init.normal_(module.weight, std=std)
            elif module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()  # pyright: ignore[reportCallIssue]

    @property
    def head_weight(self) -> Tensor:
        """[padded vocab, d_model]: the head's own, or the embedding's where they are tied."""
        return self.embedding.weight if self.head.weight is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., d_model] -> logits [..., vocab_size]."""
        hidden = hidden.to(self.head_weight.dtype)
        return self.head(hidden, self.embedding.weight if self.head.weight is None else None)

    def loss(
        self,
        hidden: Tensor,
        targets: Tensor,
        chunk: int | None = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> Tensor:
        """Cross-entropy of hidden [..., d_model] against targets [...] (-100 ignored), ``chunk`` rows at a time."""
        return cross_entropy(
            hidden.flatten(0, -2).to(self.head_weight.dtype),
            self.head_weight,
            targets.flatten(),
            vocab_size=self.config.vocab_size,
            chunk=chunk,
            reduction=reduction,
        )

    def forward(
        self,
        tokens: Tensor,
        *,
        state: ModelState | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
        logits: Literal["all", "last", "none"] = "all",
        return_state: bool = False,
        return_hidden_states: bool = False,
        scan: Any = None,
    ) -> Output:
        """Read tokens int64 [B, T], or the embeddings that stand for them, after ``state``.

        Args:
            tokens: int64 [B, T]; or floats [B, T, d_model] as ``model.embedding`` returns them, that is, scaled where
                the model scales. Gradients reach them.
            mask: bool [B, T], False on pads, wherever they are; padding is exact. The outputs of pads mean nothing.
            cu_seqlens: int32 [N+1], documents packed in one row (B = 1). Not together with mask.
            prefix_lengths: int64 [B] or [N], for prefix models, on the first call of a document only.
            logits: "all" [B, T, vocab]; "last" [N, vocab], each document's last token's (NaN where
                a document has none); "none".
            return_state: whether to return the state after these tokens (N = B rows, or N documents).
            return_hidden_states: whether to keep and return what stands between the blocks: see `Output`.
            scan: distributed/sequence.py's scan over ranks.

        Raises:
            ValueError: arguments that do not fit one another; embeddings of another width than d_model; a token outside
                the vocabulary (checked on the CPU).
        """
        B, T = self._check_tokens(tokens)
        if logits not in ("all", "last", "none"):
            raise ValueError(f"logits must be 'all', 'last' or 'none', got {logits!r}")
        if mask is not None and cu_seqlens is not None:
            raise ValueError("give mask or cu_seqlens, not both: a packed batch has no pads")
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, B, T)
        if prefix_lengths is not None and not self.config.prefix_length:
            raise ValueError("prefix_lengths given, but this model has no prefix layers")
        self._check_rows(document_count(B, cu_seqlens), state, prefix_lengths)
        packing = None
        if mask is not None:
            if mask.shape != (B, T):
                raise ValueError(f"mask must be {[B, T]} as the tokens are, got {list(mask.shape)}")
            packing = pack(mask.bool())
            tokens, cu_seqlens = tokens.flatten(0, 1)[packing.order][None], packing.cu_seqlens
            state = with_pads(state)
            if prefix_lengths is not None:
                prefix_lengths = torch.cat([prefix_lengths, prefix_lengths.new_zeros(1)])
        segment = Segment(self._positions(tokens, state, cu_seqlens), cu_seqlens, prefix_lengths, scan)
        hidden, layers, between = self._run(tokens, state, segment, return_state, return_hidden_states)
        after = self._state_after(state, segment, layers) if return_state else None
        last = None
        if packing is not None:
            if logits == "last":
                last = self._some_logits(hidden, cu_seqlens, "last")[:-1]
            hidden, *between = [x[0, packing.place].unflatten(0, (B, T)) for x in (hidden, *between)]
            after, cu_seqlens = without_pads(after), None
        found = self._some_logits(hidden, cu_seqlens, logits) if last is None else last
        return Output(hidden, found, after, (*between, hidden) if return_hidden_states else None)

    def _check_tokens(self, tokens: Tensor) -> tuple[int, int]:
        """(B, T) of tokens, or of embeddings in their place."""
        d = self.config.d_model
        ids = tokens.ndim == 2 and tokens.dtype in (torch.int64, torch.int32)
        embeddings = tokens.ndim == 3 and tokens.shape[2] == d and tokens.is_floating_point()
        if not (ids or embeddings):
            raise ValueError(
                f"tokens must be embeddings [B, T, {d}] as model.embedding returns them, or int64 of shape [B, T], "
                f"got {tokens.dtype} {list(tokens.shape)}"
            )
        B, T = tokens.shape[:2]
        if T == 0 or B == 0:
            raise ValueError(f"tokens must hold at least one token, got shape {list(tokens.shape)}")
        return B, T

    def _check_rows(self, rows: int, state: ModelState | None, prefix_lengths: Tensor | None) -> None:
        if state is not None and len(state.layers) != len(self.blocks):
            raise ValueError(f"the state of another model: it has {len(state.layers)} layers, not {len(self.blocks)}")
        if state is not None and state.tokens.shape != (rows,):
            raise ValueError(f"the state must have {rows} rows, one a document, got {list(state.tokens.shape)}")
        if prefix_lengths is None:
            return
        if prefix_lengths.shape != (rows,) or prefix_lengths.is_floating_point():
            raise ValueError(
                f"prefix_lengths must be int64 [{rows}], one a document, got {prefix_lengths.dtype} "
                f"{list(prefix_lengths.shape)}"
            )
        longest = self.config.prefix_length
        if values_are_checked(prefix_lengths) and ((prefix_lengths < 0) | (prefix_lengths > longest)).any():
            raise ValueError(f"prefix_lengths must lie in 0 to {longest}, got {prefix_lengths.tolist()}")

    def _embed(self, tokens: Tensor) -> Tensor:
        """The residual stream before the first block, of tokens or of embeddings: fp32, or the weights' float64."""
        x = tokens if tokens.is_floating_point() else self.embedding(tokens)
        return x.double() if self.embedding.weight.dtype == torch.float64 else x.float()

    def _run(
        self, tokens: Tensor, state: ModelState | None, segment: Segment, return_state: bool, return_hidden_states: bool
    ) -> tuple[Tensor, tuple[Any, ...], list[Tensor]]:
        """The last norm's output, a State a layer, and if asked for the residual stream before each block, else []."""
        dtype = self.embedding.weight.dtype
        x = self._embed(tokens)
        layers, between = [], []
        for i, block in enumerate(self.blocks):
            if return_hidden_states:
                between.append(x)
            before = None if state is None else state.layers[i]
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x, after = checkpoint(block, x, before, segment, return_state, dtype, use_reentrant=False)
            else:
                x, after = block(x, before, segment, return_state, dtype)
            layers.append(after)
        return self.norm(x), tuple(layers), between

    @staticmethod
    def _positions(tokens: Tensor, state: ModelState | None, cu_seqlens: Tensor | None) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        if cu_seqlens is None:
            places = places.expand(tokens.shape[:2])
            return places if state is None else places + state.tokens[:, None]
        document = document_of_token(cu_seqlens, tokens.shape[1])
        inside = places - cu_seqlens[document].long()
        return (inside if state is None else inside + state.tokens[document])[None]

    @staticmethod
    def _state_after(before: ModelState | None, segment: Segment, layers: tuple[Any, ...]) -> ModelState:
        B, T = segment.positions.shape
        packed = segment.cu_seqlens
        read = segment.positions.new_full((B,), T) if packed is None else packed.diff().long()
        return ModelState(read if before is None else before.tokens + read, layers)

    def _some_logits(self, hidden: Tensor, cu_seqlens: Tensor | None, which: str) -> Any:
        if which == "none":
            return None
        if which == "all":
            return self.logits(hidden)
        if cu_seqlens is None:
            return self.logits(hidden[:, -1])
        # A document without tokens has no last one: NaN, where a neighbour's logits would look like an answer.
        last = self.logits(hidden[0, (cu_seqlens[1:].long() - 1).clamp(min=0)])
        return last.masked_fill((cu_seqlens.diff() == 0)[:, None], float("nan"))

    def identity(self, documents: int) -> ModelState:
        """The state that has read nothing, for this model's device and dtype."""
        tokens = torch.zeros(documents, dtype=torch.int64, device=self.embedding.weight.device)
        return ModelState(tokens, tuple(block.mixer.identity(documents) for block in self.blocks))

    def new_pool(self, slots: int, capacity: int | None = None) -> ModelState:
        """Room for ``slots`` documents in decoding, each of up to ``capacity`` tokens where that matters (softmax)."""
        empty = self.identity(1)
        layers = (b.mixer.mixer.new_pool(s, slots, capacity) for b, s in zip(self.blocks, empty.layers, strict=True))
        return ModelState(empty.tokens.new_zeros(slots + 1), tuple(layers))

    def take(self, pool: ModelState, slots: Tensor) -> ModelState:
        """The states in ``slots`` int [N] of a pool, copied."""
        layers = (b.mixer.mixer.take(p, slots) for b, p in zip(self.blocks, pool.layers, strict=True))
        return ModelState(pool.tokens[slots.long()], tuple(layers))

    def put_(self, pool: ModelState, slots: Tensor, state: ModelState) -> None:
        """Write states of N rows into ``slots`` int [N] of a pool."""
        pool.tokens[slots.long()] = state.tokens
        for block, room, after in zip(self.blocks, pool.layers, state.layers, strict=True):
            block.mixer.mixer.put_(room, slots, after)

    @torch.no_grad()
    def step_(self, tokens: Tensor, pool: ModelState, slots: Tensor) -> Tensor:
        """Decode one token a row: tokens int64 [B], slots int32 [B] (-1: an idle row) -> logits [B, vocab_size].

        The pool's states are rewritten in place.

        Raises:
            ValueError: embeddings, or tokens of another shape.
        """
        if tokens.ndim != 1 or tokens.is_floating_point():
            raise ValueError(f"tokens must be int64 of shape [B], got {tokens.dtype} {list(tokens.shape)}")
        rows = pool_rows(pool.tokens, slots)
        positions = pool.tokens.index_select(0, rows)
        dtype = self.embedding.weight.dtype
        x = self._embed(tokens)
        for block, room in zip(self.blocks, pool.layers, strict=True):
            x = block.step_(x, room, slots, positions, dtype)
        pool.tokens.index_copy_(0, rows, positions + 1)
        return self.logits(self.norm(x))
