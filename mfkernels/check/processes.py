"""Processes that answer jobs, for `python -m mfkernels.check`: one that hangs or dies costs its job and no other."""

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
Answer = Callable[[Any], Iterable[object]]


class Lost(NamedTuple):
    """Said of a job that did not come to its end."""

    why: str


class DeviceLostError(RuntimeError):
    """Raised by an `Answer`: the CUDA context is gone, and the process can do nothing more."""


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def work(connection: Connection, answer: Answer) -> None:
    """The main program of a process. It sends True at its start, and after each job whether it can take another."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
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
            for said in answer(job):
                connection.send(said)
        except Exception as error:
            usable = not isinstance(error, DeviceLostError)
            connection.send(Lost(first_line(error)))
        connection.send(usable)


class Worker:
    """A process and the job that it has, or will have when it has started."""

    def __init__(self, answer: Answer, job: object) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, answer), daemon=True)
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


def run_jobs(jobs: Sequence[Any], answer: Answer, processes: int, limit: float) -> Iterator[tuple[Any, Any]]:
    """(job, what is said of it) as it comes, and (job, None) at the end of each.

    Args:
        jobs: in the order in which they are begun.
        answer: called in the processes; what it raises is said as `Lost`.
        processes: how many at a time.
        limit: seconds of a job.
    """
    waiting = deque(jobs)
    busy: list[Worker] = []
    try:
        while waiting or busy:
            while waiting and len(busy) < processes:
                busy.append(Worker(answer, waiting.popleft()))
            patience = min(worker.deadline for worker in busy) - time.monotonic()
            ready = wait([worker.connection for worker in busy], max(0.0, patience))
            for worker in list(busy):
                said: object = False
                if worker.connection in ready:
                    try:
                        said = worker.connection.recv()
                    except (EOFError, OSError):
                        worker.process.join()
                        yield worker.job, Lost(f"the process ended with exit code {worker.process.exitcode}")
                elif time.monotonic() > worker.deadline:
                    yield worker.job, Lost(f"no answer within {limit if worker.started else START:g} s")
                else:
                    continue
                if not isinstance(said, bool):
                    yield worker.job, said
                    continue
                if said and not worker.started:
                    worker.take(worker.job, limit)
                    continue
                yield worker.job, None
                if said and waiting:
                    worker.take(waiting.popleft(), limit)
                else:
                    busy.remove(worker)
                    worker.end()
    finally:
        for worker in busy:
            worker.end()
