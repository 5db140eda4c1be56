"""Configuration: frozen dataclasses, as plain data and back.

A configuration is a frozen dataclass beside what it configures. This file turns one into JSON or YAML data and back
again, checking every name and type, so that a file from outside cannot set what the dataclass does not declare.
A field typed as a base class takes the concrete class from the key ``type`` (a class name among the declared ones).
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

C = TypeVar("C")


def to_data(config: Any) -> Any:
    """The configuration as dicts, lists, strings, numbers, booleans and None: what JSON and YAML can hold.

    A dataclass becomes a dict whose first key, ``type``, is its class name.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {f.name: to_data(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"type": type(config).__name__, **fields}
    if isinstance(config, list | tuple):
        return [to_data(item) for item in config]
    if isinstance(config, Mapping):
        return {str(key): to_data(value) for key, value in config.items()}
    if config is None or isinstance(config, str | int | float | bool):
        return config
    raise ValueError(f"a configuration holds plain values, not {type(config).__name__}: {config!r}")


def from_data(kind: type[C], data: Any, where: str = "config") -> C:
    """Build a ``kind`` from the data of `to_data`.

    Raises:
        ValueError: an unknown key (the closest known one is named), a missing one, or a value of the wrong type.
    """
    return _build(kind, data, where)


def require_positive(config: Any, *may_be_zero: str) -> None:
    """Refuse a size below 1: every field that is an int, and not None or a bool; below 0 for those named.

    Raises:
        ValueError: with the field and its value.
    """
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        least = 0 if f.name in may_be_zero else 1
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            raise ValueError(f"{type(config).__name__}.{f.name} is {value}; it must be at least {least}")


def config_hash(config: Any) -> str:
    """The first 16 hex digits of the SHA-256 of the configuration's canonical JSON."""
    text = json.dumps(to_data(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _build(kind: Any, data: Any, where: str) -> Any:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _build_union(get_args(kind), data, where)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, data, where)
    if origin is typing.Literal:
        if data not in get_args(kind):
            raise ValueError(f"{where}: {data!r} is not one of {list(get_args(kind))}")
        return data
    if origin in (tuple, list):
        return _build_sequence(kind, origin, data, where)
    if kind is Any:
        return data
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if kind is type(None) and data is None:
        return None
    if isinstance(kind, type) and isinstance(data, kind) and not (kind is int and isinstance(data, bool)):
        return data
    name = getattr(kind, "__name__", str(kind))
    raise ValueError(f"{where}: expected {name}, got {type(data).__name__} {data!r}")


def _build_sequence(kind: Any, origin: Any, data: Any, where: str) -> Any:
    if not isinstance(data, list | tuple):
        raise ValueError(f"{where}: expected a list, got {type(data).__name__} {data!r}")
    args = get_args(kind)
    if origin is tuple and args and args[-1] is not Ellipsis:
        if len(args) != len(data):
            raise ValueError(f"{where}: expected {len(args)} items, got {len(data)}")
        return tuple(_build(a, item, f"{where}[{i}]") for i, (a, item) in enumerate(zip(args, data, strict=True)))
    item_kind = args[0] if args else Any
    return origin(_build(item_kind, item, f"{where}[{i}]") for i, item in enumerate(data))


def _build_union(kinds: tuple[Any, ...], data: Any, where: str) -> Any:
    if isinstance(data, Mapping) and "type" in data:
        named = [k for k in kinds if getattr(k, "__name__", None) == data["type"]]
        if named:
            return _build_dataclass(named[0], data, where)
        known = [k.__name__ for k in kinds if dataclasses.is_dataclass(k) and isinstance(k, type)]
        raise ValueError(f"{where}: type {data['type']!r} is not one of {known}")
    reasons = []
    for kind in kinds:
        try:
            return _build(kind, data, where)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError("; or ".join(dict.fromkeys(reasons)))


def _build_dataclass(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: expected the fields of {kind.__name__}, got {type(data).__name__} {data!r}")
    named = data.get("type", kind.__name__)
    if named != kind.__name__:
        raise ValueError(f"{where}: expected a {kind.__name__}, got a {named}")
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    for key in data:
        if key != "type" and key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; it has {sorted(fields)}"
            raise ValueError(f"{where}: {kind.__name__} has no field {key!r}{hint}")
    missing = [
        name
        for name, f in fields.items()
        if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where}: {kind.__name__} needs {missing}")
    values = {name: _build(hints[name], data[name], f"{where}.{name}") for name in fields if name in data}
    return kind(**values)
