"""A Decoder's forward pass with vectors in place of tokens, or with what stands between its blocks.

By forward hooks, for the length of one call and of the calling thread alone.

    pytest tests/hf/test_hf_embeds.py
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from linattn.models import Decoder
from linattn.models.decoder import Output, pack


def tapped_forward(
    model: Decoder, tokens: Tensor, vectors: Tensor | None, record: bool, *, mask: Tensor | None = None, **options: Any
) -> tuple[Output, list[Tensor]]:
    """`Decoder.forward`, and its hidden states.

    Args:
        model: called once.
        tokens: int64 [B, T]; beside ``vectors`` any ids will do.
        vectors: [..., d_model], as many as tokens and in their order, as the embedding would return them (that is,
            scaled where the model scales); read in place of its rows. None: the tokens are read.
        record: whether to keep the hidden states.
        mask: of `Decoder.forward`, as are the options.

    Returns:
        The output, and if ``record`` the residual stream before each block, in the shape of output.hidden; else [].
    """
    packing = None if mask is None else pack(mask)
    seen: list[Tensor] = []
    hooks = []
    if vectors is not None:
        given = vectors.reshape(tokens.numel(), -1)
        given = given if packing is None else given[packing.order]
        hooks.append(model.embedding.register_forward_hook(_output(lambda found: given.view(found.shape))))
    if record:
        hooks += [block.register_forward_pre_hook(_input(seen.append)) for block in model.blocks]
    try:
        out = model(tokens, mask=mask, **options)
    finally:
        for hook in hooks:
            hook.remove()
    streams = seen if packing is None else [x[0, packing.place] for x in seen]
    return out, [x.reshape(out.hidden.shape) for x in streams]


def _output(replace: Callable[[Tensor], Tensor]) -> Any:
    caller = threading.get_ident()

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return replace(output) if threading.get_ident() == caller else output

    return hook


def _input(see: Callable[[Tensor], None]) -> Any:
    caller = threading.get_ident()

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if threading.get_ident() == caller:
            see(inputs[0])

    return hook
