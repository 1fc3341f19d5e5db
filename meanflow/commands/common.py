"""What the commands share: parsing, printing, and checks of their options."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, get_type_hints

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes

from ..errors import UsageError
from ..options import Option, component_of, help_of, options_of
from ..processes import is_first
from ..registry import DATA_PREFIXES, available, find, is_code, name_of, names

if TYPE_CHECKING:
    from ..evaluation import Evaluator
    from ..training.network import LoadedNetwork

# PyTorch takes two seconds, which a command's help has no use for: what needs it is imported where it is used.

Flag = FlagCreatePairsOff[bool]
WITHOUT_PREFIX: Any = OmitArgPrefixes
Device = Literal["auto", "cpu", "cuda"]


def parse(cls: type[Any], args: Sequence[str], *, prog: str) -> Any:
    return tyro.cli(cls, args=list(args), prog=f"meanflow {prog}")


def flags_of(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Flags by their names, with the words that follow them, before the parser has checked them."""
    words = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--") else [arg])]
    for flag, word in itertools.zip_longest(words, words[1:], fillvalue=""):
        if flag.startswith("--"):
            yield flag.removeprefix("--").replace("-", "_"), word


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


def reading_flags(args: Sequence[str]) -> Any:
    """A type of flags as `given_flags`, those that say where images and labels are in a data set that is no folder.

    There are some where `args` name one, such as wds:PATTERN.
    """
    kinds: dict[str, Any] = {}
    for prefix in {arg.removeprefix("--data=").partition(":")[0] for arg in args if ":" in arg} & set(DATA_PREFIXES):
        from ..data import EncodedSource

        shared = {option.name for option in options_of(EncodedSource)}
        for option in options_of(find("data", prefix)):
            if option.name not in shared and option.flag is not False:
                help = f"{option.help} (default: {option.default or 'none'})"
                kinds[option.name] = Annotated[option.kind, tyro.conf.arg(help=help, help_behavior_hint="")]
    flags: Any = TypedDict("reading", kinds, total=False)  # type: ignore[misc]
    return WITHOUT_PREFIX[flags]


# --------------------------------------------------------------------------------------------- options of the sampling


def sampling_options(named: str | None = None) -> dict[str, list[tuple[str, Option]]]:
    """The options of every sampler, by name: the samplers that have one, and what it is there.

    Args:
        named: a further sampler, "package.module:Name".
    """
    samplers = dict(available("samplers", lambda word: component_of("samplers", (), word)))
    for _, (word, cls) in available("objectives", _sampler_of):
        samplers.setdefault(word, cls)
    if named is not None and is_code(named):
        samplers.setdefault(named, component_of("samplers", ("draw",), named))
    found: dict[str, list[tuple[str, Option]]] = {}
    for word, cls in samplers.items():
        for option in options_of(cls):
            found.setdefault(option.name, []).append((word, option))
    return found


def _sampler_of(objective: str) -> tuple[str, type[Any]]:
    """The sampler that an objective has by default, and its name."""
    cls = type(find("objectives", objective)().sampling)
    return name_of("samplers", cls), cls


def with_sampling(cls: type[Any], args: Sequence[str], *more: tuple[Any, ...]) -> type[Any]:
    """A command's options, more fields and, as `sampling`, the name of a sampler and its options that were given."""
    named = next((word for flag, word in flags_of(args) if flag == "sampler"), None)
    kinds: dict[str, Any] = {}
    for name, several in sampling_options(named).items():
        kind = several[0][1].kind
        help = _help_of(several)
        kinds[name] = Annotated[kind, tyro.conf.arg(help=help, help_behavior_hint="")]
    words = ", ".join(names("samplers"))
    help = f"how images are drawn: {words} (default: the run's own; another one starts from its own defaults)"
    kinds = {"sampler": Annotated[str, tyro.conf.arg(help=help, help_behavior_hint="")], **kinds}
    flags: Any = TypedDict("sampling", kinds, total=False)  # type: ignore[misc]
    return command(cls, *more, ("sampling", WITHOUT_PREFIX[flags]))


def _help_of(several: Sequence[tuple[str, Option]]) -> str:
    """The help of an option of several samplers; what they have in common is said once."""
    default = {word: "none" if option.default == () else f"{option.default}" for word, option in several}
    texts: dict[str, list[str]] = {}
    for word, option in several:
        texts.setdefault(f"{option.help} (default: {default[word]})", []).append(word)
    if len(texts) == 1 and len(several) > 1:
        return next(iter(texts))
    return "; ".join(f"{', '.join(words)}: {text}" for text, words in texts.items())


def check_sampling(given: Mapping[str, Any], loaded: LoadedNetwork) -> dict[str, Any]:
    """What was asked for of a network's sampling.

    Raises:
        UsageError: its sampler has no such option, or a value is out of its range.
    """
    sampler: Any = loaded.sampling(**({"sampler": given["sampler"]} if "sampler" in given else {}))
    known = [field.name for field in dataclasses.fields(sampler)]
    for name in given:
        if name != "sampler" and name not in known:
            others = " or ".join(other for other, _ in sampling_options()[name])
            of = "" if "sampler" in given else f", the sampler of {loaded.source},"
            raise UsageError(
                f"expected only with --sampler {others}; {name_of('samplers', type(sampler))}{of} takes "
                f"{', '.join(known)}",
                field=name,
            )
    loaded.sampling(**given)
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
