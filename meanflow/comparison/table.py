"""A comparison as a table in Markdown, and its numbers as words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def markdown(comparison: Mapping[str, Any]) -> str:
    """compare.md: one row a method."""
    titles = comparison["titles"]
    counts = list(dict.fromkeys(result["evaluations"] for row in comparison["methods"] for result in row["results"]))
    counts = [n for n in counts if n is not None]
    heads = ["method", "steps", "cost of a step", "measured", "peak memory"]
    heads += [f"{title}, {n}" for n in counts for title in titles.values()]
    lines = [f"# {heading(comparison)}", "", *_joined([heads, ["---"] * len(heads)])]
    for row in comparison["methods"]:
        cells = [f"`{row['name']}`", str(row["steps"]), f"{row['cost']:.2f}", f"{row['time_ratio']:.2f}"]
        cells.append(megabytes(row["peak_bytes"]))
        by_count = {result["evaluations"]: result for result in row["results"]}
        for n in counts:
            result = by_count.get(n)
            cells += ["" if result is None else words(key, result[key]) for key in titles]
        lines += _joined([cells])
    lines += ["", f"Numbers after a comma are network evaluations an image. {held_out(comparison)}".strip()]
    for row in comparison["methods"]:
        for result in row["results"]:
            if result["evaluations"] is None:
                values = ", ".join(f"{title} {words(key, result[key])}" for key, title in titles.items())
                lines += ["", f"`{row['name']}` ({result['sampler']}): {values}."]
    lines += ["", f"{comparison['note'][0].upper()}{comparison['note'][1:]}"]
    lines += [f"\n`{name}` is left out: it {reason}." for name, reason in comparison["left_out"].items()]
    if "cpu_seconds" in comparison:
        lines += ["", f"CPU seconds of the last command: {comparison['cpu_seconds']:.0f}."]
    return "\n".join(lines) + "\n"


def heading(comparison: Mapping[str, Any]) -> str:
    """What was compared, in one line."""
    base = comparison["methods"][0]
    seeds = f", seeds {', '.join(map(str, comparison['seeds']))}" if len(comparison["seeds"]) > 1 else ""
    steps = f"{comparison['budget_steps']} step{'s' if comparison['budget_steps'] > 1 else ''}"
    budget = f"each with the computation of {steps} of flow matching, batch {base['batch_size']}"
    return f"{comparison['data']}: {budget}{seeds}"


def held_out(comparison: Mapping[str, Any]) -> str:
    """The same figures of held-out real images; "" where there are none."""
    reached = [
        f"{title} {words(key, [comparison['held_out'][key]])}"
        for key, title in comparison["titles"].items()
        if comparison["held_out"].get(key) is not None
    ]
    return f"Held-out real images: {', '.join(reached)}." if reached else ""


def words(key: str, values: Sequence[float | None]) -> str:
    """A figure: its mean over the seeds, and half of its range where there are several; – where it is not there."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = sum(known) / len(known)
    places = 2 if key.endswith("distance") and mean >= 0.1 else 3
    spread = f" ± {(max(known) - min(known)) / 2:.{places}f}" if len(known) > 1 else ""
    return f"{mean:.{places}f}{spread}"


def megabytes(number: int) -> str:
    mega = number / 1e6
    return f"{mega:.0f} MB" if mega >= 9.5 else f"{mega:.1f} MB"


def _joined(rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in rows]
