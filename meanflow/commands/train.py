"""`meanflow train`."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional
from tyro.constructors import PrimitiveConstructorSpec

from ..config import GROUPS, TOGETHER, Config, Trust, check_code, merged, words_in
from ..config_file import PRESET, read_config, read_values
from ..errors import UsageError
from ..files import shown
from ..options import Option, choices_of, finders_of, flattened, options_of, owners_of
from ..recipes import recipe, variant
from ..registry import is_code, names
from ..training.folder import RunFolder
from ..training.run import run_training
from .common import WITHOUT_PREFIX, Flag, command, flags_of, given_flags, parse, say, say_report

_NO_VALUE = ("", "--resume", "--overwrite", "--trust-code", "--trust_code")  # what may stand before a recipe's name


def _recipes() -> Any:
    """The type of a recipe's name. Not `Literal[…] | None`: tyro would take the word "None" for one."""
    spec = PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(names("recipes")) + "}",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: [value or "none"],
        choices=tuple(names("recipes")),
    )
    positional: Any = Positional
    return positional[Annotated[str | None, spec]]


@dataclasses.dataclass(frozen=True)
class Start:
    """Train a network; everything it writes is in runs/NAME under the working directory.

    Values come from, later ones first: flags, the YAML file, the saved run (with --resume) or else the preset, the
    defaults. The options of model, objective and data are those of the ones that are chosen.

    Args:
        preset: values to start from. digits: 8x8 digits, a minute and a half (--objective imf: three, for any guidance
            scale); others: the papers' recipes
        config: YAML file of values (`steps: 1000`), for the preset and every option below --overwrite
        resume: continue the run of this name from its newest checkpoint
        overwrite: replace the run of this name, if there is one
        trust_code: run the function that a file, not a flag, names as the model or another component
    """

    preset: Positional[str | None] = None
    config: Path | None = None
    resume: Flag = False
    overwrite: Flag = False
    trust_code: Flag = False


def train(args: Sequence[str]) -> int:
    """Train a network"""
    flags = dict(flags_of(args))
    trust: Trust = bool({"--trust-code", "--trust_code"} & set(args)) or {a for a in flags.values() if is_code(a)}
    file = read_values(Path(flags["config"]), trust) if "config" in flags else {}
    preset = file.pop(PRESET, None)
    if preset is not None and preset not in names("recipes"):
        raise UsageError(
            f"{flags['config']}: {PRESET}: expected one of {', '.join(names('recipes'))}, got {shown(preset)}",
            field="config",
        )
    named = {**file, **flags}  # components that may be code, whose options are flags too
    if "resume" in flags:
        recipes = [arg for before, arg in zip(("", *args), args, strict=False) if before in _NO_VALUE]
        word = next((arg for arg in recipes if arg in names("recipes")), preset)
        folder = _folder(named, word)
        if folder.config.is_file():
            named = {**read_config(folder.config, trust)[0].values(), **named}
    asked = parse(_given(named), [a for a in args if a not in ("-h", "--help")], prog="train")
    word = asked.preset or preset
    given = {**file, **asked.settings}
    if asked.resume:
        base, preset = _saved_run(word, given, trust, overwrite=asked.overwrite)
    else:
        preset = variant(word, given.get("objective")) if word else None
        base = recipe(preset) if preset else Config()
    config = merged(base, file, asked.settings, path=asked.config)
    if {"-h", "--help"} & set(args):  # shows the values that all the rest of the line gives
        parse(_shown(config), ["--help"], prog="train")
    folder = RunFolder.named(config.run.name)
    check_code(words_in(config.to_dict()), asked.config or folder.config, trust)
    result = run_training(config, preset=preset, resume=asked.resume, overwrite=asked.overwrite, trust_code=trust)
    if result.signal is not None:
        say(
            f"Stopped by {signal.Signals(result.signal).name} after step {result.step} of {config.optim.steps}; "
            f"everything is saved in {result.checkpoint}. Continue with: meanflow train --resume --name "
            f"{config.run.name}"
        )
        return 128 + result.signal
    if result.new_steps == 0:
        say(
            f"{folder.path} has {result.step} steps already, and --steps asks for {config.optim.steps}: nothing was "
            "trained"
        )
    else:
        say(f"Trained {result.step} steps in {result.seconds:.0f} s. Samples: {folder.samples}")
    if config.run.evaluate:
        say_report(folder.read_report(config.run.evaluator.titles), config.run.evaluator)
    return 0


def _folder(given: Mapping[str, Any], word: str | None) -> RunFolder:
    """Of the run that is named, or of the one that the recipe `word` names."""
    usual = recipe(variant(word, given.get("objective"))) if word else Config()
    return RunFolder.named(given.get("name") or usual.run.name)


def _saved_run(word: str | None, given: dict[str, Any], trust: Any, *, overwrite: bool) -> tuple[Config, str | None]:
    """What the run to resume was started with, and its recipe; `word` is the one that was asked for."""
    folder = _folder(given, word)
    folder.prepare(resume=True, overwrite=overwrite)
    config, preset = read_config(folder.config, trust)
    if word and PRESET in read_values(folder.config, trust) and variant(word, config.values()["objective"]) != preset:
        raise UsageError(
            f"{folder.path} was started from {preset or 'no preset'}, and a resumed run keeps its values; got {word}",
            field="preset",
        )
    return config.replace(name=folder.path.name), preset


# ---------------------------------------------------------------------------------------------------------- the parser


def _given(named: Mapping[str, Any]) -> Any:
    """`Start` with the flags of every component that there is, and of those that are named as code."""
    flags = given_flags([*_every_option(), *_options_of_code(named)])
    return command(Start, ("settings", flags), preset=_recipes())


def _every_option() -> Iterator[Option]:
    yield from options_of(Config)
    for _, _, prefix, component in choices_of(Config):
        yield from options_of(component, prefix=prefix)
    for short, several in TOGETHER.items():
        kind = owners_of(Config, several[0])[0][2].kind
        yield Option(short, tuple.__class_getitem__((kind,) * len(several)), None, "", "")


def _options_of_code(named: Mapping[str, Any]) -> Iterator[Option]:
    for name, find, prefix in finders_of(Config):
        word = named.get(name)
        if isinstance(word, str) and is_code(word):
            yield from options_of(find(word), prefix=prefix)


def _shown(config: Config) -> Any:
    """`Start` with the options of a configuration, for the help."""
    fields: list[Any] = []
    values = config.values()
    for group in GROUPS:
        options = []
        for option in options_of(Config, config):
            if option.flag is False or option.name not in _names_of(config, group):
                continue
            value = values.get("folder", values["data"]) if option.name == "data" else option.default
            kind: Any = option.flag or option.kind
            value = value is not False if option.flag is bool else value
            text = option.help or option.name.replace("_", " ")
            if option.choice is not None and option.name not in GROUPS:
                text += f": {', '.join(names(option.choice))}"
            options.append((option.name, Annotated[kind, tyro.conf.arg(help=text)], dataclasses.field(default=value)))
        for short, several in TOGETHER.items():
            if set(several) <= _names_of(config, group):
                default = tuple(values[name] for name in several)
                kind = tuple.__class_getitem__((type(default[0]),) * len(several))
                text = f"{', '.join(several)}, all at once"
                options.append((short, Annotated[kind, tyro.conf.arg(help=text)], dataclasses.field(default=default)))
        made = dataclasses.make_dataclass(group, options, frozen=True)
        fields.append((group, WITHOUT_PREFIX[made], dataclasses.field(default_factory=made)))
    return command(Start, *fields, preset=_recipes())


def _names_of(config: Config, group: str) -> set[str]:
    """The flat names of a group's options."""
    return {group, *flattened(Config, {group: config.to_dict()[group]})}
