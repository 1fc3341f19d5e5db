"""Damaged files of a run: each is told, with what is intact, or does not matter."""

import json
import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from damage import Fuzzer, outcomes, seal
from forged import PLAIN, SHARDS, fails, forge, meanflow, newest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from meanflow.config import Config
from meanflow.errors import UsageError
from meanflow.training import list_checkpoints, load_checkpoint, load_network, run_training


@pytest.mark.parametrize("run", [PLAIN, SHARDS])
def test_a_flipped_bit_anywhere_is_told_and_an_older_checkpoint_is_named(here, capsys, run):
    path = newest(run)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    assert len(files) == (6 if run == SHARDS else 5)
    for file in files:
        before = file.read_bytes()
        middle = len(before) * 3 // 4
        file.write_bytes(before[:middle] + bytes([before[middle] ^ 4]) + before[middle + 1 :])
        loaded = {
            "ema.safetensors": "ema",
            "model.safetensors": "raw",
            "averages.safetensors": "0.9",
            "state.json": "ema",
        }.get(file.name)
        if loaded:
            with pytest.raises(UsageError, match=rf"{file.name}.*step_00000001 is intact: remove .*step_00000002"):
                load_network(run, loaded)
        if run == PLAIN or file.suffix not in (".safetensors"):
            with pytest.raises(UsageError, match=str(file.name)):
                load_checkpoint(path)
            fails(f"train --resume --name {run.name} --steps 3", capsys, file.name, "step_00000001 is intact")
        file.write_bytes(before)
    assert load_checkpoint(path).step == 2


def test_a_checkpoint_without_checksums_loads(here):
    for run in (PLAIN, SHARDS):
        path = newest(run)
        state = json.loads((path / "state.json").read_text())
        assert state["checksums"].keys() == {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
        whole = load_checkpoint(path)
        del state["checksums"]
        (path / "state.json").write_text(json.dumps(state))
        again = load_checkpoint(path)
        assert all(torch.equal(again.tensors[key], value) for key, value in whole.tensors.items())
        assert load_network(run).step == 2
        assert meanflow(f"train --resume --name {run.name} --steps 3") == 0


def test_a_checkpoint_of_before_has_its_shards_in_shares(here):
    before = load_checkpoint(newest(SHARDS))
    for path in list_checkpoints(SHARDS / "checkpoints"):
        (path / "shards").rename(path / "shares")
        seal(path, json.loads((path / "state.json").read_text()))
    saved = load_checkpoint(newest(SHARDS))
    assert all(torch.equal(saved.tensors[key], value) for key, value in before.tensors.items())
    assert meanflow(f"train --resume --name {SHARDS.name} --steps 3") == 0


def test_a_newest_checkpoint_without_its_state_is_not_passed_over(here, capsys):
    (newest(PLAIN) / "state.json").unlink()
    with pytest.raises(UsageError, match=r"step_00000002 is not a checkpoint.*state\.json.*step_00000001 is intact"):
        load_network(PLAIN)
    fails("train --resume --name plain", capsys, "step_00000002 is not a checkpoint", "step_00000001 is intact")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, None])
@pytest.mark.parametrize("part", ["model", "ema", "averages", "optimizer"])
def test_tensors_that_are_no_finite_numbers_are_refused(here, capsys, part, value):
    file = newest(PLAIN) / f"{part}.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    if value is None:
        tensors[name] = tensors[name].long()
    else:
        tensors[name].view(-1)[0] = value
    save_file(tensors, file)
    forge(PLAIN)
    name = name.rpartition("|")[2]
    weights = {"model": "raw", "ema": "ema", "averages": "0.9"}
    if part in weights:
        with pytest.raises(UsageError, match=name):
            load_network(PLAIN, weights[part])
    fails("train --resume --name plain --steps 3", capsys, name, "step_00000002")


def test_buffers_of_integers_and_with_infinity_are_the_networks_own(here):
    Path("mine.py").write_text(
        """
import torch
from meanflow.models import DiT

class Net(DiT):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("mask", torch.full((2,), -torch.inf))

    def forward(self, z, r, t, y):
        return super().forward(z, r, t, y)

def net(**sizes):
    return Net(**sizes)
"""
    )
    config = Config.of(
        data="digits", name="mine", model="mine:net", hidden_size=8, depth=1, num_heads=2, patch_size=4, steps=1,
        batch_size=4, device="cpu", evaluate=False,
    )  # fmt: skip
    run_training(config)
    path = newest(Path("runs/mine"))
    assert load_network(path, trust_code=True).net.mask.isinf().all()
    file = path / "ema.safetensors"
    tensors = load_file(file)
    tensors["count"] = tensors["count"].float()
    save_file(tensors, file)
    forge(Path("runs/mine"))
    with pytest.raises(UsageError, match=r"has other kinds 1: count torch\.float32 instead of torch\.int64"):
        load_network(path, trust_code=True)


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    return Fuzzer(tmp_path_factory.mktemp("fuzzer"))


def test_damaged_files_are_told_or_do_not_matter(fuzzer):
    @settings(max_examples=20, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
    @given(st.integers(0, 2**32))
    def check(seed):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that a file makes a run with
            what, found = fuzzer.check(seed)
        assert not [words for words in found if words.startswith("fault")], (seed, what, found)

    check()


def test_the_fuzzer_sees_other_values_and_code_that_runs(fuzzer, tmp_path, monkeypatch):
    def found(name, act):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(fuzzer.folder / "healthy", tmp_path / "copy")
        path = newest(tmp_path / "copy/runs/plain") / name
        act(path)
        return outcomes(random.Random(0), tmp_path / "copy", [path], True, fuzzer.values, 0)

    def flip(path):
        path.write_bytes(path.read_bytes()[:-1] + b"\x3f")

    def name_a_function(path):
        model = json.loads(path.read_text())["model"]
        seal(path.parent, {**json.loads(path.read_text()), "model": {**model, "name": "canary:fire"}})

    assert found("ema.safetensors", flip) == ["refused", "same", "refused", "refused"]
    assert found("state.json", name_a_function)[:2] == ["refused", "refused"]
    monkeypatch.setattr("meanflow.training.network.check_files", lambda *args: None)
    monkeypatch.setattr("meanflow.training.network.check_code", lambda *args: None)
    assert found("ema.safetensors", flip)[0] == "fault: load_network loaded other values"
    assert found("state.json", name_a_function)[-1] == "fault: code was executed"
