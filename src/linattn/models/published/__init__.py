"""Published checkpoints: a folder as its authors released it, to a ModelConfig and the weights of `models.Decoder`.

Read are Based, JRT-RNN and the attention baseline of hazyresearch, TransNormerLLM of OpenNLPLab (docs/checkpoints.md
lists them), and what `linattn export` wrote. Nothing in the folder is imported or run, and transformers is not needed.

    pytest tests/hf/test_convert.py
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linattn.core.files import read_json
from linattn.models import JRTConfig, ModelConfig, TransNormerConfig, build_model
from linattn.models.published import exported, hazyresearch, opennlplab
from linattn.models.published.fields import Shapes
from linattn.models.published.files import Found, read_headers, read_tensors, weight_files

FAMILIES = (exported, hazyresearch, opennlplab)
"""Modules with one set of names.

    claims(config)          whether a config.json is this family's
    read(config, shapes)    the ModelConfig of a config.json and the shapes of the tensors beside it
    published(name)         what the tensor that is called ``name`` here is called there, without a leading "model."
    DROPPED, PREFIX         patterns of names that are no weights; what the authors' own files begin names with
"""

CONFIG = "config.json"
EMBEDDING, HEAD = "embedding.weight", "lm_head.weight"

CONV = ".conv.conv.weight"
"""Filters that are a Conv1d's weight there: [C, 1, K], the last tap on the current token."""

MOST_PADDING = 128
"""Fewer rows of an embedding than this beyond the vocabulary are padding, which is cut or filled to what we pad to."""

MAMBA = (
    "is a Mamba checkpoint, and linattn has no Mamba: load it with transformers' MambaForCausalLM or "
    "Mamba2ForCausalLM (docs/checkpoints.md)"
)


class Plan(NamedTuple):
    """What a folder holds: its model, and for each tensor of ours the published name and shape."""

    config: ModelConfig
    names: dict[str, str]
    shapes: dict[str, tuple[int, ...]]


def load_published(path: str | Path, dtype: torch.dtype | None = None) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The configuration and the state dict of a published checkpoint in the folder ``path``.

    Args:
        path: a folder with config.json and model.safetensors or pytorch_model.bin, sharded or not.
        dtype: of the weights; None keeps the file's (the widest, if there are several).

    Returns:
        The model's configuration, and the tensors of ``build_model(config).state_dict()`` by name, on the CPU.

    Raises:
        ValueError: a checkpoint of another kind, a damaged file, or tensors that are unknown, missing or of a wrong
            shape: all of them in one error. Names and shapes are compared before any memory is taken.
    """
    folder = Path(path)
    config, found = _read_folder(folder)
    try:
        plan = plan_published(config, {name: entry.shape for name, entry in found.items()})
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    odd = [name for name, entry in found.items() if entry.dtype is None]
    if odd:
        raise ValueError(f"{folder}: {_some(odd)} of no floating-point dtype; these are no weights")
    stored = {entry.dtype for entry in found.values() if entry.dtype is not None}
    state = _read_state(found, plan, dtype or reduce(torch.promote_types, stored))
    head = state.pop(HEAD, None)
    if head is not None and not torch.equal(head, state[EMBEDDING]):
        raise ValueError(f"{folder}: {HEAD} is not the embedding's tensor; models with two are not read")
    return plan.config, state


def to_published(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back: a state dict of ours under the published names, the short convolutions as Conv1d weights [C, 1, K].

    Padded vocabularies keep our padding. There is no config.json: the published ones name Python classes.
    """
    family = opennlplab if isinstance(config, TransNormerConfig) else hazyresearch
    theirs = {family.PREFIX + family.published(ours): x for ours, x in state.items()}
    return {name: x.unsqueeze(1) if name.endswith(CONV) else x for name, x in theirs.items()}


def is_published(folder: Path) -> bool:
    """Whether ``folder`` holds a config.json of one of the families, or of a Mamba, and not one of linattn's own."""
    path = folder / CONFIG
    if not path.is_file():
        return False
    config = read_json(path)
    return isinstance(config, dict) and (_is_mamba(config, ()) or any(family.claims(config) for family in FAMILIES))


def plan_published(config: Mapping[str, Any], shapes: Shapes) -> Plan:
    """What a config.json and the shapes of the tensors beside it (names without "model.") are here; reads no file.

    Raises:
        ValueError: another kind of checkpoint, or names and shapes that are not its model's, all of them.
    """
    if _is_mamba(config, shapes):
        raise ValueError(MAMBA)
    family = next((family for family in FAMILIES if family.claims(config)), None)
    if config.get("type") == "ModelCard":
        raise ValueError("is a checkpoint of linattn's own already, and every verb reads it as it is")
    if family is None:
        raise ValueError(
            f"config.json (model_type {config.get('model_type')!r}) is none of the checkpoints that linattn reads: "
            "hazyresearch's based, JRT and attn, OpenNLPLab's TransNormerLLM, or linattn's own export"
        )
    model = family.read(config, shapes)
    with torch.device("meta"):
        ours = {name: tuple(x.shape) for name, x in build_model(model).state_dict().items()}
    plan = Plan(model, {name: family.published(name) for name in ours}, ours)
    problems = _problems(plan, shapes, padded=not isinstance(model, JRTConfig))
    if problems:
        raise ValueError("the tensors are not the model's of config.json:\n  " + "\n  ".join(problems))
    return plan


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Found]]:
    """config.json, and the tensors by published name without "model."; what is no weight is left out."""
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG}: holds a {type(config).__name__}, not an object")
    files = weight_files(folder)
    if not files:
        raise ValueError(f"{folder}: holds no model.safetensors and no pytorch_model.bin; copy the folder again")
    family = next((f for f in FAMILIES if f.claims(config)), None)
    dropped = re.compile("|".join(family.DROPPED) if family else "(?!)")
    found: dict[str, Found] = {}
    for entry in read_headers(files):
        # Checkpoints of older training code spell one folder of the convolution's name with a 1.
        name = entry.key.removeprefix("model.").replace(".conv1.", ".conv.")
        if dropped.fullmatch(name):
            continue
        if name in found:
            raise ValueError(f"{folder}: {found[name].key} and {entry.key} are both {name} ({entry.file.name})")
        found[name] = entry
    # Writers that keep a shared tensor once may keep it under the head's name.
    if family and HEAD in found and family.published(EMBEDDING) not in found:
        found[family.published(EMBEDDING)] = found.pop(HEAD)
    return config, found


def _read_state(found: Mapping[str, Found], plan: Plan, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors by our names, in our order, and the head under its own if the file has one."""
    names = {theirs: ours for ours, theirs in plan.names.items()} | {HEAD: HEAD}
    shapes = plan.shapes | {HEAD: plan.shapes[EMBEDDING]}
    order = sorted(found, key=lambda name: found[name].file)
    tensors = read_tensors([found[name] for name in order])
    state = {names[name]: _as_ours(x, shapes[names[name]], dtype) for name, x in zip(order, tensors, strict=True)}
    return {ours: state[ours] for ours in shapes if ours in state}


def _problems(plan: Plan, shapes: Shapes, padded: bool) -> list[str]:
    want = {theirs: plan.shapes[ours] for ours, theirs in plan.names.items()}
    embedding = plan.names[EMBEDDING]
    problems = [f"missing: {name} {list(shape)}" for name, shape in want.items() if name not in shapes]
    problems += [f"unknown: {n} {list(s)}" for n, s in shapes.items() if n not in want and n != HEAD]
    for name, shape in shapes.items():
        target = want[embedding] if name == HEAD else want.get(name)
        if target is None:
            continue
        if name in (embedding, HEAD) and padded:
            least, width = plan.config.vocab_size, target[1]
            if len(shape) != 2 or shape[1] != width or not least <= shape[0] < least + MOST_PADDING:
                problems.append(f"misshapen: {name} {list(shape)}, expected [{least} and padding, {width}]")
        elif shape != (expected := _their_shape(name, target)):
            problems.append(f"misshapen: {name} {list(shape)}, expected {list(expected)}")
    return problems


def _their_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], 1, shape[1]) if name.endswith(CONV) else shape


def _as_ours(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A copy in our shape and ``dtype``: without the 1 of a Conv1d's weight, rows of padding cut or filled with 0."""
    if tensor.ndim == 3 and len(shape) == 2:
        tensor = tensor.squeeze(1)
    copy = torch.zeros(shape, dtype=dtype)
    rows = min(len(tensor), shape[0])
    copy[:rows] = tensor[:rows]
    return copy


def _is_mamba(config: Mapping[str, Any], names: Iterable[str]) -> bool:
    mamba = "ssm_cfg" in config or str(config.get("model_type")).startswith("mamba")
    return mamba or any(name.endswith(".A_log") for name in names)


def _some(names: list[str]) -> str:
    return f"{len(names)} tensors ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
