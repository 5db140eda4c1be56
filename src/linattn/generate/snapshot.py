"""A state on disk: one safetensors file that knows its model, its tokenizer and how far it has read.

    save_snapshot("book.state", model, reading.state, tokenizer_hash=tokenizer.hash)
    state = load_snapshot("book.state", model, tokenizer_hash=tokenizer.hash).state

The file is judged by its header, before anything of its size is allocated. A loaded state goes on bit by bit as the
saved one would have. Not here: the weights.

    pytest tests/generate -k snapshot
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from linattn.core.config import to_data
from linattn.core.files import write_tensors
from linattn.models import Decoder, ModelState

FORMAT = "linattn.state"
VERSION = 1

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}
_LONGEST_HEADER = 100_000_000  # bytes; safetensors reads no longer one
_SAMPLES = 64  # numbers of each tensor in weights_hash


class Leaf(NamedTuple):
    """One tensor of a table: its shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Snapshot:
    """What a file held."""

    state: ModelState
    """On the model's device."""
    tokenizer_hash: str | None
    """Of the tokenizer whose ids were read, where it was given."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Whatever text was saved beside it."""


def model_hash(model: nn.Module) -> str:
    """16 hex digits that name a model by its configuration and its tensors' names, shapes and dtypes, not its weights.

    Two checkpoints of one training run share it.
    """
    config = getattr(model, "config", None)
    table = sorted([name, list(x.shape), str(x.dtype)] for name, x in model.state_dict().items())
    text = json.dumps([None if config is None else to_data(config), table], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_hash(model: nn.Module) -> str:
    """16 hex digits of up to 64 evenly spaced numbers of each tensor: enough to tell two checkpoints apart, in
    milliseconds."""
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        flat = x.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].cpu().contiguous()
        digest.update(name.encode() + some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def save_snapshot(
    path: str | Path,
    model: Decoder,
    state: ModelState,
    tokenizer_hash: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write ``state`` of ``model`` to ``path``, beside it first and then renamed: a file of that name stays whole.

    Args:
        tokenizer_hash: of the tokenizer whose ids were read.
        metadata: text to keep with it.

    Raises:
        ValueError: a state that is not this model's, metadata that is not text, or no such folder.
        OSError: the disk is full or refuses; what ``path`` held before is untouched.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}; make it first")
    metadata = dict(metadata or {})
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise ValueError(f"metadata must be text by text, got {metadata!r}")
    tensors = _tensors(state)
    _check_table(model, {n: Leaf(tuple(x.shape), x.dtype) for n, x in tensors.items()}, "the state to save")
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "model": model_hash(model),
        "weights": weights_hash(model),
        "dtype": str(next(model.parameters()).dtype),
        "tokenizer": tokenizer_hash or "",
        "tokens": json.dumps(state.tokens.tolist()),
        "metadata": json.dumps(metadata),
    }
    # Copies: rows of a batch share memory, and safetensors refuses tensors that do.
    own = {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()}
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_tensors(beside, own, header)
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        beside.replace(path)
    except OSError as error:
        raise OSError(
            f"{path}: the snapshot could not be written ({error}); what was there before is untouched. "
            f"It needs {sum(x.nbytes for x in own.values()):,} bytes: free some space, or choose another disk"
        ) from error
    finally:
        beside.unlink(missing_ok=True)


def load_snapshot(path: str | Path, model: Decoder, tokenizer_hash: str | None = None) -> Snapshot:
    """The state in ``path``, for ``model``.

    Args:
        tokenizer_hash: of the tokenizer to go on with; checked where the file names one too.

    Raises:
        ValueError: no such file, not a snapshot, cut short, or of another model, other weights or another tokenizer;
            with both hashes and the fix.
    """
    path = Path(path)
    table, header = _read_header(path)
    if header.get("format") != FORMAT:
        raise ValueError(f"{path}: a safetensors file, but not a snapshot; write one with save_snapshot")
    if header.get("version") != str(VERSION):
        raise ValueError(
            f"{path}: a snapshot of format {header.get('version')}, and this version of linattn reads {VERSION}; "
            "read the text again, or use the version that wrote it"
        )
    again = "use the one that wrote it, or read the text again"
    dtype = str(next(model.parameters()).dtype)
    if header.get("dtype", dtype) != dtype:
        raise ValueError(
            f"{path}: read with weights of {header['dtype']}, and the model given here has {dtype}; load it in the "
            "same dtype, or read the text again"
        )
    _same(path, "model", header.get("model"), model_hash(model), f"another architecture; {again}")
    _same(path, "weights", header.get("weights"), weights_hash(model), f"the same model with other weights; {again}")
    stored = header.get("tokenizer") or None
    if stored is not None and tokenizer_hash is not None:
        _same(path, "tokenizer", stored, tokenizer_hash, f"other ids for the same text; {again}")
    _check_table(model, table, str(path))
    try:
        tensors = load_file(path, device=str(model.embedding.weight.device))
        metadata = json.loads(header.get("metadata", "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: the snapshot is damaged ({error}); read the text again") from error
    state = _state(model, tensors)
    _check_counts(model, state, path)
    return Snapshot(state, stored, metadata)


def _name(layer: int, leaf: str) -> str:
    return f"layers.{layer}.{leaf}"


def _tensors(state: ModelState) -> dict[str, torch.Tensor]:
    """Every tensor of a state by name."""
    named = {
        _name(i, leaf): x for i, layer in enumerate(state.layers) for leaf, x in zip(layer._fields, layer, strict=True)
    }
    return {"tokens": state.tokens, **named}


def _state(model: Decoder, tensors: Mapping[str, torch.Tensor]) -> ModelState:
    """The state of named tensors."""
    layers = (
        type(empty)(*(tensors[_name(i, leaf)] for leaf in empty._fields))
        for i, empty in enumerate(model.identity(1).layers)
    )
    return ModelState(tensors["tokens"], tuple(layers))


def _same(path: Path, what: str, stored: str | None, own: str, meaning: str) -> None:
    if stored != own:
        raise ValueError(f"{path}: its {what} hash is {stored}, the one given here has {own}: {meaning}")


def _check_table(model: Decoder, table: Mapping[str, Leaf], where: str) -> None:
    """Refuse tensors that are not those of a state of ``model``; values are not looked at."""
    empty = model.identity(1)
    want = _tensors(empty)
    missing, extra = sorted(want.keys() - table.keys()), sorted(table.keys() - want.keys())
    if missing or extra:
        raise ValueError(f"{where}: not a state of this model; missing are {missing[:4]}, unknown are {extra[:4]}")
    rows = table["tokens"].shape[0] if len(table["tokens"].shape) == 1 else 0
    if rows < 1:
        raise ValueError(f"{where}: tokens must be [N] with N at least 1, got {list(table['tokens'].shape)}")
    _check_leaf(table["tokens"], Leaf((rows,), torch.int64), "N", "tokens", where)
    for i, (axes, layer) in enumerate(zip(_state_axes(model), empty.layers, strict=True)):
        caches: set[int] = set()
        for leaf, x in zip(layer._fields, layer, strict=True):
            name = _name(i, leaf)
            _check_leaf(table[name], Leaf((rows, *x.shape[1:]), x.dtype), axes[leaf], name, where)
            caches |= {n for letter, n in zip(axes[leaf], table[name].shape, strict=True) if letter == "L"}
        if len(caches) > 1:
            raise ValueError(f"{where}: layer {i} holds keys and values of different numbers of tokens, {caches}")


def _state_axes(model: Decoder) -> list[Mapping[str, str]]:
    """Each layer's `Mixer.state_axes`."""
    blocks: Any = model.blocks
    return [block.mixer.mixer.state_axes for block in blocks]


def _check_leaf(got: Leaf, want: Leaf, axes: str, name: str, where: str) -> None:
    # L, the tokens that a cache holds, is what it is; all other axes belong to the model.
    sizes = [g if letter == "L" else w for letter, g, w in zip(axes, got.shape, want.shape, strict=False)]
    if len(got.shape) != len(want.shape) or list(got.shape) != sizes:
        raise ValueError(f"{where}: {name} is {list(got.shape)}, and this model's would be {sizes}")
    # Under autocast copied keys and values are narrower than the weights.
    narrower = got.dtype.is_floating_point and want.dtype.is_floating_point and got.dtype.itemsize < want.dtype.itemsize
    if got.dtype != want.dtype and not narrower:
        raise ValueError(f"{where}: {name} is {got.dtype}, and this model's would be {want.dtype}")


def _check_counts(model: Decoder, state: ModelState, path: Path) -> None:
    """Refuse counts that point outside their tensors: kernels trust them."""
    wrong = bool((state.tokens < 0).any())
    for axes, layer in zip(_state_axes(model), state.layers, strict=True):
        if "count" in layer._fields:
            # Rows that are counted lie along L (a cache) or W (a window, a filter), of the first leaf and all others.
            most = layer[0].shape[max(axes[layer._fields[0]].find(letter) for letter in "LW")]
            wrong |= bool(((layer.count < 0) | (layer.count > most)).any())
    if wrong:
        raise ValueError(f"{path}: the snapshot's counts do not fit its tensors, so it is damaged; read the text again")


def _read_header(path: Path) -> tuple[dict[str, Leaf], dict[str, str]]:
    """The tensor table and the metadata of a safetensors file whose size agrees with them; reads the header only."""
    if not path.is_file():
        raise ValueError(f"{path}: no such snapshot file; write one with save_snapshot")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _LONGEST_HEADER:
            raise ValueError(f"{path}: not a safetensors file ({size} bytes); give a file that save_snapshot wrote")
        if 8 + length > size:
            raise ValueError(f"{path}: cut short, its header of {length} bytes is longer than the file of {size}")
        raw = file.read(length)
    try:
        entries: dict[str, Any] = json.loads(raw)
        metadata = dict(entries.pop("__metadata__", {}))
        table = {name: Leaf(tuple(e["shape"]), _DTYPES[e["dtype"]]) for name, e in entries.items()}
        needed = {name: leaf.dtype.itemsize * math.prod(leaf.shape) for name, leaf in table.items()}
        offsets = {name: tuple(e["data_offsets"]) for name, e in entries.items()}
        agree = all(end - start == needed[name] for name, (start, end) in offsets.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: its header is not one of safetensors ({error!r}); read the text again") from error
    if not agree:
        raise ValueError(f"{path}: its header contradicts itself, shapes and offsets differ; read the text again")
    whole = 8 + length + sum(needed.values())
    if size != whole:
        fault = "cut short" if size < whole else "longer than its header says"
        raise ValueError(f"{path}: {fault}, {size:,} bytes instead of {whole:,}; copy it or read the text again")
    return table, metadata
