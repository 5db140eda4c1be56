"""A model on disk: model.safetensors beside config.json (and tokenizer.json if it has one). Nothing is unpickled.

Names, shapes and dtypes are checked against the file's header before any memory is taken.

    python -c "from linattn.train import load_model; print(load_model('runs/debug-cpu')[0])"
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from linattn.core.config import from_data, to_data
from linattn.core.files import DTYPES, read_json, write_tensors, write_text
from linattn.data import Tokenizer, load_tokenizer
from linattn.data.meta import TokenizerMeta
from linattn.models import Decoder, ModelConfig, build_model
from linattn.train.folder import write_folder

WEIGHTS, CARD = "model.safetensors", "config.json"


@dataclass(frozen=True)
class ModelCard:
    """config.json: what model.safetensors holds, and the tokenizer it was trained with, if that is known."""

    model: ModelConfig
    tokenizer: TokenizerMeta | None = None


def load_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[Decoder, ModelConfig]:
    """A trained model, in evaluation mode, and its configuration.

    Args:
        path: a checkpoint, an export, or a run's folder, which gives its newest checkpoint.
        device: where the weights go.
        dtype: of the weights; None keeps the file's.

    Raises:
        ValueError: no model there, a damaged file, or tensors that are not the configuration's; each is named.
    """
    folder = model_folder(path)
    config = read_card(folder).model
    model = meta_model(config)
    stored = check_tensors(folder / WEIGHTS, model.state_dict())
    model = model.to(dtype or stored).to_empty(device=device)
    read_into(folder / WEIGHTS, model.state_dict())
    return model.eval(), config


def load_model_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of the model at ``path`` (as in `load_model`); its hash is checked.

    Raises:
        ValueError: none is known, or the file is another tokenizer's.
    """
    folder = model_folder(path)
    made = read_card(folder).tokenizer
    if made is None:
        raise ValueError(f"{folder / CARD}: names no tokenizer; load one by its path instead")
    tokenizer = (
        load_tokenizer("bytes") if made.spec == "bytes" else load_tokenizer(folder / made.spec, eos=made.eos_token)
    )
    if tokenizer.hash != made.hash:
        raise ValueError(
            f"{folder / made.spec}: tokenizer hash {tokenizer.hash}, the model was trained with {made.hash}"
        )
    return tokenizer


def export(path: str | Path, out: str | Path) -> None:
    """Copy the model at ``path`` alone, without the optimizer and the run, to the new folder ``out``.

    Raises:
        ValueError: no model at ``path``, or ``out`` exists.
    """
    folder, out = model_folder(path), Path(out)
    if out.exists():
        raise ValueError(f"{out}: exists; give another folder")
    card = read_card(folder)
    check_tensors(folder / WEIGHTS, meta_model(card.model).state_dict())
    names = [WEIGHTS, CARD, *([card.tokenizer.spec] if card.tokenizer and card.tokenizer.spec != "bytes" else [])]

    def write(to: Path) -> None:
        for name in names:
            shutil.copyfile(folder / name, to / name)

    write_folder(out, write)


def write_model(model: Decoder, card: ModelCard, folder: Path, tokenizer: Tokenizer | None) -> None:
    """Write model.safetensors, config.json and the tokenizer's file into ``folder``."""
    write_tensors(folder / WEIGHTS, model.state_dict())
    write_json(folder / CARD, to_data(card))
    if tokenizer is not None:
        tokenizer.save(folder)


def model_folder(path: str | Path) -> Path:
    """The folder that holds model.safetensors: ``path``, or its newest checkpoint.

    Raises:
        ValueError: there is none.
    """
    folder = Path(path)
    if (folder / WEIGHTS).is_file() and (folder / CARD).is_file():
        return folder
    steps = checkpoints(folder)
    if steps:
        return steps[-1]
    raise ValueError(
        f"{folder}: holds no {WEIGHTS} with a {CARD}, and no checkpoint step-*; give a run or a checkpoint"
    )


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first. A folder gets its name only once it is complete."""
    found = [p for p in run.glob("step-*") if p.name[5:].isdigit() and p.is_dir()] if run.is_dir() else []
    return sorted(found, key=lambda p: int(p.name[5:]))


def read_card(folder: Path) -> ModelCard:
    """config.json of ``folder``."""
    path = folder / CARD
    return from_data(ModelCard, read_json(path), where=str(path))


def meta_model(config: ModelConfig) -> Decoder:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return build_model(config)


def check_tensors(path: Path, expected: Mapping[str, Tensor], exact: bool = False) -> torch.dtype:
    """Compare the header of a safetensors file with the tensors it should hold; reads no weights.

    Args:
        path: the file.
        expected: by name; their shapes count, and their dtypes if ``exact`` (else any one floating dtype will do).

    Returns:
        The dtype of the file's tensors (the first's, if exact).

    Raises:
        ValueError: a damaged file; tensors that are missing, too many, of another shape or dtype, by name.
    """
    with _opened(path) as handle:
        header = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
        found = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in header.items()}
    missing, extra = sorted(expected.keys() - found), sorted(found.keys() - expected.keys())
    if missing:
        raise ValueError(f"{path}: lacks {_some(missing)}; is config.json another model's?")
    if extra:
        raise ValueError(f"{path}: has {_some(extra)}, which the model lacks; is config.json another model's?")
    first = next(iter(found.values()))[1]
    for name, (shape, dtype) in found.items():
        want = expected[name]
        if shape != tuple(want.shape):
            raise ValueError(f"{path}: {name} has shape {list(shape)}, the configuration needs {list(want.shape)}")
        if exact and DTYPES.get(dtype, _INTEGERS.get(dtype)) != want.dtype:
            raise ValueError(f"{path}: {name} is {dtype}, expected {want.dtype}")
        if not exact and (dtype not in DTYPES or dtype != first):
            raise ValueError(f"{path}: {name} is {dtype}; all tensors must be of one dtype of {list(DTYPES)}")
    return DTYPES.get(first, torch.float32)


_INTEGERS = {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def read_into(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Copy a checked file into existing tensors of the same names."""
    with _opened(path) as handle, torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(handle.get_tensor(name))


def write_json(path: Path, data: Any) -> None:
    """Write JSON for people and machines."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: is missing; copy the folder again")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: cut short or no safetensors file ({error}); copy it again") from error


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{len(names)} tensors ({shown}{', ...' if len(names) > 4 else ''})"
