"""The methods of a comparison, and the configuration with which each of them trains within the budget."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..config import Config
from ..errors import UsageError
from ..recipes import recipe, variant
from ..registry import is_code, names

YARDSTICK = "flow_matching"  # its training step is the unit of cost, and its run the teacher of the others


@dataclass(frozen=True)
class Method:
    """One row of a comparison.

    name: as it was asked for: a recipe or an objective.
    preset: the recipe that its values come from.
    config: those values.
    """

    name: str
    preset: str
    config: Config

    @property
    def objective(self) -> str:
        """The name of its objective."""
        return str(self.config.values()["objective"])


def method_of(name: str, preset: str) -> Method:
    """A recipe by its name, or the recipe `preset` with the objective of that name, or its variant for it.

    Raises:
        UsageError: there is no such recipe or objective.
    """
    if name in names("recipes"):
        return Method(name, name, recipe(name))
    if name in names("objectives") or is_code(name):
        base = variant(preset, name)
        config = recipe(base)
        return Method(name, base, config if base != preset else with_objective(config, name))
    objectives, recipes = ", ".join(names("objectives")), ", ".join(names("recipes"))
    raise UsageError(f"expected an objective ({objectives}) or a recipe ({recipes}), got {name!r}", field="methods")


def with_objective(config: Config, objective: str) -> Config:
    return config if config.values()["objective"] == objective else config.replace(objective=objective)


def preset_of(words: Sequence[str], preset: str | None) -> str:
    """The recipe whose values the objectives take: the one asked for; that of the first recipe's family; "digits".

    Raises:
        UsageError: there is no such recipe.
    """
    if preset is not None:
        if preset not in names("recipes"):
            raise UsageError(f"expected one of {', '.join(names('recipes'))}, got {preset!r}", field="preset")
        return preset
    for word in words:
        if word in names("recipes"):
            family = word.partition("-")[0]
            return family if family in names("recipes") else word
    return "digits"


def default_names(preset: str) -> list[str]:
    """The preset's own objective, and every other that has a recipe of its own for it."""
    own = recipe(preset).values()["objective"]
    return [name for name in names("objectives") if name == own or f"{preset}-{name}" in names("recipes")]


def methods_of(words: Sequence[str], preset: str, *, taught: bool) -> tuple[list[Method], dict[str, str]]:
    """The methods of a comparison, flow matching first, and why any of the default ones are left out, by name.

    Args:
        words: recipes and objectives; empty: the default ones.
        taught: whether a teacher was given, which takes the place of the comparison's own flow matching.

    Raises:
        UsageError: one is not known, given twice, of other data, or needs a teacher that a comparison does not have.
    """
    twice = [word for word in words if list(words).count(word) > 1]
    if twice:
        raise UsageError(f"expected each once, got {twice[0]} twice", field="methods")
    base = method_of(YARDSTICK, preset)
    methods, left_out = [base], {}
    for word in words or default_names(preset):
        method = method_of(word, preset)
        if method.config == base.config:
            continue  # it is there in any case
        for other in methods:
            if method.config == other.config:
                raise UsageError(f"expected each once, got {word}, which is {other.name}", field="methods")
        if method.config.data != base.config.data:
            raise UsageError(
                f"expected recipes of the same data as {preset}, got {word}; choose that with --preset", field="methods"
            )
        refusal = _without_teacher(method, taught)
        if refusal and words:
            raise UsageError(f"{word} {refusal}", field="methods")
        if refusal:
            left_out[word] = refusal
        else:
            methods.append(method)
    return methods, left_out


def _without_teacher(method: Method, taught: bool) -> str:
    """Why there is no teacher for a method; "" where there is one, or none is needed."""
    objective = method.config.objective
    if "weak" in objective.teachers:
        return "learns from a weaker teacher too, which a comparison does not have; expected autoguidance 1"
    if objective.teacher_jumps and not taught:
        return "learns from a flow map, which flow matching is not; give it one with --teacher RUN"
    return ""


def budgeted(method: Method, steps: int, *, name: str, seed: int, teacher: str | None) -> Config:
    """The configuration of a method's run of `steps` steps; what counts steps in its recipe is scaled with them.

    Raises:
        UsageError: so few steps leave no room for its curriculum.
    """
    config = method.config
    share = steps / config.optim.steps
    counted = {option: getattr(config.objective, option) for option in config.objective.curriculum}
    scaled = {option: max(1, round(share * value)) if value else 0 for option, value in counted.items()}
    warmup = min(round(share * config.optim.warmup_steps), steps - 1)
    taught = {"teacher": teacher} if "frozen" in config.objective.teachers else {}
    try:
        return config.replace(
            **scaled,
            **taught,
            steps=steps,
            warmup_steps=warmup,
            name=name,
            seed=seed,
            sample_every=0,
            evaluate=False,
        )
    except UsageError as error:
        raise UsageError(f"the budget leaves {method.name} {steps} steps, too few: {error}", field="steps") from error


def run_name(comparison: str, method: str, seed: int) -> str:
    """The name of a method's run folder."""
    word = re.sub(r"[^\w.-]", "-", method)
    return f"{comparison}-{word}-seed{seed}"
