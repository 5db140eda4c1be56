"""Reading a config.json from outside: each value is of its kind and its size is sane, or there is a ValueError."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
"""Names of published tensors, without a leading "model.", and their shapes."""

LARGEST = 1 << 20
"""No width, depth or vocabulary above this is taken from a file; the largest published is 100,280."""


def size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """``config[name]``, an int of 1 to `LARGEST`; null or absent is ``default``, without which it is refused."""
    value = config.get(name)
    if value is None:
        if default is None:
            raise ValueError(f"config.json lacks {name}")
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
        raise ValueError(f"config.json: {name} is {value!r}; it must be a whole number of 1 to {LARGEST:,}")
    return value


def flags(config: Mapping[str, Any], name: str) -> list[int]:
    """``config[name]``, a list of whole numbers."""
    value = config.get(name)
    if not isinstance(value, list) or not all(isinstance(i, int) for i in value):
        raise ValueError(f"config.json: {name} is {value!r}; it must be a list of whole numbers")
    return value


def nested(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """``config[name]``, an object."""
    value = config.get(name)
    if not isinstance(value, Mapping):
        raise ValueError(f"config.json: {name} is {value!r}; it must be an object")
    return value


def refuse_others(config: Mapping[str, Any], supported: Mapping[str, Any]) -> None:
    """Refuse, all in one error, the settings that are there and are not the one supported."""
    others = [
        f"{name} {config[name]!r} (only {value!r} is supported)"
        for name, value in supported.items()
        if name in config and config[name] != value
    ]
    if others:
        raise ValueError(f"config.json asks for what these models do not have: {'; '.join(others)}")


def layer_count(shapes: Shapes, before: str) -> int:
    """How many layers the tensors' names speak of: one more than the largest number after ``before``."""
    numbers = [n[len(before) :].partition(".")[0] for n in shapes if n.startswith(before)]
    return max((int(n) + 1 for n in numbers if n.isdecimal() and len(n) < 7), default=0)


def check_layers(said: int, shapes: Shapes, before: str) -> None:
    """Refuse a depth that is not the file's."""
    found = layer_count(shapes, before)
    if found != said:
        raise ValueError(f"config.json says {said} layers, the tensors are of {found}; is it another model's?")
