"""Runs of the trainer over several processes: the same losses, resumed on another number, and one that dies."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from meanflow.training import TrainConfig
from meanflow.training.log import read_log

TINY = TrainConfig(
    data="digits",
    model="DiT",
    hidden_size=16,
    depth=1,
    num_heads=2,
    patch_size=4,
    ratio=0.5,
    omega=1.0,
    kappa=0.3,
    norm_p=0.5,
    steps=6,
    batch_size=8,
    lr=1e-2,
    threads=1,
    device="cpu",
    log_every=1,
    checkpoint_every=3,
    sample_every=0,
    evaluate=False,
)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@contextlib.contextmanager
def processes(config: TrainConfig, world: int, *flags: str):
    """The processes of a run, as torchrun starts them."""
    path = Path(f"{config.name}.yaml")
    path.write_text(yaml.safe_dump(config.to_dict()))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(world):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        if world > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            environment |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "meanflow", "train", "--config", str(path), *flags]
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        )
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def train(config: TrainConfig, world: int, *flags: str) -> list[str]:
    """What the processes print."""
    with processes(config, world, *flags) as started:
        said = [process.communicate(timeout=120) for process in started]
        assert [process.returncode for process in started] == [0] * world, said
    return [out + err for out, err in said]


def losses(name: str) -> list[float]:
    return [row["loss"] for row in read_log(Path("runs") / name / "log.jsonl")]


def test_any_number_of_processes_gives_one_curve_also_when_it_changes_on_the_way():
    train(dataclasses.replace(TINY, name="one"), 1)
    said = train(dataclasses.replace(TINY, name="changing", steps=3), 2)
    assert "Trained 3 steps" in said[0]
    assert "Trained" not in said[1]  # only the first process speaks
    train(dataclasses.replace(TINY, name="changing"), 4, "--resume")
    assert len(losses("one")) == len(losses("changing")) == 6
    assert losses("changing") == pytest.approx(losses("one"), rel=1e-5)


def test_a_process_that_dies_takes_the_others_down():
    config = dataclasses.replace(TINY, name="dies", steps=100_000, checkpoint_every=50)
    with processes(config, 2) as (first, second):
        log = Path("runs/dies/log.jsonl")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and first.poll() is None and len(read_log(log)) < 60:
            time.sleep(0.05)
        second.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        _, err = first.communicate(timeout=60)
        assert time.monotonic() - killed < 60
        assert first.returncode == 1, err
    assert "process 0 of 2 lost another one after step" in err
    assert "--resume" in err
    state = max(Path("runs/dies/checkpoints").glob("step_*/state.json"))
    assert json.loads(state.read_text())["step"] % 50 == 0
