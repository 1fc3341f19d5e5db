"""Write the table of methods in methods.md: from the objectives' classes and a comparison's results.

python docs/generate.py [--check]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meanflow.comparison.table import words
from meanflow.models.options import model_options
from meanflow.registry import available, find, names

PAGE = Path(__file__).parent / "methods.md"
RESULTS = Path(__file__).parents[1] / "bench" / "results" / "cpu" / "compare.json"
BEGIN, END = "<!-- table of methods: written by docs/generate.py -->", "<!-- end of the table -->"
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
    """The page with its table written anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table(comparison)}\n\n{END}{after}"


def main() -> int:
    """Write the page, or with --check say whether it is as it would be written."""
    comparison = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    old = PAGE.read_text()
    new = page(old, comparison)
    if "--check" in sys.argv[1:]:
        return int(new != old)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
