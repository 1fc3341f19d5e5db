"""Runs that are killed again and again, and resumed: each must end with the very curve of one that never was.

`python -m kills 300 --seed 0` kills about a hundred times each: runs of one process, of two with DDP and of two with
FSDP2. SIGKILL comes at any moment of a session, so also while a checkpoint is written; of two processes it sometimes
takes one alone, and the other must end by itself. Processes are forked from this one, which has imported everything.
"""

import argparse
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch
from tiny_runs import TINY

from meanflow.data import load_digits_data
from meanflow.training import list_checkpoints, load_checkpoint, run_training
from meanflow.training.log import read_log

CONFIG = TINY.replace(steps=40, checkpoint_every=3, norm_p=0.5, threads=1, keep_checkpoints=2, ema_decays=(0.9,))
WAYS = {"one": (1, "ddp"), "ddp": (2, "ddp"), "fsdp": (2, "fsdp")}
PATIENCE = 120.0  # seconds for a session, and for what is left of a group to end


class Session:
    """The processes of one call of `meanflow train`."""

    def __init__(self, config, world, *, resume=False, overwrite=False):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes, self.codes = [], {}
        for rank in range(world):
            process = os.fork()
            if process == 0:
                if world > 1:
                    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
                    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                self._train(config, resume=resume, overwrite=overwrite)
            self.processes.append(process)

    @staticmethod
    def _train(config, **how):
        handle = os.open(f"{config.run.name}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        try:
            run_training(config, **how)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)

    def running(self):
        for process in set(self.processes) - set(self.codes):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                self.codes[process] = os.waitstatus_to_exitcode(status)
        return [process for process in self.processes if process not in self.codes]

    def wait(self, seconds):
        """Whether every process ends within that time."""
        deadline = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def kill(self, processes):
        for process in processes:
            if process in self.running():
                os.kill(process, signal.SIGKILL)


def rows(name):
    kept = ("step", "loss", "squared_error", "grad_norm", "lr")
    return [[row[key] for key in kept] for row in read_log(Path("runs") / name / "log.jsonl")]


def weights(name):
    saved = load_checkpoint(list_checkpoints(Path("runs") / name / "checkpoints")[-1])
    return {
        f"{part}|{key}": value
        for part in ("model", "ema", "averages", "optimizer")
        for key, value in getattr(saved, part).items()
    }


def whole_run(way):
    """A run that nobody kills; how long its session lasts."""
    world, strategy = WAYS[way]
    started = time.monotonic()
    session = Session(CONFIG.replace(name=way, strategy=strategy), world)
    assert session.wait(PATIENCE), "it hangs"
    assert set(session.codes.values()) == {0}, Path(f"{way}.txt").read_text()
    return time.monotonic() - started


def killed_run(way, number, draw, seconds, kills):
    """Kill a run, at any moment of `seconds`, until it has reached its end in spite of it, or was killed `kills` times.

    Returns:
        the number of kills, and how long a session is to be thought to last: other programs come and go.
    """
    world, strategy = WAYS[way]
    name = f"{way}{number}"
    config, done = CONFIG.replace(name=name, strategy=strategy), 0
    while True:
        found = bool(list_checkpoints(Path("runs") / name / "checkpoints"))
        there = (Path("runs") / name / "config.yaml").exists()
        session, started = Session(config, world, resume=found, overwrite=there and not found), time.monotonic()
        if done == kills or session.wait(draw.uniform(0.0, seconds)):
            assert session.wait(PATIENCE), f"{name} hangs"
            assert set(session.codes.values()) == {0}, Path(f"{name}.txt").read_text()
            seconds = time.monotonic() - started if done == 0 else seconds
            break
        alone = world > 1 and draw.random() < 0.3
        session.kill([draw.choice(session.processes)] if alone else session.processes)
        assert session.wait(PATIENCE), f"{name}: what is left of it hangs"
        done += 1
    assert rows(name) == rows(way), f"{name}: another curve"
    ours, expected = weights(name), weights(way)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in expected), f"{name}: other weights"
    left = [str(path) for path in Path("runs").rglob(".*") if path.name != ".metadata"]  # of PyTorch's shards
    assert not left, left
    return done, seconds


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--a-run", type=int, default=8, help="kills of one run at most")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    torch.set_num_threads(1)
    load_digits_data(), torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # what they import late, only once
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for index, way in enumerate(WAYS):
            wanted = options.kills * (index + 1) // len(WAYS) - options.kills * index // len(WAYS)
            seconds = whole_run(way)
            kills = runs = 0
            while kills < wanted:
                done, seconds = killed_run(way, runs, draw, seconds, min(options.a_run, wanted - kills))
                kills, runs = kills + done, runs + 1
            print(f"{way}: {runs} runs killed {kills} times, every curve and weight the same", flush=True)


if __name__ == "__main__":
    main()
