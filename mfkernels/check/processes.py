"""Worker processes for `python -m mfkernels.check`: one that hangs or dies fails its own job only."""

from __future__ import annotations

import multiprocessing
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch

START = 120.0  # seconds in which a process must have started

# A function that yields the results of a job one at a time. Pickled by name, as the jobs and the results are.
RunJob = Callable[[Any], Iterable[object]]


class Failed(NamedTuple):
    """The result of a job that did not finish."""

    reason: str


class DeviceLostError(RuntimeError):
    """Raised by a `RunJob`: the CUDA context is gone, and the process cannot take another job."""


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def work(connection: Connection, run_job: RunJob) -> None:
    """The main program of a process. It sends True at its start, and after each job whether it can take another."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    usable = True
    connection.send(usable)
    while usable:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            for result in run_job(job):
                connection.send(result)
        except Exception as error:
            usable = not isinstance(error, DeviceLostError)
            connection.send(Failed(first_line(error)))
        connection.send(usable)


class Worker:
    """A process and the job that it has, or will have when it has started."""

    def __init__(self, run_job: RunJob, job: object) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, run_job), daemon=True)
        self.process.start()
        theirs.close()
        self.job, self.started, self.deadline = job, False, time.monotonic() + START

    def take(self, job: object, limit: float) -> None:
        self.job, self.started, self.deadline = job, True, time.monotonic() + limit
        self.connection.send(job)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def run_jobs(jobs: Sequence[Any], run_job: RunJob, processes: int, limit: float) -> Iterator[tuple[Any, Any]]:
    """(job, result) as results come, and (job, None) at the end of each job.

    Args:
        jobs: in the order in which they are begun.
        run_job: called in the processes; an exception gives a `Failed`.
        processes: how many at a time.
        limit: seconds of a job.
    """
    waiting = deque(jobs)
    busy: list[Worker] = []
    try:
        while waiting or busy:
            while waiting and len(busy) < processes:
                busy.append(Worker(run_job, waiting.popleft()))
            timeout = min(worker.deadline for worker in busy) - time.monotonic()
            ready = wait([worker.connection for worker in busy], max(0.0, timeout))
            for worker in list(busy):
                message: object = False
                if worker.connection in ready:
                    try:
                        message = worker.connection.recv()
                    except (EOFError, OSError):
                        worker.process.join()
                        yield worker.job, Failed(f"the process ended with exit code {worker.process.exitcode}")
                elif time.monotonic() > worker.deadline:
                    yield worker.job, Failed(f"no answer within {limit if worker.started else START:g} s")
                else:
                    continue
                if not isinstance(message, bool):
                    yield worker.job, message
                    continue
                if message and not worker.started:
                    worker.take(worker.job, limit)
                    continue
                yield worker.job, None
                if message and waiting:
                    worker.take(waiting.popleft(), limit)
                else:
                    busy.remove(worker)
                    worker.end()
    finally:
        for worker in busy:
            worker.end()
