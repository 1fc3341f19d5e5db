"""What the commands share: parsing, printing, and checks of their options."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, get_type_hints

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes

from ..errors import UsageError
from ..options import Option, help_of, options_of
from ..processes import is_first
from ..registry import available, find

if TYPE_CHECKING:
    from ..evaluation import Evaluator
    from ..objectives import Objective

# PyTorch takes two seconds, which a command's help has no use for: what needs it is imported where it is used.

Flag = FlagCreatePairsOff[bool]
WITHOUT_PREFIX: Any = OmitArgPrefixes
Device = Literal["auto", "cpu", "cuda"]


def parse(cls: type[Any], args: Sequence[str], *, prog: str) -> Any:
    return tyro.cli(cls, args=list(args), prog=f"meanflow {prog}")


def say(text: str) -> None:
    if is_first():
        print(text, flush=True)


def described(cls: type[Any], **kinds: Any) -> list[tuple[str, Any, Any]]:
    """The fields of a command's options with the lines of its docstring as their help, some of other types."""
    texts, hints = help_of(cls), {**get_type_hints(cls, include_extras=True), **kinds}
    fields: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(cls):
        kind: Any = Annotated[(hints[field.name], tyro.conf.arg(help=texts[field.name]))]
        fields.append((field.name, kind, dataclasses.field(default=field.default)))
    return fields


def command(cls: type[Any], *more: tuple[Any, ...], **kinds: Any) -> type[Any]:
    """The class that the parser is given: the fields of `cls`, some of other types, and more."""
    made = dataclasses.make_dataclass(cls.__name__, [*described(cls, **kinds), *more], frozen=True, kw_only=True)
    made.__doc__ = (cls.__doc__ or "").partition("Args:")[0].strip()
    return made


def given_flags(options: Iterable[Option]) -> Any:
    """A type whose instance has the flags that were given and no others: tyro leaves out what a TypedDict may lack."""
    kinds: dict[str, Any] = {}
    for option in options:
        if option.flag is not False:
            kind = option.flag or option.kind
            kinds[option.name] = kind if kinds.get(option.name, kind) == kind else str
    flags: Any = TypedDict("flags", kinds, total=False)  # type: ignore[misc]
    return WITHOUT_PREFIX[flags]


# --------------------------------------------------------------------------------------------- options of the sampling


def sampling_options() -> dict[str, list[tuple[str, Option]]]:
    """The sampling's options of every objective, by name: the objectives that have one, and what it is there."""
    found: dict[str, list[tuple[str, Option]]] = {}
    for name, objective in available("objectives", lambda name: find("objectives", name)()):
        for option in options_of(type(objective.sampling)):
            found.setdefault(option.name, []).append((name, option))
    return found


def with_sampling(cls: type[Any]) -> type[Any]:
    """A command's options and, as `sampling`, those of every objective's sampling that were given."""
    kinds: dict[str, Any] = {}
    for name, several in sampling_options().items():
        kind = several[0][1].kind
        help = "; ".join(f"{of}: {option.help} (default: {option.default})" for of, option in several)
        kinds[name] = Annotated[kind, tyro.conf.arg(help=help, help_behavior_hint="")]
    flags: Any = TypedDict("sampling", kinds, total=False)  # type: ignore[misc]
    return command(cls, ("sampling", WITHOUT_PREFIX[flags]))


def check_sampling(given: Mapping[str, Any], objective: Objective, source: Path) -> dict[str, Any]:
    """What was asked for of a network's sampling.

    Raises:
        UsageError: its objective has no such option.
    """
    own: Any = objective.sampling
    known = [field.name for field in dataclasses.fields(own)]
    for name in given:
        if name not in known:
            others = " or ".join(other for other, _ in sampling_options()[name])
            raise UsageError(
                f"expected only with a network trained with --objective {others}; {source} is of another objective and "
                f"takes {', '.join(known)}",
                field=name,
            )
    return dict(given)


# --------------------------------------------------------------------------------------------------------------- checks


def check_at_least(least: int, options: Any, *fields: str) -> None:
    for name in fields:
        value = getattr(options, name)
        if value < least:
            raise UsageError(f"expected at least {least}, got {value}", field=name)


def source_of(text: str) -> Path:
    """A run folder, checkpoint or file at that path, or else the run of that name under runs/."""
    from ..training import network

    return network.source_of(text)


def device_of(name: str) -> str:
    import torch

    from ..checks import check_device

    check_device(name)
    return "cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu"


def check_out(path: Path) -> None:
    """Raise before any work where `path` cannot be written."""
    if path.is_dir():
        raise UsageError(f"expected a file, got the folder {path}", field="out")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"no folder {folder}", field="out")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"cannot write {path}: the folder {folder} is read-only", field="out")
    from PIL import Image

    formats = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.SAVE}
    if path.suffix != ".npy" and path.suffix.lower() not in formats:
        raise UsageError(f"cannot write {path}: expected the suffix of a picture, such as .png, or .npy", field="out")


def say_report(report: Mapping[str, Any], evaluator: Evaluator) -> None:
    for key, title in evaluator.titles.items():
        value, reference = report.get(key), report.get(f"held_out_{key}")
        if value is not None:
            beside = "" if reference is None else f"  (held-out real images: {reference:.3f})"
            say(f"{title}: {value:.3f}{beside}")
    if "note" in report:
        say(report["note"])
