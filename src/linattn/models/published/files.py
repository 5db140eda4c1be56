"""The tensors of a folder, in safetensors or in torch's .bin, in one file or in shards with an index.

Names, shapes and dtypes come from the files' headers; weights are read one tensor at a time, when they are asked for.
A .bin is read with ``weights_only``: torch's reader of tensors, which runs nothing that the file says.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from linattn.core.files import DTYPES, read_json

KINDS = (("model.safetensors", ".safetensors"), ("pytorch_model.bin", ".bin"))
"""The file that holds all weights, and what the names of shards end in; the first kind that a folder has is read."""


class Found(NamedTuple):
    """A tensor in a file: where, under which name there, its shape, and its dtype (None: no dtype of weights)."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the folder's weights; [] if there are none.

    Raises:
        ValueError: a damaged index, one that names a file outside the folder, or one that is missing.
    """
    for whole, suffix in KINDS:
        index = folder / (whole + ".index.json")
        if index.is_file():
            return _shards(index, suffix)
        if (folder / whole).is_file():
            return [folder / whole]
    return []


def read_headers(files: list[Path]) -> list[Found]:
    """Every tensor of the files; no weights are read.

    Raises:
        ValueError: a file that is damaged, or holds anything but tensors by name.
    """
    return [found for file in files for found in _header(file)]


def read_tensors(found: list[Found]) -> Iterator[Tensor]:
    """The tensors, in order, each once in memory; those of one file should stand side by side.

    Raises:
        ValueError: a damaged file.
    """
    for file, entries in groupby(found, key=lambda entry: entry.file):
        tensors = _opened(file, "cpu")
        for entry in entries:
            yield tensors[entry.key] if isinstance(tensors, dict) else tensors.get_tensor(entry.key)


def _shards(index: Path, suffix: str) -> list[Path]:
    data = read_json(index)
    places = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(n, str) for n in places.values()):
        raise ValueError(f"{index}: has no weight_map of names to files; copy the folder again")
    names = sorted(set(places.values()))
    strays = [n for n in names if not _is_plain(n) or not n.endswith(suffix)]
    if strays:
        raise ValueError(f"{index}: names {strays[:4]}; shards are *{suffix} files of the same folder")
    lost = [n for n in names if not (index.parent / n).is_file()]
    if lost:
        raise ValueError(f"{index}: names {lost[:4]}, which are missing; copy the folder again")
    return [index.parent / n for n in names]


def _is_plain(name: str) -> bool:
    # By its letters alone: in the hub's cache every file is a link to elsewhere, so that resolving would say nothing.
    return PurePosixPath(name).name == PureWindowsPath(name).name == name


def _header(file: Path) -> list[Found]:
    if file.suffix == ".safetensors":
        with _opened(file, "cpu") as handle:
            slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 (not a dict)
        return [Found(file, k, tuple(s.get_shape()), DTYPES.get(s.get_dtype())) for k, s in slices.items()]
    tensors, held = _opened(file, "meta"), file.stat().st_size
    for key, x in tensors.items():
        # A view with strides of 0 may claim any shape; the memory it would take is not in the file.
        if isinstance(x, Tensor) and x.numel() * x.element_size() > held:
            raise ValueError(f"{file}: {key} claims shape {list(x.shape)}, more than the {held:,} bytes of the file")
    return [Found(file, key, *_kind(x)) for key, x in tensors.items()]


def _kind(x: Any) -> tuple[tuple[int, ...], torch.dtype | None]:
    if not isinstance(x, Tensor):
        return (), None
    return tuple(x.shape), x.dtype if x.dtype in DTYPES.values() else None


def _opened(file: Path, device: str) -> Any:
    """A dict of tensors (.bin; mapped into memory, or of no memory on meta), or safetensors' handle."""
    again = "copy it again"
    try:
        if file.suffix == ".safetensors":
            return safe_open(file, framework="pt")
        data = torch.load(file, map_location=device, mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file}: holds more than tensors, and linattn reads only tensors") from error
    except (SafetensorError, RuntimeError, EOFError, OSError, LookupError, TypeError, AttributeError) as error:
        if "mmap can only be used" in str(error):
            again = "it is no .bin of torch 1.6 or newer: load and save it once more with torch, or copy it again"
        raise ValueError(
            f"{file}: cut short or no file of tensors ({str(error).partition(chr(10))[0]}); {again}"
        ) from error
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ValueError(f"{file}: holds a {type(data).__name__}, not tensors by name; give a state dict")
    return data
