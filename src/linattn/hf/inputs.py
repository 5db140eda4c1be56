"""transformers' ways of saying which tokens are real, and whose: masks, position_ids and prefix lengths in our terms.

pytest tests/hf/test_hf_inputs.py
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def padding_mask(attention_mask: Any, tokens: Tensor, read: int) -> Tensor | None:
    """bool [B, T], False on pads, of these tokens [B, T] alone; None where all are real.

    Args:
        attention_mask: None; 2-D over these tokens, or over the ``read`` columns before and these; a dict of masks by
            layer type, whose entries are such or transformers' 4-D causal masks [B, 1, T, columns].
        tokens: int64 [B, T], or vectors [B, T, d_model].
        read: columns in the cache.

    Raises:
        ValueError: another shape, or a 4-D mask of one's own, which no State can honour.
    """
    if isinstance(attention_mask, Mapping):
        masks = [mask for mask in attention_mask.values() if mask is not None]
        flat = [mask for mask in masks if mask.ndim == 2]
        attention_mask = (flat or [_diagonal(mask, tokens.shape[1]) for mask in masks] or [None])[0]
    if attention_mask is None:
        return None
    B, T = tokens.shape[:2]
    if attention_mask.ndim != 2 or attention_mask.shape[0] != B or attention_mask.shape[1] not in (T, read + T):
        whole = f" or {[B, read + T]}, with the {read} columns before them" if read else ""
        raise ValueError(
            f"attention_mask must be [B, T] = {[B, T]}, as the tokens are{whole}; got {list(attention_mask.shape)}"
        )
    mask = attention_mask[:, -T:] != 0
    if not torch.compiler.is_compiling() and mask.all():
        return None
    return mask


def _diagonal(mask: Tensor, tokens: int) -> Tensor:
    """Which tokens see themselves in a 4-D mask, bool or 0 and minus infinity: in a causal one, those that are real."""
    if mask.ndim != 4:
        raise ValueError(f"a mask in a dict of masks must be [B, T] or [B, 1, T, columns], got {list(mask.shape)}")
    own = mask[:, 0, :, -tokens:].diagonal(dim1=-2, dim2=-1)
    return own if own.dtype == torch.bool else own >= 0


@torch.compiler.disable
def packed_documents(position_ids: Tensor, shape: torch.Size, mask: Tensor | None, cached: bool) -> Tensor | None:
    """cu_seqlens int32 [N+1] over the flattened batch if ``position_ids`` begin anew at 0 inside a row, else None.

    Only differences of positions matter to these models, and the model counts for itself; where a row starts is of no
    account.

    Args:
        position_ids: int64 [B, T] or [1, T].
        shape: (B, T) of the tokens.
        mask: bool [B, T] or None.
        cached: whether a cache was given, be it empty: its rows are the batch's, not the documents'.

    Raises:
        ValueError: positions that neither count up by one nor begin anew at 0; documents that begin anew under a mask,
            or after a cache.
    """
    B, T = shape
    if position_ids.shape not in ((B, T), (1, T)):
        raise ValueError(f"position_ids must be [B, T] = {[B, T]}, got {list(position_ids.shape)}")
    position_ids = position_ids.expand(B, T)
    real = torch.ones(B, T, dtype=torch.bool, device=position_ids.device) if mask is None else mask
    count = real.cumsum(1) - 1
    first = position_ids.gather(1, real.int().argmax(1, keepdim=True))
    if bool(((position_ids - first == count) | ~real).all()):
        return None
    begins = position_ids == 0
    begins[:, 0] = True
    if bool(((position_ids[:, 1:] - position_ids[:, :-1] != 1) & ~begins[:, 1:]).any()):
        raise ValueError(
            "position_ids must count up by one along each row, and may begin anew at 0, where another document begins; "
            f"got {position_ids.tolist() if position_ids.numel() <= 64 else 'others'}"
        )
    if mask is not None or cached:
        raise ValueError(
            "position_ids that begin anew at 0 pack several documents into a row; that goes with neither pads nor a "
            "cache: leave out attention_mask and past_key_values"
        )
    starts = begins.flatten().nonzero()[:, 0]
    return torch.cat([starts, starts.new_tensor([B * T])]).to(torch.int32)


def document_lengths(tokens: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """int64 [N]: real tokens of each row of tokens [B, T] (or vectors [B, T, D]), or of each packed document."""
    if cu_seqlens is not None:
        return cu_seqlens.diff().long()
    if mask is not None:
        return mask.sum(1)
    return torch.full(tokens.shape[:1], tokens.shape[1], dtype=torch.int64, device=tokens.device)


def given_prefix(prefix_length: int | Tensor, lengths: Tensor, longest: int) -> Tensor:
    """A prefix length as given, int64 [N], once it is known to fit.

    Args:
        prefix_length: one for all, or [N] or [1].
        lengths: int64 [N], the tokens of each document in this call.
        longest: the model's.

    Raises:
        ValueError: longer than the model's, or than what this call has of the text.
    """
    prefix = torch.as_tensor(prefix_length, device=lengths.device)
    if prefix.is_floating_point() or prefix.ndim > 1 or (prefix.ndim and prefix.shape[0] not in (1, len(lengths))):
        raise ValueError(
            f"prefix_length must be an int, or int64 [{len(lengths)}], one a document; got {prefix_length!r}"
        )
    prefix = prefix.to(torch.int64).expand(len(lengths))
    if torch.compiler.is_compiling():
        return prefix
    if bool(((prefix < 0) | (prefix > longest)).any()):
        raise ValueError(f"prefix_length must be 0 to {longest}, this model's longest; got {prefix.tolist()}")
    if bool((prefix > lengths).any()):
        raise ValueError(
            f"prefix_length {prefix.tolist()}, but this call has {lengths.tolist()} tokens of the texts, and a prefix "
            "is read in one piece: give the whole prefix in the first call (generate: prefill_chunk_size of at least "
            f"{int(prefix.max())} and the pads), or prefix_length=0"
        )
    return prefix
