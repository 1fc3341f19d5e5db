"""Configurations as YAML files: what a user writes, and the config.yaml of a run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from .config import Config, Trust, check_code, merged, words_in
from .errors import UsageError
from .files import is_text, read_text, shown
from .options import flattened

_DEEPEST = 4  # groups within groups
PRESET = "preset"  # the one key that is no option: the name of the recipe that the values started from


def read_values(path: Path, trust: Trust = False) -> dict[str, Any]:
    """The values in a YAML file by their flat names; keys may have dashes for underscores, and stand in groups.

    Args:
        trust: whether code that the file names, such as "package.module:function", may be imported; or the names that
            may.

    Raises:
        UsageError: the file cannot be read, has a key twice, or names code that is not trusted.
    """
    try:
        node = _composed(read_text(path))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}", field="config") from error
    try:
        values = _values(node)
        check_code(words_in(values), path, trust)
        return flattened(Config, values)
    except UsageError as error:
        raise error if error.field is None else UsageError(f"{path}: {error}", field="config") from error
    except ValueError as error:
        raise UsageError(f"{path}: {error}", field="config") from error


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


def _values(node: yaml.Node | None, depth: int = 0) -> dict[str, Any]:
    """Keys and values of a YAML file: words, lists of words and groups; a ValueError says what else it is."""
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
    if depth > _DEEPEST:
        raise ValueError("it is nested too deeply")
    return {_plain(written.value): _value(written.value, value, depth) for written, value in node.value}


def _value(key: str, node: yaml.Node, depth: int) -> Any:
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return [_value(key, item, depth) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return _values(node, depth + 1)
    where = f"line {node.start_mark.line + 1}: {key}"
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"{where}: expected a value, a list of values or a group, got {_words(node)}")
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


def read_config(path: Path, trust: Trust = False) -> tuple[Config, str | None]:
    """The configuration in the config.yaml of a run, and the recipe that its values started from.

    Raises:
        UsageError: as `read_values`; or a value is out of its range.
    """
    values = read_values(path, trust)
    name = values.pop(PRESET, None)
    return merged(Config(), values, {}, path=path, saved=True), name
