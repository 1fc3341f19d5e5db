"""Runs of the trainer over several processes: the same losses, resumed by others, and one that dies."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_runs
import torch
import yaml
from accelerate import PartialState
from minimum import needs_sharding
from safetensors.torch import load_file

from meanflow.cli import main
from meanflow.config import Config
from meanflow.errors import UsageError
from meanflow.training import list_checkpoints, load_checkpoint, load_network, run_training
from meanflow.training.checkpoint import cure_for_damage
from meanflow.training.log import read_log
from mfkernels.testing import relative_error

TINY = tiny_runs.TINY.replace(norm_p=0.5, warmup_steps=0, schedule="constant", threads=1)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def write(config: Config) -> str:
    path = Path(f"{config.run.name}.yaml")
    path.write_text(yaml.safe_dump(config.to_dict()))
    return str(path)


@contextlib.contextmanager
def processes(config: Config, world: int, *flags: str):
    """The processes of a run, without a launcher that would end them all."""
    path = write(config)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(world):
        there = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        there |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "meanflow", "train", "--config", path, *flags]
        started.append(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment() | there
            )
        )
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


LAUNCHERS = {
    "torchrun": "torch.distributed.run --standalone --nproc-per-node {world}",
    # --cpu would start one process; the device is the configuration's
    "accelerate": "accelerate.commands.launch --multi_gpu --num_processes {world} --num_machines 1 "
    "--mixed_precision no --dynamo_backend no --main_process_port 0",
}


def launch(launcher: str, world: int, config: Config, *flags: str) -> tuple[str, str]:
    """What a launcher's processes say, on stdout and stderr."""
    command = [sys.executable, "-m", *LAUNCHERS[launcher].format(world=world).split()]
    command += ["-m", "meanflow", "train", "--config", write(config), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def curve(name: str, column: str) -> list[float]:
    return [row[column] for row in read_log(Path("runs") / name / "log.jsonl")]


@needs_sharding
def test_one_curve_whatever_the_processes_the_strategy_and_the_launcher_are_from_one_stop_to_the_next():
    run_training(TINY.replace(name="one"))
    config = TINY.replace(name="many", sample_every=3)
    said, _ = launch("torchrun", 2, config.replace(steps=1))
    assert said.count("Trained 1 steps") == 1  # only the first process speaks
    sharded = config.replace(strategy="fsdp")
    _, logged = launch("torchrun", 4, sharded.replace(steps=4), "--resume")  # DDP's checkpoint, FSDP2
    assert logged.count("many: step 4/4") == 1
    checkpoint = list_checkpoints(Path("runs/many/checkpoints"))[-1]
    assert len(list((checkpoint / "shards").glob("*.distcp"))) == 4
    launch("accelerate", 2, sharded.replace(steps=5, accumulate=2), "--resume")  # four's pieces for two
    checkpoint = list_checkpoints(Path("runs/many/checkpoints"))[-1]
    whole = load_checkpoint(checkpoint)  # the pieces, put together by one process without a group
    for part, of in (("model", whole.model), ("ema", whole.ema)):
        saved = load_file(checkpoint / f"{part}.safetensors")
        assert saved.keys() == of.keys()
        assert all(torch.equal(saved[name], of[name]) for name in of), part
    assert load_network(Path("runs/many")).step == 5
    run_training(config.replace(steps=6), resume=True)
    assert len(curve("many", "loss")) == 6
    for column in ("loss", "grad_norm"):
        assert curve("many", column) == pytest.approx(curve("one", column), rel=4e-7)  # measured 1e-7 and 2e-7

    (piece, *_) = sorted((checkpoint / "shards").glob("*.distcp"))
    shutil.rmtree(Path("runs/many/checkpoints/step_00000006"))
    shutil.copytree(checkpoint, checkpoint.with_name("step_00000001"))
    written = piece.read_bytes()
    piece.write_bytes(written[:2000] + bytes([written[2000] ^ 1]) + written[2001:])
    with pytest.raises(UsageError, match=rf"cannot read .*{piece.name}: it is damaged: expected the checksum"):
        load_checkpoint(checkpoint)
    os.truncate(piece, piece.stat().st_size // 2)
    with pytest.raises(UsageError, match=r"cannot read .*step_00000005/shards"):
        load_checkpoint(checkpoint)
    cure = cure_for_damage(checkpoint.parent, checkpoint)
    assert f"step_00000001 is intact: remove {checkpoint} to" in cure


@needs_sharding
def test_what_a_network_draws_itself_differs_between_processes_and_not_after_a_resume():
    Path("noisy.py").write_text(
        """
import os

import torch


class Noisy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, z, r, t, y):
        noise = torch.rand(())
        if self.training:
            with open(f"drawn_{os.environ['RANK']}.txt", "a") as file:
                print(noise.item(), file=file)
        return z * self.scale * noise


def net(input_size, in_channels, num_classes):
    return Noisy()
"""
    )
    sizes = dict.fromkeys(("hidden_size", "depth", "num_heads", "patch_size"))
    config = TINY.replace(name="noisy", model="noisy:net", steps=3, kappa=0.0, label_dropout=0.0, **sizes)

    def drawn(rank: int) -> list[str]:
        return Path(f"drawn_{rank}.txt").read_text().split()

    _, said = launch("torchrun", 2, config, "--strategy", "ddp", "--trust-code")  # the file names the function
    assert "gathers all of it" not in said
    straight = [drawn(rank)[-1] for rank in range(2)]
    assert straight[0] != straight[1]
    launch("torchrun", 2, config.replace(steps=2), "--overwrite", "--trust-code")
    assert [drawn(rank)[-1] for rank in range(2)] != straight
    _, said = launch("torchrun", 2, config.replace(strategy="fsdp"), "--resume", "--model", "noisy:net")
    assert said.count("strategy: noisy:net has no blocks, so fsdp gathers all of it at once") == 1
    assert [drawn(rank)[-1] for rank in range(2)] == straight


@needs_sharding
def test_what_an_objective_learns_is_one_whatever_the_processes_and_the_strategy_are():
    Path("weighted.py").write_text(
        """
from dataclasses import dataclass

from torch import nn

from meanflow.objectives import MeanFlow


class LogVariance(nn.Module):
    def __init__(self):
        super().__init__()
        self.of_time = nn.Linear(1, 3)

    def forward(self, t):
        return self.of_time(t[:, None]).mean(1)


@dataclass(frozen=True)
class Weighted(MeanFlow):
    def learned_module(self):
        return LogVariance()

    def terms(self, b, nets):
        terms = super().terms(b, nets)
        log_variance = nets.learned(b.t)
        return terms._replace(per_sample=terms.per_sample / log_variance.exp() + log_variance)
"""
    )
    config = TINY.replace(objective="weighted:Weighted", ratio=0.5, kappa=0.3, steps=4, warmup_steps=0)
    run_training(config.replace(name="one"))
    many = config.replace(name="many", checkpoint_every=10)
    launch("torchrun", 2, many.replace(steps=1, accumulate=2), "--trust-code")
    launch("torchrun", 2, many.replace(steps=2, accumulate=2, strategy="fsdp"), "--resume", "--trust-code")
    launch("torchrun", 4, many.replace(steps=3, strategy="fsdp"), "--resume", "--trust-code")  # more than its 3 numbers
    run_training(many, resume=True)
    for column in ("loss", "grad_norm"):
        assert curve("many", column) == pytest.approx(curve("one", column), rel=4e-7)
    one, several = (
        load_checkpoint(list_checkpoints(Path("runs") / name / "checkpoints")[-1]) for name in ("one", "many")
    )
    assert several.learned.keys() == {"of_time.weight", "of_time.bias"}
    for name, value in one.learned.items():
        assert relative_error(several.learned[name], value) <= 4e-7


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=needs_sharding)])
def test_a_process_that_dies_takes_the_others_down(strategy):
    config = TINY.replace(name="dies", steps=100_000, checkpoint_every=20, strategy=strategy)
    with processes(config, 2) as (first, second):
        log = Path("runs/dies/log.jsonl")
        deadline = time.monotonic() + 150
        while time.monotonic() < deadline and first.poll() is None and len(read_log(log)) < 25:
            time.sleep(0.05)
        second.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        _, err = first.communicate(timeout=60)
        assert time.monotonic() - killed < 60
        assert first.returncode == 1, err
    assert "process 0 of 2 lost another one after step" in err
    assert "--resume" in err
    state = max(Path("runs/dies/checkpoints").glob("step_*/state.json"))
    assert json.loads(state.read_text())["step"] % 20 == 0


def test_where_there_is_no_gpu_auto_is_one_run_on_the_cpu():
    config = TINY.replace(name="auto", device="auto", steps=2)
    said, logged = launch("torchrun", 2, config)
    assert said.count("Trained 2 steps") == 1
    assert logged.count("1797 images") == 1
    assert len(curve("auto", "loss")) == 2
    run_training(config.replace(name="one"))
    assert curve("auto", "loss") == pytest.approx(curve("one", "loss"), rel=4e-7)


def test_a_run_in_use_is_refused_in_every_process_of_another_group():
    config = TINY.replace(name="owned", steps=100_000)
    with processes(config, 2) as first:
        log = Path("runs/owned/log.jsonl")
        deadline = time.monotonic() + 150
        while time.monotonic() < deadline and first[0].poll() is None and not read_log(log):
            time.sleep(0.05)
        with processes(config, 2, "--overwrite") as second:
            for process in second:
                _, err = process.communicate(timeout=100)
                assert process.returncode == 2, err
                assert f"runs/owned is in use: process {first[0].pid} on" in err
                assert "Traceback" not in err
        assert read_log(log)
        for process in first:
            process.send_signal(signal.SIGINT)
        outs = [process.communicate(timeout=60) for process in first]
    assert [process.returncode for process in first] == [130, 130], outs
    assert [err.count("SIGINT: the run stops after a multiple of log_every = 1 steps") for _, err in outs] == [1, 0]
    assert "meanflow train --resume --name owned" in outs[0][0]


def test_a_process_that_dies_after_the_last_step_is_named():
    """While the first process writes the report, the others wait for it."""
    config = TINY.replace(name="late", steps=2, evaluate=True, omega=1.0, kappa=0.0)
    with processes(config, 2) as (first, second):
        done = Path("runs/late/samples.png")
        deadline = time.monotonic() + 150
        while time.monotonic() < deadline and first.poll() is None and not done.exists():
            time.sleep(0.01)
        second.send_signal(signal.SIGKILL)
        _, err = first.communicate(timeout=60)
    assert first.returncode == 1, err
    assert "process 0 of 2 lost another one after step 2 of 2" in err
    assert "Traceback" not in err
    assert Path("runs/late/report.json").exists()


@pytest.mark.parametrize("command", ["sample runs/x", "evaluate runs/x", "convert a.npz --out b.safetensors"])
def test_what_one_process_does_is_refused_in_several(monkeypatch, capsys, command):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert main(command.split()) == 2
    assert "WORLD_SIZE: this command works in one process, and 2 were started" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: expected a number of processes, got 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: expected a number of processes, got '0'"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE: 2 processes are announced, but RANK and LOCAL_RANK of this one is not"),
    ],
)
def test_an_environment_that_is_no_launchers_is_named(monkeypatch, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=words):
        run_training(TINY)
    assert not Path("runs").exists()


def test_processes_that_accelerate_does_not_find_are_an_error(monkeypatch):
    """An accelerator of which accelerate makes no group, such as a Mac's."""
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **options: None)
    PartialState._reset_state()
    try:
        with pytest.raises(UsageError, match="WORLD_SIZE: 2 processes are announced, and accelerate found 1 on cpu"):
            run_training(TINY.replace(device="auto"))
    finally:
        PartialState._reset_state()
    assert not Path("runs").exists()
