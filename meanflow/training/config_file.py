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
from ..files import is_text, read_text, shown
from .config import TrainConfig

PRESET = "preset"  # the one key that is no value of TrainConfig: the name of the preset that the values started from


def read_values(path: Path) -> dict[str, Any]:
    """The values in a YAML file by the names of `TrainConfig`, in its types; keys may have dashes for underscores.

    Raises:
        UsageError: the file cannot be read, or has a key twice, an unknown key or a value of another type.
    """
    try:
        node = _composed(read_text(path))
    except (OSError, ValueError) as error:
        raise UsageError(f"config: cannot read {path}: {error}") from error
    try:
        return {key: _checked(key, value, path) for key, value in _values(node).items()}
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"config: {path}: {error}") from error


def _composed(text: str) -> yaml.Node | None:
    """YAML as nodes, nothing of which is built yet; a ValueError names line and column."""
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(where + " ".join(word for word in (error.context, error.problem) if word)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"line {line}: unexpected character {chr(error.character)!r}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except yaml.YAMLError as error:
        raise ValueError(shown(str(error))) from error
    finally:
        if loader is not None:
            loader.dispose()


def _values(node: yaml.Node | None) -> dict[str, Any]:
    """Keys and values of a YAML file, each a word or a list of words; a ValueError says what it is otherwise."""
    if node is None or node.tag == "tag:yaml.org,2002:null":
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"expected keys and values, such as `steps: 1000`, got {_words(node)}")
    for written, _ in node.value:
        if not isinstance(written, yaml.ScalarNode):
            raise ValueError(f"line {written.start_mark.line + 1}: expected a key, got {_words(written)}")
    for key, times in Counter(_plain(written.value) for written, _ in node.value).items():
        if times > 1:  # YAML would keep the last one without a word
            raise ValueError(f"{key}: expected once, got {times} values")
    return {_plain(written.value): _value(written.value, value) for written, value in node.value}


def _value(key: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return [_value(key, item) for item in node.value]
    where = f"line {node.start_mark.line + 1}: {key}"
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"{where}: expected a value or a list of values, got {_words(node)}")
    try:
        value = yaml.constructor.SafeConstructor().construct_document(node)
    # no such date or number, or a tag that YAML has not, or that does not fit the word
    except (ValueError, OverflowError, LookupError, AttributeError, yaml.YAMLError) as error:
        said = getattr(error, "problem", None) or error
        raise ValueError(f"{where}: expected a value, got {_words(node)}: {said}") from error
    if isinstance(value, str) and not is_text(value):
        raise ValueError(f"{where}: expected text, got {shown(value)}")
    return value


def _words(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return shown(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "keys"


def _plain(key: str) -> str:
    return key.replace("-", "_")


def _checked(key: str, value: Any, path: Path) -> Any:
    types = {**get_type_hints(TrainConfig), PRESET: str | None}
    if key not in types:
        close = difflib.get_close_matches(key, types, n=1)
        raise UsageError(f"config: {path} has an unknown key {shown(key)}{f'; is it {close[0]}?' if close else ''}")
    try:
        return _typed(value, types[key])
    except (ValueError, OverflowError) as error:
        words = {field.name: str(field.type) for field in dataclasses.fields(TrainConfig)}.get(key, "str")
        expected = "true or false" if words == "bool" else words
        got = "null" if value is None else shown(value)
        raise UsageError(f"config: {path}: {key}: expected {expected}, got {got}") from error


def _typed(value: Any, kind: Any) -> Any:
    """What YAML read, as a value of the type `kind`.

    YAML 1.1 takes the word no for false, and 1e3, which has no point, for text.

    Raises:
        ValueError, OverflowError: it is none.
    """
    origin, choices = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for choice in choices:
            with suppress(ValueError, OverflowError):
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
