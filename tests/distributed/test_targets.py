"""Objectives with an averaged copy of the network or with teachers, over several processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from minimum import needs_compile, needs_sharding
from processes import assert_nothing_said, what_processes_say
from safetensors.torch import load_file
from target_objectives import METHODS, NAME
from tiny_runs import TINY

from meanflow.training import list_checkpoints, load_checkpoint, run_training
from meanflow.training.log import read_log
from mfkernels.testing import relative_error

WORKERS = Path(__file__).with_name("target_workers.py")
FORMS = ["ddp", "ddp, checkpointed", "ddp, bf16", "fsdp", "fsdp, checkpointed", "fsdp, bf16"]
NAMES = ["averaged", "through", "taught"]
COMPILED = ["ddp, compiled", "fsdp, compiled"]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return what_processes_say(WORKERS, 2, tmp_path_factory.mktemp("processes"), seconds=480)


@pytest.mark.parametrize("form", [pytest.param(f, marks=needs_sharding) if "fsdp" in f else f for f in FORMS])
@pytest.mark.parametrize("name", NAMES)
def test_losses_gradients_weights_and_averages_are_the_single_processs(told, name, form):
    assert_nothing_said(told, f"{name}: {form}")


@pytest.mark.parametrize("form", ["ddp", pytest.param("fsdp", marks=needs_sharding)])
@pytest.mark.parametrize("name", METHODS)
def test_methods_with_an_averaged_copy_a_teacher_or_groups(told, name, form):
    assert_nothing_said(told, f"{name}: {form}")


@pytest.mark.parametrize("form", COMPILED)
@pytest.mark.parametrize("name", NAMES)
@needs_compile
def test_compiled_steps_are_the_single_processs_and_compile_once(told, name, form):
    assert_nothing_said(told, f"{name}: {form}")


def config_of(objective, **values):
    return TINY.replace(
        objective=f"{NAME}{objective}", ratio=0.5, warmup_steps=0, schedule="constant", threads=1, **values
    )


def launch(world, config, *flags):
    """The processes of a run, started by torchrun."""
    path = Path(f"{config.run.name}.yaml")
    path.write_text(yaml.safe_dump(config.to_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command += ["-m", "meanflow", "train", "--config", str(path), "--trust-code", *flags]
    support = os.pathsep.join([str(WORKERS.parents[1] / "support"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": support}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr


def check_same(a, b, parts):
    for column in ("loss", "grad_norm"):
        one, other = ([row[column] for row in read_log(Path("runs") / name / "log.jsonl")] for name in (a, b))
        assert other == pytest.approx(one, rel=4e-7)
    one, other = (load_checkpoint(list_checkpoints(Path("runs") / name / "checkpoints")[-1]) for name in (a, b))
    for part in parts:
        check_near(getattr(other, part), getattr(one, part))


def check_near(found, expected):
    assert found.keys() == expected.keys()
    found, expected = (torch.cat([tensors[key].flatten() for key in expected]) for tensors in (found, expected))
    assert relative_error(found, expected) <= 6e-6  # AdamW's first steps amplify a rounding; measured 3.0e-6


@needs_sharding
def test_a_run_with_an_averaged_copy_goes_from_one_process_to_ddp_and_fsdp_and_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_of(
        "Through", steps=5, checkpoint_every=10, ema_decays=(0.5,), power_ema=(0.1, 0.2), power_ema_every=1
    )
    run_training(config.replace(name="one"))
    many = config.replace(name="many")
    run_training(many.replace(steps=1))
    launch(2, many.replace(steps=2), "--resume")
    launch(2, many.replace(steps=3, strategy="fsdp", accumulate=2), "--resume")
    checkpoint = list_checkpoints(Path("runs/many/checkpoints"))[-1]
    assert not (checkpoint / "target.safetensors").exists()  # in the shards
    averages = load_checkpoint(checkpoint).averages
    whole = load_file(checkpoint / "averages.safetensors")  # in the shards too
    assert all(torch.equal(whole[name], averages[name]) for name in whole.keys() | averages.keys())
    launch(2, many.replace(steps=4), "--resume")
    assert load_file(list_checkpoints(Path("runs/many/checkpoints"))[-1] / "target.safetensors")
    run_training(many, resume=True)
    check_same("one", "many", ["model", "ema", "averages", "target"])
    assert len(list(Path("runs/many/averages").iterdir())) == 5
    for path in Path("runs/many/averages").iterdir():
        check_near(load_file(path), load_file(Path("runs/one/averages") / path.name))


@needs_sharding
def test_resuming_under_fsdp_gives_the_bits_of_a_run_that_was_not_stopped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_of("Averaged", steps=4, checkpoint_every=10, strategy="fsdp", power_ema=(0.1, 0.2))
    launch(2, config.replace(name="whole"))
    launch(2, config.replace(name="parts", steps=2))
    launch(2, config.replace(name="parts"), "--resume")
    one, other = (
        load_checkpoint(list_checkpoints(Path("runs") / name / "checkpoints")[-1]).tensors
        for name in ("whole", "parts")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@needs_sharding
def test_shards_of_teachers_teach_what_whole_ones_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_training(TINY.replace(name="good", steps=1, warmup_steps=0))
    run_training(config_of("InForm", name="bad", hidden_size=8, steps=1))
    config = config_of("Taught", teacher="good", weak_teacher="bad", steps=3, checkpoint_every=10)
    run_training(config.replace(name="one"), trust_code=True)
    launch(2, config.replace(name="many", steps=2, strategy="fsdp"))
    run_training(config.replace(name="many"), resume=True, trust_code=True)
    check_same("one", "many", ["model", "ema"])
