"""Configurations as YAML files: what a user writes, and the config.yaml of a run."""

from __future__ import annotations

import dataclasses
import difflib
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from ..errors import UsageError
from .config import TrainConfig

PRESET = "preset"  # the one key that is no value of TrainConfig: the name of the preset that the values started from


def read_values(path: Path) -> dict[str, Any]:
    """The values in a YAML file by the names of `TrainConfig`, in its types; keys may have dashes for underscores.

    Raises:
        UsageError: the file cannot be read, or has a key twice, an unknown key or a value of another type.
    """
    try:
        text = path.read_text()
        node, values = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: no UTF-8, or no such date
        raise UsageError(f"config: cannot read {path}: {error}") from error
    if values is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(f"config: {path}: expected keys and values, such as `steps: 1000`, got {values!r}")
    for key, times in Counter(_plain(key.value) for key, _ in node.value).items():
        if times > 1:  # YAML would keep the last one without a word
            raise UsageError(f"config: {path}: {key}: expected once, got {times} values")
    return {_plain(key): _checked(key, value, path) for key, value in values.items()}


def _plain(key: Any) -> str:
    return str(key).replace("-", "_")


def _checked(written: Any, value: Any, path: Path) -> Any:
    key, types = _plain(written), {**get_type_hints(TrainConfig), PRESET: str | None}
    if key not in types:
        close = difflib.get_close_matches(key, types, n=1)
        raise UsageError(f"config: {path} has an unknown key {written!r}{f'; is it {close[0]}?' if close else ''}")
    try:
        return _typed(value, types[key])
    except ValueError as error:
        words = {field.name: str(field.type) for field in dataclasses.fields(TrainConfig)}.get(key, "str")
        expected = "true or false" if words == "bool" else words
        got = "null" if value is None else repr(value)
        raise UsageError(f"config: {path}: {key}: expected {expected}, got {got}") from error


def _typed(value: Any, kind: Any) -> Any:
    """What YAML read, as a value of the type `kind`.

    YAML 1.1 takes the word no for false, and 1e3, which has no point, for text.

    Raises:
        ValueError: it is none.
    """
    origin, choices = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for choice in choices:
            with suppress(ValueError):
                return _typed(value, choice)
    elif origin is Literal:
        word = "no" if value is False else value
        if word in choices:
            return word
    elif origin is tuple:
        if isinstance(value, list) and len(value) == len(choices):
            return tuple(_typed(item, choice) for item, choice in zip(value, choices, strict=True))
    elif kind is NoneType or isinstance(value, bool):
        if type(value) is kind:
            return value
    elif kind is str:
        if isinstance(value, str | int):
            return str(value)
    elif kind is int and isinstance(value, int):
        return value
    elif kind in (int, float) and isinstance(value, int | float | str):
        number = float(value)
        if kind is float or number.is_integer():
            return kind(number)
    raise ValueError


def read_config(path: Path) -> TrainConfig:
    """The configuration in a file, such as the config.yaml of a run.

    Raises:
        UsageError: as `read_values`; or a value is out of its range.
    """
    values = read_values(path)
    values.pop(PRESET, None)
    try:
        return TrainConfig(**values)
    except UsageError as error:
        raise UsageError(f"config: {path}: {error}") from error
