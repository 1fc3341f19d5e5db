"""`meanflow train`."""

from __future__ import annotations

import dataclasses
import itertools
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional
from tyro.constructors import PrimitiveConstructorSpec

from ..config import GROUPS, TOGETHER, Config, check_code, merged, words_in
from ..config_file import PRESET, read_config, read_values
from ..errors import UsageError
from ..options import Option, choices_of, finders_of, flattened, options_of, owners_of
from ..recipes import recipe, variant
from ..registry import is_code, names
from ..training.folder import RunFolder
from ..training.run import run_training
from .common import WITHOUT_PREFIX, Flag, command, given_flags, parse, say, say_report


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
    asked = parse(_given(args), [a for a in args if a not in ("-h", "--help")], prog="train")
    named = {word for word in asked.settings.values() if isinstance(word, str) and is_code(word)}
    trust = asked.trust_code or named
    file = read_values(asked.config, trust) if asked.config else {}
    word = asked.preset or file.get(PRESET)
    if word and word not in names("recipes"):
        raise UsageError(
            f"{asked.config}: {PRESET}: expected one of {', '.join(names('recipes'))}, got {word!r}", field="config"
        )
    file.pop(PRESET, None)
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
    result = run_training(config, preset=preset, resume=asked.resume, overwrite=asked.overwrite)
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


def _saved_run(word: str | None, given: dict[str, Any], trust: Any, *, overwrite: bool) -> tuple[Config, str | None]:
    """What the run to resume was started with, and its recipe; `word` is the one that was asked for."""
    name = given.get("name") or (recipe(variant(word, given.get("objective"))) if word else Config()).run.name
    folder = RunFolder.named(name)
    folder.prepare(resume=True, overwrite=overwrite)
    config, preset = read_config(folder.config, trust)
    if word and PRESET in read_values(folder.config, trust) and variant(word, config.values()["objective"]) != preset:
        raise UsageError(
            f"{folder.path} was started from {preset or 'no preset'}, and a resumed run keeps its values; got {word}",
            field="preset",
        )
    return config.replace(name=folder.path.name), preset


# ---------------------------------------------------------------------------------------------------------- the parser


def _given(args: Sequence[str]) -> Any:
    """`Start` with the flags of every component that there is, those that `args` names as code too."""
    flags = given_flags([*_every_option(), *_options_of_code(args)])
    return command(Start, ("settings", flags), preset=_recipes())


def _every_option() -> Iterator[Option]:
    yield from options_of(Config)
    for _, _, prefix, component in choices_of(Config):
        yield from options_of(component, prefix=prefix)
    for short, several in TOGETHER.items():
        kind = owners_of(Config, several[0])[0][2].kind
        yield Option(short, tuple.__class_getitem__((kind,) * len(several)), None, "", "")


def _options_of_code(args: Sequence[str]) -> Iterator[Option]:
    words = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--") else [arg])]
    choices = {name: (find, prefix) for name, find, prefix in finders_of(Config)}
    for flag, word in itertools.pairwise(words):
        name = flag.removeprefix("--").replace("-", "_")
        if name in choices and is_code(word):
            find, prefix = choices[name]
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
            options.append((option.name, Annotated[kind, tyro.conf.arg(help=text)], dataclasses.field(default=value)))
        made = dataclasses.make_dataclass(group, options, frozen=True)
        fields.append((group, WITHOUT_PREFIX[made], dataclasses.field(default_factory=made)))
    return command(Start, *fields, preset=_recipes())


def _names_of(config: Config, group: str) -> set[str]:
    """The flat names of a group's options."""
    return {group, *flattened(Config, {group: config.to_dict()[group]})}
