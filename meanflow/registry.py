"""Components by name: what `--objective NAME`, a recipe or a saved run may say.

A package adds its own through entry points of the group "meanflow.KIND", such as "meanflow.objectives", or with
`register` in code that runs before. A name "package.module:Name" is imported, the working directory first.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import EntryPoints, entry_points
from typing import Any, TypeVar

from .errors import UsageError

# Where this package's own register themselves when they are imported.
_HOMES = {
    "codecs": "meanflow.codecs",
    "data": "meanflow.data",
    "evaluators": "meanflow.evaluation",
    "forms": "meanflow.objectives",
    "models": "meanflow.models",
    "objectives": "meanflow.objectives",
    "recipes": "meanflow.recipes",
    "samplers": "meanflow.objectives",
    "time_samplers": "meanflow.objectives",
    "velocities": "meanflow.objectives",
}
# options that name components, where that is not the singular of the kind
_OPTIONS = {"data": "data", "recipes": "preset", "velocities": "velocity"}
DATA_PREFIXES = ("wds", "hf")  # data sources that `--data PREFIX:PLACE` names: none of them is a module
_known: dict[str, dict[str, Any]] = {kind: {} for kind in _HOMES}
_warned: set[tuple[str, str]] = set()  # kinds and names
_log = logging.getLogger("meanflow")
T = TypeVar("T")


def register(kind: str, name: str) -> Callable[[T], T]:
    """Decorator that adds a component of a kind ("objectives", "models", "codecs", "data", …) under a name.

    Raises:
        ValueError: there is no such kind, or another component has the name.
    """
    if kind not in _known:
        raise ValueError(f"kind: expected one of {', '.join(_known)}, got {kind!r}")

    def add(component: T) -> T:
        if _known[kind].setdefault(name, component) is not component:
            raise ValueError(f"name: {kind} has another component of the name {name!r}")
        return component

    return add


def is_code(name: str) -> bool:
    """Whether `name` is of the form "package.module:Name"."""
    found = re.fullmatch(r"([^\W\d][\w.]*):[^\W\d][\w.]*", name)
    return found is not None and found[1] not in DATA_PREFIXES


def names(kind: str) -> list[str]:
    """The names that there are: this package's, then those of installed packages."""
    importlib.import_module(_HOMES[kind])
    return list(dict.fromkeys([*_known[kind], *sorted(_entry_points(kind, tuple(sys.path)).names)]))


@cache
def _entry_points(kind: str, path: tuple[str, ...]) -> EntryPoints:
    """Those of a kind where modules are looked for on this path: to read all packages takes 20 ms."""
    return entry_points(group=f"meanflow.{kind}")


def field_of(kind: str) -> str:
    """The option that names components of a kind."""
    return _OPTIONS.get(kind, kind.removesuffix("s"))


def find(kind: str, name: str) -> Any:
    """The component of that name; what "package.module:Name" stands for is imported, so a file's has to be trusted.

    Raises:
        UsageError: there is none; it has the field that names components of this kind.
    """
    field = field_of(kind)
    if is_code(name):
        return _imported(name, field)
    if name not in names(kind):
        expected = ", ".join(names(kind))
        raise UsageError(f'expected one of {expected} or "package.module:Name", got {name!r}', field=field)
    if name not in _known[kind]:
        entry, *others = _entry_points(kind, tuple(sys.path)).select(name=name)
        if others:
            several = ", ".join(f"{one.value} of {one.dist.name if one.dist else '?'}" for one in (entry, *others))
            raise UsageError(f"expected one package that has {name}, found {several}", field=field)
        try:
            register(kind, name)(entry.load())
        except Exception as error:  # whatever the import of a package raises
            raise UsageError(f"cannot import {entry.value}, which {name} is: {error}", field=field) from error
    return _known[kind][name]


def available(kind: str, look_up: Callable[[str], Any] | None = None) -> Iterator[tuple[str, Any]]:
    """The names of a kind and what `look_up` (by default `find`) gives for each.

    A component that cannot be used, such as one of a package that does not import, is left out with a warning.
    """
    for name in names(kind):
        try:
            component = find(kind, name) if look_up is None else look_up(name)
        except Exception as error:  # of a component that is none, whatever is tried with it
            if (kind, name) not in _warned:
                _warned.add((kind, name))
                _log.warning("%s %s is left out: %s", kind, name, getattr(error, "message", error))
            continue
        yield name, component


def name_of(kind: str, component: Any) -> str:
    """The name under which `find` finds it.

    Raises:
        UsageError: it has none.
    """
    for name, known in _known[kind].items():
        if known is component:
            return name
    name = f"{component.__module__}:{component.__qualname__}"
    if not is_code(name) or component.__module__ == "__main__":
        raise UsageError(f"{name} has no name; register it (meanflow.registry.register)", field=field_of(kind))
    return name


def _imported(name: str, field: str) -> Any:
    module, _, path = name.partition(":")
    try:
        with working_directory_first():
            found: Any = importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"cannot import {module} of {name!r}: {error}", field=field) from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{module} has no {path}, which {name!r} names", field=field)
        found = getattr(found, part)
    return found


@contextmanager
def working_directory_first() -> Iterator[None]:
    """Context in which modules are looked for in the working directory before anywhere else."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)  # the first of them; what was imported may have put its own before it
