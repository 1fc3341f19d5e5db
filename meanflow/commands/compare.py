"""`meanflow compare`."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from tyro.conf import Positional

from ..comparison.figure import save_figure
from ..comparison.methods import preset_of
from ..comparison.runs import Budget, Stopped, compare_methods
from ..comparison.table import markdown
from ..config import RUNS
from ..errors import UsageError
from ..files import write_text
from ..recipes import recipe
from ..training.folder import RunFolder
from ..training.report import SAMPLES
from .common import Flag, check_at_least, device_of, parse, say


@dataclasses.dataclass(frozen=True)
class Compare:
    """Train several methods with the same amount of computation, and draw what each of them reaches.

    Flow matching is always among them: its training step is the unit of cost, and its run the teacher of methods that
    need one. The runs are runs/NAME-METHOD-seedSEED; a comparison that was stopped goes on where it was. The results
    are compare.json, compare.md and compare.png.

    Args:
        methods: recipes (digits-imf) and objectives (imf) with the values of the preset; none: every objective that
            has a recipe of the preset's
        preset: the recipe whose values objectives take; None: that of the first recipe's family, or digits
        steps: the budget, in steps of flow matching; each method trains so many of its own as the same products make
        seeds: of the runs, separated by commas; each method is trained once with each
        name: of the comparison, which the names of its runs begin with
        out: folder of the results; None: runs/NAME
        teacher: a run, a checkpoint or a weight file for the methods that need one; None: flow matching's run
        init: start every method from the averages of this run or checkpoint, or from this weight file
        samples: generated images of an evaluation
        overwrite: replace the runs of a comparison of this name
        trust_code: run the function "package.module:function" that the teacher, or the run of init, names
    """

    methods: Positional[tuple[str, ...]] = ()
    preset: str | None = None
    steps: int = 600
    seeds: str = "0"
    name: str = "compare"
    out: Path | None = None
    teacher: str | None = None
    init: str | None = None
    samples: int = SAMPLES
    overwrite: Flag = False
    trust_code: Flag = False


def compare(args: Sequence[str]) -> int:
    """Train several methods with one budget, and compare them"""
    options = parse(Compare, args, prog="compare")
    check_at_least(1, options, "steps")
    check_at_least(2, options, "samples")
    preset = preset_of(options.methods, options.preset)
    device = device_of(recipe(preset).run.device)
    budget = Budget(
        preset=preset,
        steps=options.steps,
        seeds=seeds_of(options.seeds),
        name=options.name,
        teacher=options.teacher,
        init=options.init,
        samples=options.samples,
        overwrite=options.overwrite,
        trust_code=options.trust_code,
    )
    folder = _folder(options)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler, which measures memory, prints at each use
    before = os.times()
    try:
        comparison, strips = compare_methods(options.methods, budget, device, say)
    except Stopped as stopped:
        say(
            f"Stopped by {signal.Signals(stopped.number).name}; what is trained is saved, and the same command without "
            "--overwrite goes on from there"
        )
        return 128 + stopped.number
    after = os.times()
    comparison["cpu_seconds"] = round(sum(after[:4]) - sum(before[:4]), 1)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "compare.json", json.dumps(comparison, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / "compare.md", markdown(comparison))
    save_figure(comparison, strips, folder / "compare.png")
    say(f"{len(comparison['methods'])} methods in {comparison['cpu_seconds']:.0f} CPU seconds: {folder}/compare.png")
    return 0


def seeds_of(text: str) -> tuple[int, ...]:
    """Different seeds, with commas between.

    Raises:
        UsageError: one is none, or there twice.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() for word in words) or any(int(word) >= 2**32 for word in words):
        raise UsageError(f"expected numbers from 0 to 2**32 - 1 with commas between, got {text!r}", field="seeds")
    seeds = tuple(map(int, words))
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"expected each once, got {text!r}", field="seeds")
    return seeds


def _folder(options: Compare) -> Path:
    """Where the results go, checked before any work."""
    named = RunFolder.named(options.name)
    folder = options.out or RUNS / options.name
    if folder == named.path and named.config.exists():
        raise UsageError(f"{folder} is a run; choose another name", field="name")
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"expected a folder, got the file {there}", field="out")
    if not os.access(there, os.W_OK):
        raise UsageError(f"cannot write {folder}: the folder {there} is read-only", field="out")
    return folder
