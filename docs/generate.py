"""Write the tables of methods.md and imagenet.md: from the objectives' classes and a comparison, and from the recipes.

python docs/generate.py [--check]

It counts the products of every paper's recipe anew, which takes about a minute; --check takes them as they are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meanflow.commands.recipes import HEADS as RECIPE_HEADS
from meanflow.commands.recipes import by_paper
from meanflow.commands.recipes import row as recipe_row
from meanflow.comparison.estimate import COUNTS, GPUS, counted
from meanflow.comparison.table import words
from meanflow.models.options import model_options
from meanflow.recipes import published, recipe
from meanflow.registry import available, find, names

PAGE = Path(__file__).parent / "methods.md"
RESULTS = Path(__file__).parents[1] / "bench" / "results" / "cpu" / "compare.json"
BEGIN, END = "<!-- table of methods: written by docs/generate.py -->", "<!-- end of the table -->"
RECIPES_PAGE = Path(__file__).parent / "imagenet.md"
RECIPES_BEGIN = "<!-- table of recipes: written by docs/generate.py -->"
HEADS = ("`--objective`", "paper", "what is trained towards (→) what", "needs beside the network", "a step costs")


def table(comparison: Mapping[str, Any]) -> str:
    """The table, one row an objective, with what it reaches in a comparison where it is in it."""
    titles = comparison.get("titles", {})
    rows: dict[str, Any] = {}
    for row in comparison.get("methods", ()):
        if row["objective"] in rows:
            raise ValueError(f"{RESULTS}: expected each objective once, got {row['objective']} twice")
        rows[row["objective"]] = row
    heads = [*HEADS, *(f"{title.removeprefix('pixel-space ')}, 1 / 2 / 4" for title in titles.values())]
    lines = [heads, ["---"] * len(heads)]
    for name in names("objectives"):
        cls = find("objectives", name)
        if not cls.__module__.startswith("meanflow."):
            continue  # of another package
        papers = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in cls.paper)
        row = rows.get(name)
        cost = "" if row is None else f"{row['cost']:.2f}"
        figures = ["" if row is None else _figures(row, key) for key in titles]
        lines.append([f"`{name}`", papers, cls.formula, _needs(cls()), cost, *figures])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _figures(row: Mapping[str, Any], key: str) -> str:
    return " / ".join(words(key, result[key]) for result in row["results"])


def _needs(objective: Any) -> str:
    """What an objective needs beside the network, with its default options."""
    needs = {"frozen": "`--teacher`", "weak": "`--weak-teacher`"}
    found = [needs[role] for role in objective.teachers]
    if objective.teacher_jumps:
        found[-1] += " of a flow map"
    if objective.target_decay(0) is not None:
        found.append("averaged target")
    if objective.learned_module() is not None:
        found.append("learned log-variance")
    if objective.group_size > 1:
        found.append("batches of groups")
    if objective.outputs != ("u",):
        models = [name for name, model in available("models", model_options) if model.outputs == objective.outputs]
        found.append(f"network `{models[0].partition('-B')[0]}`")
    return ", ".join(found)


def page(text: str, comparison: Mapping[str, Any]) -> str:
    """The page of methods with its table written anew."""
    return _with_table(text, BEGIN, table(comparison))


def recipes_page(text: str) -> str:
    """The page of recipes with its table written anew."""
    return _with_table(text, RECIPES_BEGIN, recipes_table())


def _with_table(text: str, begin: str, new: str) -> str:
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(END)
    return f"{before}{begin}\n\n{new}\n\n{END}{after}"


def papers() -> list[str]:
    """The recipes of this package that say what their papers report."""
    own = [name for name in names("recipes") if find("recipes", name).__module__.startswith("meanflow.")]
    return sorted((name for name in own if published(name)), key=by_paper)


def recipes_table() -> str:
    """The table, one row a recipe of a paper."""
    heads = [f"hours on {GPUS} H100s" if head == "hours" else head for head in RECIPE_HEADS]
    lines = [heads, ["---"] * len(heads)]
    for name in papers():
        _, *cells, origin = recipe_row(name, recipe(name))
        paper, _, place = origin.removeprefix("arXiv ").partition(", ")
        origin = f"[{paper}](https://arxiv.org/abs/{paper})" + (f", {place}" if place else "")
        lines.append([f"`{name}`", *cells, origin])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def count() -> str:
    """estimates.json: what each of these recipes costs."""
    counts = {}
    for name in papers():
        reported = published(name)
        assert reported is not None
        counts[name] = counted(recipe(name), reported)._asdict()
    return json.dumps(counts, indent=1) + "\n"


def main() -> int:
    """Write the pages, or with --check say whether they are as they would be written."""
    comparison = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    check = "--check" in sys.argv[1:]
    if not check:
        COUNTS.write_text(count())
    old = {path: path.read_text() for path in (PAGE, RECIPES_PAGE)}
    new = {PAGE: page(old[PAGE], comparison), RECIPES_PAGE: recipes_page(old[RECIPES_PAGE])}
    if check:
        return int(new != old)
    for path, text in new.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
