"""Measure launch configurations on this machine's GPU: `python -m mfkernels.tune`.

Writes the fastest of each problem into the user's table (`mfkernels.launch.user_table`), which has precedence over the
package's. Nothing else in the library measures: a training step never tunes.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mfkernels.attention.op import MAX_HEAD_DIM
from mfkernels.backend import triton_unavailable
from mfkernels.folders import modules_of_ops
from mfkernels.launch import Config, arch_of, clear_cache, forced_config, read_table, triton_minor, user_table
from mfkernels.timing import Timing, busy_time
from mfkernels.tune_problems import Problem, Sizes

# Largest relative difference in norm from the first candidate's result that another order of sums explains.
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-5}


def measure(problem: Problem, *, dry_run: bool = False) -> tuple[Config, float] | None:
    """The fastest candidate that runs and agrees with the first that ran, and its milliseconds.

    A dry run measures nothing and returns the first, with 0.
    """
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    expected: list[torch.Tensor] | None = None
    best: tuple[Config, float] | None = None
    how: str | None = None  # how the first was timed
    for candidate in problem.candidates:
        with forced_config(problem.op, candidate):
            try:
                results = problem.run()
            except (OutOfResources, CompilationError, PTXASError) as error:
                print(f"  {candidate}: {type(error).__name__}")
                continue
            if expected is None:
                expected = [x.clone() for x in results]
            elif not all(map(_agree, results, expected)):
                print(f"  {candidate}: its result differs, so it is not taken; please report this")
                continue
            taken = Timing(0.0, "not timed") if dry_run else busy_time(problem.run)
        how = how or taken.how
        if taken.how != how:  # Python's time is in one and not in the other
            print(f"  {candidate}: timed by {taken.how} where the first was by {how}, so it is not taken")
            continue
        milliseconds = 1e3 * taken.seconds
        print(f"  {candidate}: {milliseconds:.4f} ms")
        if best is None or milliseconds < best[1]:
            best = candidate, milliseconds
    return best


def _agree(out: torch.Tensor, expected: torch.Tensor) -> bool:
    difference = (out.float() - expected.float()).norm()
    return bool(difference <= TOLERANCE[out.dtype] * expected.float().norm())


def merge(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of both; a new row replaces an old one of the same op and conditions."""

    def key(row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if name not in ("config", "milliseconds")}

    replaced = [key(row) for row in new]
    return [row for row in old if key(row) not in replaced] + list(new)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace the table in one step, so that an interruption leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(f".{os.getpid()}")
    try:
        new.write_text(json.dumps(list(rows), indent=1) + "\n")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    clear_cache()


def problems(sizes: Sizes) -> Iterator[Problem]:
    """Every op's problems."""
    for tuning in modules_of_ops("tuning"):
        yield from tuning.problems(sizes)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mfkernels.tune", description="Measure launch configurations on this GPU."
    )
    parser.add_argument("--ops", nargs="+", metavar="OP", help="these alone, for instance attention_forward")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 72, 128], metavar="D")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[64, 256, 1024, 4096], metavar="N", help="of attention"
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 768, 1024, 1152], metavar="D")
    parser.add_argument("--hidden-widths", type=int, nargs="+", default=[2048, 2730, 3072, 4096, 4608], metavar="H")
    parser.add_argument("--total", type=int, default=65536, metavar="T", help="tokens in a batch (default: 65536)")
    parser.add_argument("--seconds", type=float, metavar="S", help="begin no problem after so many seconds")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run and compare every candidate, measure and write nothing; without a GPU too, where TRITON_INTERPRET=1",
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    arguments = parser.parse_args(argv)
    path = user_table()
    known = {op for tuning in modules_of_ops("tuning") for op in tuning.OPS}
    try:
        read_table(path)  # raises now, not after hours of measuring
        if any(d % 8 != 0 or not 8 <= d <= MAX_HEAD_DIM for d in arguments.head_dims):
            raise ValueError(f"--head-dims: expected multiples of 8 up to {MAX_HEAD_DIM}, got {arguments.head_dims}")
        for name in ("tokens", "widths", "hidden_widths"):
            if min(getattr(arguments, name)) < 1:
                raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(arguments, name)}")
        if arguments.total < 1:
            raise ValueError(f"--total: expected at least 1, got {arguments.total}")
        unknown = sorted(set(arguments.ops or ()) - known)
        if unknown:
            raise ValueError(f"--ops: expected any of {', '.join(sorted(known))}, got {', '.join(unknown)}")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if arguments.dry_run:
            why_not = triton_unavailable(device)
            if why_not is not None:
                raise ValueError(why_not)
        elif device.type == "cpu":
            raise ValueError("it measures on a GPU, and torch.cuda.is_available() is False here; --dry-run needs none")
    except ValueError as error:
        print(f"mfkernels.tune: {error}", file=sys.stderr)
        return 2
    if device.type == "cpu":
        return _tune(arguments, path, device)
    device = torch.device("cuda", torch.cuda.current_device())
    with torch.cuda.stream(
        torch.cuda.Stream(device)
    ):  # one for forward and backward, so that busy_time can capture them
        return _tune(arguments, path, device)


def _tune(arguments: argparse.Namespace, path: Path, device: torch.device) -> int:
    machine = {"arch": arch_of(device), "triton": triton_minor(), "dtype": arguments.dtype}
    sizes = Sizes(
        arguments.head_dims,
        arguments.widths,
        arguments.hidden_widths,
        arguments.tokens,
        getattr(torch, arguments.dtype),
        device,
        arguments.total,
    )
    start, measured, left = time.monotonic(), 0, 0
    for problem in problems(sizes):
        if arguments.ops and problem.op not in arguments.ops:
            continue
        if arguments.seconds is not None and time.monotonic() - start > arguments.seconds:
            left += 1
            continue
        print(problem.op, *(f"{name}={bound}" for name, bound in problem.conditions.items()), flush=True)
        best = measure(problem, dry_run=arguments.dry_run)
        if best is not None:
            row: dict[str, Any] = {"op": problem.op, **machine, **problem.conditions}
            row |= {"config": dict(best[0]), "milliseconds": round(best[1], 4)}
            if not arguments.dry_run:
                # after each problem: an interrupted run keeps what it measured, and rows of another tuner stay
                write_table(path, merge(read_table(path), [row]))
            measured += 1
    if left:
        print(f"left out {left} problems: {arguments.seconds:g} seconds were over")
    print(f"ran {measured} problems, wrote nothing" if arguments.dry_run else f"wrote {measured} rows to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
