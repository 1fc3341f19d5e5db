"""The command `python -m mfkernels.check`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..backend import OPS, requested_backend
from .case import cases_of
from .jobs import DTYPES, Job, Outcome, Timed, backends, missing, run_job, this_device
from .processes import Failed, RunJob, run_jobs
from .report import Row, environment, summary, table, write_json

LIMIT = 120.0  # seconds that a group of cases may take, with what it compiles


def processes_for(device: torch.device) -> int:
    """How many at a time: one a core, with 2 GiB of the GPU's memory each."""
    cores = os.cpu_count() or 1
    if device.type == "cpu":
        return min(2, cores)
    return max(1, min(16, cores, torch.cuda.get_device_properties(device).total_memory // 2**31))


def main(argv: Sequence[str] | None = None, *, run_job: RunJob = run_job, limit: float = LIMIT) -> int:
    """Run the command; returns its exit code. Tests pass a `run_job` and a `limit` (seconds of a group of cases)."""
    parser = argparse.ArgumentParser(
        prog="python -m mfkernels.check", description="Check every op on this machine against plain PyTorch."
    )
    parser.add_argument("--ops", nargs="+", metavar="OP", help="these alone, for instance attention mlp")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table here too, as it grows")
    parser.add_argument("--no-times", action="store_true", help="check alone, as where other programs use the GPU")
    arguments = parser.parse_args(argv)
    device = this_device()
    about = environment(device)
    try:
        unknown = sorted(set(arguments.ops or ()) - set(OPS))
        if unknown:
            raise ValueError(f"--ops: expected any of {', '.join(OPS)}, got {', '.join(unknown)}")
        requested_backend()  # raises if MFKERNELS_BACKEND is wrong
        write_json(arguments.json, about, [], done=False)
    except (OSError, ValueError) as error:
        text = f"--json: {error}" if isinstance(error, OSError) else str(error)
        print(f"mfkernels.check: {text}", file=sys.stderr)
        return 2
    place = about["gpu"] or ("cpu, Triton's interpreter" if about["interpreted"] else "cpu")
    print(f"torch {about['torch']}, triton {about['triton']}, on {place}", flush=True)
    for reason in dict.fromkeys(about["missing"].values()):
        names = [name for name, why in about["missing"].items() if why == reason]
        print(f"not here: {', '.join(names)}: {reason}", flush=True)
    jobs = [
        Job(op, backend, dtype, str(device), part)
        for op in OPS
        if not arguments.ops or op in arguments.ops
        for backend in backends(op, device)
        for dtype in (DTYPES if backend.name == "reference" else list(DTYPES)[1:])
        for part in dict.fromkeys(case.part for case in cases_of(op, str(device)))
    ]
    rows = {(job.op, job.backend.name, job.dtype): Row(job.op, job.backend.name, job.dtype) for job in jobs}

    def run(jobs: Sequence[Job], processes: int) -> None:
        last: dict[Job, str] = {}
        for job, result in run_jobs(jobs, run_job, processes, limit):
            row = rows[job.op, job.backend.name, job.dtype]
            if isinstance(result, Timed):
                row.times = result
            elif isinstance(result, Failed):
                start = "timing" if job.timed else f"at the start {job.part}".strip()
                row.outcomes.append(Outcome(f"after {last[job]}" if job in last else start, failure=result.reason))
            elif result is not None:
                last[job] = result.case
                row.outcomes.append(result)
            else:
                write_json(arguments.json, about, list(rows.values()), done=False)

    # Those that compile longest first. Timings run one at a time, of rows that passed, with every kernel compiled.
    ordered = sorted(jobs, key=lambda job: (job.backend.name == "reference", job.op != "attention"))
    stopped = False
    try:
        run(ordered, processes_for(device))
        passed = [row for row in rows.values() if row.checks and not row.failures and row.dtype != "float64"]
        if arguments.no_times:
            passed = []
        job_of = {(job.op, job.backend.name, job.dtype): job for job in jobs}
        timed = [replace(job_of[row.op, row.backend, row.dtype], part="", timed=True) for row in passed]
        # not in the interpreter, where times mean nothing
        run([job for job in timed if device.type == "cuda" or job.backend.name == "reference"], 1)
    except KeyboardInterrupt:
        stopped = True
    write_json(arguments.json, about, list(rows.values()), done=not stopped)
    print(table(list(rows.values())))
    if device.type == "cuda" and "triton" in missing(device):
        print(f"not checked: Triton's kernels: {missing(device)['triton']}")
    print(("stopped before the end: " if stopped else "") + summary(list(rows.values())))
    return 1 if stopped or any(row.failures for row in rows.values()) else 0
