"""Options of components: a frozen dataclass is its own group of options, with its bounds and its defaults.

A tree of such dataclasses (`Config`) has every option under one flat name, which is that of its flag and of its key in
a flat YAML file: that of the field, after the prefix of the group that it is in. A field that chooses a component by
name holds the component, and its flat name stands for that name.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass
from functools import partial
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from . import registry
from .errors import UsageError
from .files import shown

_WHOLE = 2**63  # integers are smaller
_HELP = re.compile(r"^ {8}(\w[\w, ]*): (.*(?:\n {12}.*)*)", re.MULTILINE)  # of an "Args:" list


@dataclass(frozen=True)
class Bounds:
    """Values that an option may have: from `low` to `high`, without `low` if `above`, without `high` if `below`."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False


def option(default: Any = MISSING, *, flag: Any = None, **bounds: Any) -> Any:
    """A field with bounds (`Bounds`) for its number, or each of its numbers.

    Args:
        default: its value where nobody gives one.
        flag: its type on the command line, if that is another; False: it is none of the flags.
    """
    return dataclasses.field(default=default, metadata={"bounds": Bounds(**bounds), "flag": flag})


def group(default: Callable[[], Any], *, prefix: str = "") -> Any:
    """A field that holds a group of options, whose flat names begin with `prefix`."""
    return dataclasses.field(default_factory=default, metadata={"prefix": prefix})


def choice(
    kind: str,
    default: Callable[[], Any],
    *,
    prefix: str = "",
    find: Callable[[str], type[Any]] | None = None,
    name: Callable[[Any], str] | None = None,
    methods: Sequence[str] = (),
    kept: Sequence[str] = (),
    flat: str | None = None,
) -> Any:
    """A field that holds a component of a kind of the registry, chosen by its name.

    Args:
        prefix: of the flat names of its options.
        find: the class of a name, and
        name: the name of a component, where they are not what the registry says.
        methods: what a component has to have.
        kept: fields that keep their values where another component is chosen, if it has them.
        flat: flat name of the choice, without the prefix of the group that it is in, where it is not the field's.
    """
    find = partial(component_of, kind, methods) if find is None else find
    name = (lambda component: registry.name_of(kind, type(component))) if name is None else name
    metadata = {"kind": kind, "prefix": prefix, "find": find, "name": name, "kept": kept, "flat": flat}
    return dataclasses.field(default_factory=default, metadata=metadata)


def component_of(kind: str, methods: Sequence[str], name: str) -> type[Any]:
    """The class of a component of the registry that is chosen by its name.

    Raises:
        UsageError: there is none, or it is no frozen dataclass with these methods.
    """
    found = registry.find(kind, name)
    lacks = [method for method in methods if not hasattr(found, method)]
    if not isinstance(found, type) or not dataclasses.is_dataclass(found) or lacks:
        expected = f"a frozen dataclass with {', '.join(methods)}" if methods else "a frozen dataclass"
        raise UsageError(f"expected {expected}, got {name}, {type(found).__name__}", field=registry.field_of(kind))
    return found


class Options:
    """Base of a frozen dataclass of options: its fields are checked against their bounds and types of number."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            bounds = field.metadata.get("bounds", Bounds())
            value = getattr(self, field.name)
            for number in value if isinstance(value, tuple) else (value,):
                _check_bounds(field, number, bounds)


def _check_bounds(field: Field[Any], value: Any, bounds: Bounds) -> None:
    words = words_of(field)
    if isinstance(value, bool) or not isinstance(value, int | float):
        if words in ("int", "float"):
            raise TypeError(f"{field.name}: expected a number, got {type(value).__name__}")
        return
    if isinstance(value, int) and abs(value) >= _WHOLE:
        raise UsageError(f"expected a number of less than 64 bits, got {shown(value)}", field=field.name)
    if not math.isfinite(value):
        raise UsageError(f"expected a finite number, got {value}", field=field.name)
    too_low = value <= bounds.low if bounds.above else value < bounds.low
    too_high = value >= bounds.high if bounds.below else value > bounds.high
    if not (too_low or too_high):
        return
    if math.isfinite(bounds.low) and math.isfinite(bounds.high) and "int" not in words:
        interval = f"{'(' if bounds.above else '['}{bounds.low:g}, {bounds.high:g}{')' if bounds.below else ']'}"
        expected = f"a number in {interval}"
    elif "int" in words:
        expected = f"at least {bounds.low:g}" if too_low else f"at most {int(bounds.high)}"
    else:
        expected = f"a number {'>' if bounds.above else '>='} {bounds.low:g}" if too_low else f"at most {bounds.high:g}"
    raise UsageError(f"expected {expected}, got {value}", field=field.name)


# ---------------------------------------------------------------------------------------------------------- the tree


@dataclass(frozen=True)
class Option:
    """An option by its flat name.

    kind: its type; of a choice, str.
    default: the value where nobody gives one; MISSING if it has to be given.
    help: its line of the docstring of the class that it belongs to.
    words: that type as it is written.
    choice: what kind of component it chooses, None for a value.
    flag: see `option`.
    """

    name: str
    kind: Any
    default: Any
    help: str
    words: str
    choice: str | None = None
    flag: Any = None


def is_group(field: Field[Any]) -> bool:
    return "prefix" in field.metadata


def _flat_name(field: Field[Any], prefix: str) -> str:
    """That of an option, or of a choice."""
    return prefix + (field.metadata.get("flat") or field.name)


def words_of(field: Field[Any]) -> str:
    """The type of a field as it is written."""
    return field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))


def default_of(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def help_of(cls: type[Any]) -> dict[str, str]:
    """The lines of the "Args:" list in the docstrings of a class and its bases, by argument."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        for names, text in _HELP.findall(inspect.cleandoc(base.__doc__ or "").replace("\n", "\n    ")):
            found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


_HINTS: dict[Any, dict[str, Any]] = {}


def _hints_of(cls: type[Any]) -> dict[str, Any]:
    """The types of a class's fields, evaluated once: that is most of the time that a configuration takes to build."""
    if cls not in _HINTS:
        _HINTS[cls] = get_type_hints(cls)
    return _HINTS[cls]


def options_of(cls: type[Any], base: Any = None, prefix: str = "") -> Iterator[Option]:
    """Every option of a class and of the groups in it, as they are by default or in the instance `base`."""
    texts, hints = help_of(cls), _hints_of(cls)
    for field in dataclasses.fields(cls):
        value = default_of(field) if base is None else getattr(base, field.name)
        name = prefix + field.name
        kind = field.metadata.get("kind")
        text = texts.get(field.name, "")
        if kind:
            yield Option(_flat_name(field, prefix), str, field.metadata["name"](value), text, "str", choice=kind)
        if is_group(field):
            yield from options_of(type(value), value, prefix + field.metadata["prefix"])
        elif field.init:
            words = words_of(field)
            yield Option(name, hints[field.name], value, text, words, flag=field.metadata.get("flag"))


def finders_of(cls: type[Any], prefix: str = "") -> Iterator[tuple[str, Callable[[str], type[Any]], str]]:
    """(flat name, what finds a component by its name, prefix of its options) of every choice, all at their defaults."""
    for field in dataclasses.fields(cls):
        inner = prefix + field.metadata.get("prefix", "")
        if "kind" in field.metadata:
            yield _flat_name(field, prefix), field.metadata["find"], inner
        if is_group(field):
            yield from finders_of(type(default_of(field)), inner)


def choices_of(cls: type[Any], prefix: str = "") -> Iterator[tuple[str, str, str, type[Any]]]:
    """(flat name of the choice, name, prefix, class) of everything that could be chosen in a class of options."""
    for field in dataclasses.fields(cls):
        inner = prefix + field.metadata.get("prefix", "")
        if "kind" in field.metadata:
            for word, component in registry.available(field.metadata["kind"], field.metadata["find"]):
                yield _flat_name(field, prefix), word, inner, component
                yield from choices_of(component, inner)
        elif is_group(field):
            yield from choices_of(type(default_of(field)), inner)


def owners_of(cls: type[Any], name: str) -> list[tuple[str, str, Option]]:
    """Which choices have an option of this flat name: (flat name of the choice, name, option)."""
    found = []
    for where, word, prefix, component in choices_of(cls):
        found += [(where, word, option) for option in options_of(component, prefix=prefix) if option.name == name]
    return found


def values_of(base: Any, prefix: str = "") -> dict[str, Any]:
    """Every option of an instance, by flat name."""
    return {option.name: option.default for option in options_of(type(base), base, prefix)}


def tree_of(base: Any) -> dict[str, Any]:
    """An instance as plain values, groups within groups, as YAML and JSON hold them; a component has its name first."""
    tree: dict[str, Any] = {}
    for field in dataclasses.fields(base):
        value = getattr(base, field.name)
        if is_group(field):
            word = {"name": field.metadata["name"](value)} if "kind" in field.metadata else {}
            tree[field.name] = {**word, **tree_of(value)}
        elif field.init:
            tree[field.name] = list(value) if isinstance(value, tuple) else value
    return tree


def flattened(cls: type[Any], tree: Mapping[str, Any], prefix: str = "", within: str = "") -> dict[str, Any]:
    """The values of a tree as of `tree_of`, by flat name. What is no group stays as it is.

    Raises:
        UsageError: a group has an option that is none of its, or an option is there twice.
    """
    values: dict[str, Any] = {}
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key, value in tree.items():
        field = fields.get(key)
        if field is None and within:
            raise UsageError(f"expected one of {', '.join(fields)}, got {shown(key)}", field=within)
        if field is None:
            _put(values, prefix + key, value)
            continue
        if not isinstance(value, Mapping) or not is_group(field):
            _put(values, _flat_name(field, prefix), value)
            continue
        inner, rest = type(default_of(field)), dict(value)
        if "kind" in field.metadata and "name" in rest:
            word = rest.pop("name")
            if not isinstance(word, str):
                raise UsageError(f"expected a name, got {shown(word)}", field=_flat_name(field, prefix))
            _put(values, _flat_name(field, prefix), word)
            inner = field.metadata["find"](word)
        for name, one in flattened(inner, rest, prefix + field.metadata["prefix"], key).items():
            _put(values, name, one)
    return values


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    if name in values:
        raise UsageError("expected once, got it in its group and outside", field=name)
    values[name] = value


def build(
    cls: type[Any],
    base: Any,
    values: Mapping[str, Any],
    used: set[str],
    prefix: str = "",
    *,
    chosen: bool = False,
    default: Any = None,
) -> Any:
    """An instance of a class: what `values` says by flat name, else what `base` has, else the default.

    A component whose name is another than that of `base` starts from its own defaults. `used` gets the names of
    `values` that had a place. None for an option of a component, where it has no None, is its default there, as in the
    instance `default`.

    Raises:
        UsageError: a value is of another type, out of its bounds, or missing.
    """
    arguments: dict[str, Any] = {}
    hints = _hints_of(cls)
    for field in dataclasses.fields(cls):
        name = _flat_name(field, prefix)
        usual = default_of(field) if default is None else getattr(default, field.name)
        before = usual if base is None else getattr(base, field.name)
        given = values.get(name)
        if name in values and field.init and not (is_group(field) and "kind" not in field.metadata):
            used.add(name)
        if is_group(field):
            inner, component = type(before), "kind" in field.metadata
            if component and name in values and given is None:
                raise UsageError("expected a name, got null", field=name)
            if component and given is not None:
                inner = field.metadata["find"](typed(name, given, str, "str"))
                if inner is not type(before):
                    own = {field.name for field in dataclasses.fields(inner)}
                    kept = {key: getattr(before, key) for key in field.metadata["kept"] if key in own}
                    values = {**{f"{prefix}{field.metadata['prefix']}{key}": a for key, a in kept.items()}, **values}
                    before = None
            arguments[field.name] = build(
                inner,
                before,
                values,
                used,
                prefix + field.metadata["prefix"],
                chosen=chosen or component,
                default=usual if type(usual) is inner else None,
            )
        elif field.init:
            if name in values:
                kind = hints[field.name]
                if given is None and chosen and NoneType not in get_args(kind):
                    before = usual
                else:
                    before = typed(name, given, kind, words_of(field))
            if before is not MISSING:
                arguments[field.name] = before
    try:
        return cls(**arguments)
    except UsageError as error:
        raise UsageError(error.message, field=f"{prefix}{error.field}" if error.field else None) from error
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


# -------------------------------------------------------------------------------------------------------------- types


def typed(name: str, value: Any, kind: Any, words: str) -> Any:
    """A value of a file, a flag or a caller as one of the type `kind`.

    Raises:
        UsageError: it is none.
    """
    try:
        return _typed(value, kind)
    except (ValueError, OverflowError) as error:
        expected = "true or false" if words == "bool" else words
        got = "null" if value is None else shown(value)
        raise UsageError(f"expected {expected}, got {got}", field=name) from error


def _typed(value: Any, kind: Any) -> Any:
    """YAML 1.1 takes the word no for false, and 1e3, which has no point, for text."""
    origin, choices = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for one in choices:
            with suppress(ValueError, OverflowError):
                return _typed(value, one)
    elif origin is Literal:
        word = "no" if value is False else value
        if word in choices:
            return word
    elif origin is tuple and choices[1:] == (Ellipsis,):
        if isinstance(value, list | tuple):
            return tuple(_typed(item, choices[0]) for item in value)
    elif origin is tuple:
        if isinstance(value, list | tuple) and len(value) == len(choices):
            return tuple(_typed(item, one) for item, one in zip(value, choices, strict=True))
    elif kind is NoneType or isinstance(value, bool) or value is None:
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
    elif isinstance(kind, type) and kind not in (int, float) and isinstance(value, kind):
        return value
    raise ValueError
